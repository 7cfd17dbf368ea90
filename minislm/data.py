"""Files to examples: splits of a data folder, the task that says what the classes are, samples.

A data folder has train, validation and test files (.jsonl, .csv, .tsv, each also .gz; dev, val and
valid name the validation split too) and may have a task.toml:

    prompt = "Which?\\nClasses:{classes}\\n\\nText: {text}"   # optional; where classes are listed

    [[classes]]                   # in the order of predict_proba's columns
    label = "0"                   # as it stands in the data
    word = "animals"              # as the model is to say it; default: the label as it is
    synonyms = ["pets"]           # other words for it, whose scores are averaged with the word's
    meaning = "pets, wildlife"    # default: none; the prompt then lists the words alone
"""

import csv
import errno
import gzip
import json
import os
import random
import re
import tomllib
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

SPLITS = {"train": ["train"], "validation": ["validation", "valid", "val", "dev"], "test": ["test"]}
SUFFIXES = (".jsonl", ".csv", ".tsv")
KEYS = "label word meaning synonyms".split()
csv.field_size_limit(1 << 30)


class Example(NamedTuple):
    text: str
    label: str


@dataclass(frozen=True)
class Task:
    """The classes, in the order of predict_proba's columns, and how to ask for them."""

    labels: tuple[str, ...]
    words: tuple[str, ...]
    meanings: tuple[str, ...]  # "" where there is none
    prompt: str | None = None  # with {classes} and {text}; None: the method's own
    synonyms: tuple[tuple[str, ...], ...] = ()  # more words of each class
    shots: tuple[tuple[str, str], ...] = ()  # (text, label): examples to stand in the prompt

    def __post_init__(self):
        if not self.synonyms:
            object.__setattr__(self, "synonyms", ((),) * len(self.labels))
        if len(self.labels) < 2:
            raise ValueError(f"a task needs at least two classes; this one has {list(self.labels)}")
        if {*map(len, (self.words, self.meanings, self.synonyms))} != {len(self.labels)}:
            raise ValueError(f"as many words, meanings and synonyms as labels are needed: {self}")
        for name, values in (("label", self.labels), ("word", self.words)):
            if odd := [v for v, n in Counter(values).items() if n > 1 or not v.strip()]:
                raise ValueError(f"the {name} {odd[0]!r} is empty or of two classes: see task.toml")
        for place in ("{classes}", "{text}") if self.prompt is not None else ():
            if not isinstance(self.prompt, str) or self.prompt.count(place) != 1:
                raise ValueError(f"the task's prompt must have {place} once: {self.prompt!r}")

    @classmethod
    def of_labels(cls, labels) -> "Task":
        """The task whose words are the labels, underscores read as spaces; numbers in order."""
        number = re.compile(r"-?\d+").fullmatch
        labels = sorted(set(labels), key=lambda s: (0, int(s), s) if number(s) else (1, 0, s))
        words = tuple(label.replace("_", " ").strip() for label in labels)
        return cls(tuple(labels), words, ("",) * len(labels))

    @classmethod
    def read(cls, path: Path) -> "Task":
        """A task.toml."""
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
            classes = content.pop("classes", None)
            if not isinstance(classes, list) or not all(isinstance(c, dict) for c in classes):
                raise ValueError("it needs one [[classes]] table per class")
            if odd := content.keys() - {"prompt"} | set().union(*classes) - {*KEYS}:
                raise ValueError(f"unknown key {min(odd)!r}: classes have {KEYS}, prompt is above")
            for c in classes:
                if "label" not in c or not isinstance(c.get("synonyms", []), list):
                    raise ValueError(f"every class needs a label, and synonyms as a list: {c}")
            labels = tuple(str(c["label"]).strip() for c in classes)
            words = tuple(str(c.get("word", label)).strip() for c, label in zip(classes, labels))
            meanings = tuple(str(c.get("meaning", "")) for c in classes)
            synonyms = tuple(tuple(map(str, c.get("synonyms", ()))) for c in classes)
            return cls(labels, words, meanings, content.get("prompt"), synonyms)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a readable task: {error}") from None

    @classmethod
    def from_dict(cls, d: dict) -> "Task":
        """What `dataclasses.asdict` and JSON made of a task."""
        pairs = {k: map(tuple, v) for k, v in d.items() if k in ("synonyms", "shots")}
        return cls(**{k: v if k == "prompt" else tuple(v) for k, v in (d | pairs).items()})


def read_rows(path: Path, file=None) -> Iterator[tuple[int, dict]]:
    """Yields (line number, row) as it reads; semicolons or tabs may separate the cells of a .csv.

    file: an open text file to read instead of opening `path`, which then only names the format.
    """
    zipped = path.suffix == ".gz"
    kind = path.with_suffix("").suffix if zipped else path.suffix
    if kind not in SUFFIXES:
        raise ValueError(f"{path}: the name must end in {', '.join(SUFFIXES)}, or these with .gz")
    try:
        file = file or (gzip.open if zipped else open)(path, "rt", encoding="utf-8-sig", newline="")
        with file as lines:
            if kind == ".jsonl":
                for number, line in enumerate(map(str.strip, lines), 1):
                    if line:
                        if not isinstance(row := json.loads(line), dict):
                            raise ValueError(repr(line[:60]))
                        yield number, row
            else:
                top, header = next((p for p in enumerate(lines, 1) if p[1].strip()), (1, ""))
                number, separator = top, "\t" if kind == ".tsv" else max(",;\t", key=header.count)
                rows = csv.DictReader(chain([header], lines), delimiter=separator, strict=True)
                if double := [c for c, n in Counter(rows.fieldnames or ()).items() if c and n > 1]:
                    raise csv.Error(f"two columns are named {double[0]!r}: rename one")
                number += rows.line_num  # where the next row begins, should it not be readable
                for row in rows:
                    number = top + rows.line_num - 1
                    if None in row or None in row.values():
                        raise csv.Error("more or fewer cells than columns")
                    yield number, row
                    number += 1
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not readable: {error}") from None
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 (byte {error.object[error.start]:#x} is not valid there)"
        likely = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        raise ValueError(f"{path}: {problem}; convert it: iconv -f {likely} -t utf-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: not a JSON object: {error}") from None
    except csv.Error as error:
        problem = f"{error}; quote a cell that holds a separator or quotes, and double its quotes"
        raise ValueError(f"{path}, line {number}: {problem}") from None


def field(row: dict, column: str, path: Path, number: int, filled: bool = False) -> str:
    """A column's value as text (labels may be numbers). filled: stripped, and refused if empty."""
    where = f"{path}, line {number}"
    if column not in row:
        have = f"it has {', '.join(row)}. Name yours with --text-column and --label-column"
        raise ValueError(f"{where}: no column {column!r}; {have}")
    value = row[column]
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise ValueError(f"{where}: {column} must be text or a whole number: {value!r}")
    text = str(value).strip() if filled else str(value)
    if filled and not text:
        raise ValueError(f"{where}: the {column} is empty")
    return text


def find_split(folder: Path, split: str) -> Path | None:
    """The file of a split; None where there is none."""
    paths = [folder / f"{n}{k}{gz}" for n in SPLITS[split] for k in SUFFIXES for gz in ("", ".gz")]
    found = [path for path in paths if os.path.lexists(path)]  # a link to nothing is an error
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1].name} are both the {split} split; keep one")
    return found[0] if found else None


def load_split(folder: Path, split: str, columns=("text", "label")) -> list[Example]:
    """The examples of train, validation or test. columns: those of texts and of labels."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such data folder")
    if (path := find_split(folder, split)) is None:
        names = " or ".join(f"{name}.jsonl" for name in SPLITS[split])
        raise ValueError(f"{folder}: no {split} file ({names}; .csv, .tsv and .gz are read too)")
    examples = [
        Example(field(row, columns[0], path, n), field(row, columns[1], path, n, filled=True))
        for n, row in read_rows(path)
    ]
    if not examples:
        raise ValueError(f"{path}: no examples in it")
    return examples


def load_task(source: Path, label_column: str = "label") -> Task:
    """The task of a task.toml, or of a data folder: its task.toml, else train's classes."""
    for path in (source, source / "task.toml"):
        if os.path.lexists(path) and not path.is_dir():
            return Task.read(path)
    if (path := find_split(source, "train")) is None:
        raise ValueError(f"{source}: neither a task.toml nor a folder with one or a train split")
    return Task.of_labels(field(row, label_column, path, n, True) for n, row in read_rows(path))


def class_indices(examples: list[Example], task: Task, source: str) -> list[int]:
    """Each example's class as an index into task.labels."""
    index = {label: i for i, label in enumerate(task.labels)}
    if unknown := [example.label for example in examples if example.label not in index]:
        raise ValueError(f"{source}: label {unknown[0]!r} is not one of {', '.join(task.labels)}")
    return [index[example.label] for example in examples]


def stratified_sample(examples: list[Example], n: int, seed: int) -> list[Example]:
    """n examples in file order, each class in its share (largest remainders); all if n is 0."""
    if not n or n >= len(examples):
        return examples
    rng, by_label = random.Random(seed), defaultdict(list)
    for i, example in enumerate(examples):
        by_label[example.label].append(i)
    shares = {label: n * len(members) / len(examples) for label, members in by_label.items()}
    counts = Counter({label: int(share) for label, share in shares.items()})
    counts.update(sorted(shares, key=lambda s: counts[s] - shares[s])[: n - counts.total()])
    chosen = [i for label in sorted(by_label) for i in rng.sample(by_label[label], counts[label])]
    return [examples[i] for i in sorted(chosen)]


def with_shots(task: Task, examples: list[Example], k: int, seed: int) -> Task:
    """The task with k training examples of each class, shuffled, to stand in the prompt."""
    rng, chosen = random.Random(seed), []
    for label in sorted(task.labels):
        own = [example for example in examples if example.label == label]
        if len(own) < k:
            raise ValueError(f"the class {label!r} has fewer than {k} training examples to show")
        chosen += rng.sample(own, k)
    return replace(task, shots=tuple(rng.sample(chosen, len(chosen))))


@contextmanager
def replacing(path: Path, mode: str = "w"):
    """Opens a temporary file beside `path` that takes its place only if the block succeeds."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if path.exists() and not path.is_file() or str(path.parent) in ("/dev", "/dev/fd"):
        raise ValueError(f"{path}: not a regular file")
    path = path.resolve()  # a link stays a link
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        text = {} if "b" in mode else dict(encoding="utf-8", errors="backslashreplace")
        with open(temporary, mode, **text) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:  # that of write() names no file
            error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)

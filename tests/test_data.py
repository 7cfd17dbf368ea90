"""Files to examples: every form that is read, and what is said about a file that is wrong."""

import csv
import errno
import gzip
import io
import json
import os
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import write_jsonl

from minislm.data import (
    Example,
    Task,
    class_indices,
    find_split,
    load_split,
    load_task,
    read_rows,
    replacing,
    stratified_sample,
)  # fmt: skip

ROWS = [
    {"text": "so happy, at last", "label": "joy"},
    {"text": "two lines\r\nand a \"quote\"\tand a tab", "label": "fear"},
    {"text": "Zoë\u2028 ☕ <|im_end|>", "label": "joy"},
]  # fmt: skip
EXAMPLES = [Example(**row) for row in ROWS]
KINDS = [".jsonl", ".csv", ".tsv", ".jsonl.gz", ".csv.gz", ".tsv.gz"]


def encode(rows: list[dict], kind: str, encoding: str = "utf-8") -> bytes:
    """Rows as a file of that kind."""
    out = io.StringIO(newline="")
    if kind.startswith(".jsonl"):
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        writer = csv.DictWriter(out, list(rows[0]), delimiter="\t" if "tsv" in kind else ",")
        writer.writeheader()
        writer.writerows(rows)
    content = out.getvalue().encode(encoding)
    return gzip.compress(content) if kind.endswith(".gz") else content


# ---------------------------------------------------------------------------- good files


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_read(kind, tmp_path):
    (tmp_path / f"test{kind}").write_bytes(encode(ROWS, kind))
    assert load_split(tmp_path, "test") == EXAMPLES


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_order_mark_is_no_part_of_the_first_column(kind, tmp_path):
    (tmp_path / f"test{kind}").write_bytes(encode(ROWS, kind, "utf-8-sig"))
    assert load_split(tmp_path, "test") == EXAMPLES


@pytest.mark.parametrize("kind", KINDS)
def test_columns_may_have_other_names(kind, tmp_path):
    rows = [{"label": "no", "intent": r["label"], "query": r["text"], "text": "no"} for r in ROWS]
    (tmp_path / f"train{kind}").write_bytes(encode(rows, kind))
    assert load_split(tmp_path, "train", ("query", "intent")) == EXAMPLES
    assert load_task(tmp_path, "intent").labels == ("fear", "joy")


@pytest.mark.parametrize("name", ["validation.jsonl", "valid.csv", "val.tsv", "dev.jsonl.gz"])
def test_the_validation_split_has_several_names(name, tmp_path):
    (tmp_path / name).write_bytes(encode(ROWS, name[name.index(".") :]))
    assert find_split(tmp_path, "validation") == tmp_path / name
    assert load_split(tmp_path, "validation") == EXAMPLES
    assert find_split(tmp_path, "train") is None


def test_windows_line_ends_and_blank_lines_are_no_rows(tmp_path):
    for kind in (".jsonl", ".csv"):
        lines = encode([ROWS[0], ROWS[2]], kind).splitlines()
        (tmp_path / f"test{kind}").write_bytes(b"\r\n\r\n".join([*lines, b""]))
        assert load_split(tmp_path, "test") == [EXAMPLES[0], EXAMPLES[2]]
        (tmp_path / f"test{kind}").unlink()


def test_integer_labels_are_ordered_as_numbers(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a", "label": n} for n in (10, 2, 0, 7, 2)])
    task = load_task(tmp_path)
    assert task.labels == task.words == ("0", "2", "7", "10")
    assert class_indices(load_split(tmp_path, "train"), task, "train") == [3, 1, 0, 2, 1]


def test_names_come_after_numbers_and_underscores_are_spaces():
    assert Task.of_labels(["1", "0", "-1"]).labels == ("-1", "0", "1")
    assert Task.of_labels(["_joy", "so sad"]).words == ("joy", "so sad")
    task = Task.of_labels(["card_arrival", "2", "Age limit", "10"])
    assert task.labels == ("2", "10", "Age limit", "card_arrival")
    assert task.words == ("2", "10", "Age limit", "card arrival")


@pytest.mark.parametrize("broken", [".jsonl", ".csv"])
def test_rows_are_read_one_at_a_time(broken, tmp_path):
    path = tmp_path / f"texts{broken}"
    path.write_bytes(encode(ROWS[:1], broken) + b" " * 200_000 + b"\xff\n")
    rows = read_rows(path)
    assert next(rows)[1] == ROWS[0]
    with pytest.raises(ValueError, match="not UTF-8"):
        list(rows)


@pytest.mark.parametrize("kind, numbers", [(".jsonl", [1, 2, 3]), (".csv", [2, 4, 5])])
def test_rows_come_with_the_number_of_their_last_line(kind, numbers, tmp_path):
    path = tmp_path / f"texts{kind}"
    path.write_bytes(encode(ROWS, kind))  # in CSV a header comes first and one text has two lines
    assert [number for number, _ in read_rows(path)] == numbers


# ----------------------------------------------------------------------------- bad files


def load_bytes(folder: Path, content: bytes, name: str = "train.jsonl") -> list[Example]:
    (folder / name).write_bytes(content)
    return load_split(folder, "train")


GOOD = b'{"text": "a", "label": "joy"}\n'


@pytest.mark.parametrize("content, message", [
    (b"", "no examples in it"),
    (b"\n \n", "no examples in it"),
    (GOOD + b'{"text": "b", "label":\n', "line 2: not a JSON object: [^:]*: line 1 column 23"),
    (GOOD + b"\n" + b"text,label\n", "line 3: not a JSON object"),
    (GOOD + b'["b", "joy"]\n', "line 2: not a JSON object"),
    (GOOD + b'{"text": "b", "label": true}\n', "line 2: label must be text or a whole number"),
    (GOOD + b'{"text": "b", "label": 0.5}\n', "line 2: label must be text or a whole number"),
    (GOOD + b'{"text": ["b"], "label": "joy"}\n', "line 2: text must be text"),
    (GOOD + '{"text": "Zoë", "label": "joy"}\n'.encode("cp1252"), "not UTF-8 .*0xeb.* cp1252"),
    ('{"text": "b", "label": "joy"}\n'.encode("utf-16"), "not UTF-8 .*0xff.* -f utf-16 "),
], ids=["empty", "blank", "cut", "csv", "list", "bool", "float", "text is a list", "latin-1",
        "utf-16"])  # fmt: skip
def test_a_bad_jsonl_file_is_refused(content, message, tmp_path):
    with pytest.raises(ValueError, match=f"train.jsonl.*{message}"):
        load_bytes(tmp_path, content)


@pytest.mark.parametrize("content, message", [
    (b"", "no examples in it"),
    (b"text,label\n", "no examples in it"),
    ("text,label\nZoë,joy\n".encode("latin-1"), "not UTF-8 .*0xeb"),
    (b"text,label,text\na,joy,b\n", "line 1: two columns are named 'text': rename one"),
    (b'"te"xt,label\na,joy\n', "line 1: .* expected after"),
    (b'\n\ntext,label\n"a" b,joy\n', "line 4: .* expected after"),
    (b'\n\ntext,label\n\na,joy,b\n', "line 5: more or fewer cells"),
    (b'text,label\n"a\nb",joy\n"c" d,joy\n', "line 4: .* expected after"),
    (b'text,label\na,joy\n"b,joy\nc,joy\n', "line 3: unexpected end"),
], ids=["empty", "header alone", "latin-1", "a column twice", "quotes in the header",
        "quotes in line 4", "too many cells", "quotes in a row", "a quote left open"])  # fmt: skip
def test_a_bad_csv_file_is_refused(content, message, tmp_path):
    with pytest.raises(ValueError, match=f"train.csv.*{message}"):
        load_bytes(tmp_path, content, "train.csv")


@pytest.mark.parametrize("name, content", [
    ("train.csv", 'text;label\r\n"a, b; c";joy\r\n'),
    ("train.csv", '\n \n"text";"label"\n"a, b; c";"joy"\n'),
    ("train.csv", "text\tlabel\na, b; c\tjoy\n"), ("train.tsv", "text\tlabel\na, b; c\tjoy\n"),
])  # fmt: skip
def test_a_csv_may_have_semicolons_or_tabs_and_empty_lines_above(name, content, tmp_path):
    assert load_bytes(tmp_path, content.encode(), name) == [("a, b; c", "joy")]


def test_a_tsv_of_one_column_may_have_commas_in_it(tmp_path):
    (path := tmp_path / "texts.tsv").write_text("text, in full\na, b; c\n")
    assert list(read_rows(path)) == [(2, {"text, in full": "a, b; c"})]


@pytest.mark.parametrize("row", ["hello, world,joy", "hello"])
def test_a_row_with_more_or_fewer_cells_than_the_header_is_refused(row, tmp_path):
    with pytest.raises(ValueError, match="train.csv, line 3") as error:
        load_bytes(tmp_path, f"text,label\nhello,joy\n{row}\n".encode(), "train.csv")
    assert "no column" not in str(error.value)


@pytest.mark.parametrize("name, comma", [("train.csv", ","), ("train.tsv", "\t")])
def test_a_quote_left_open_does_not_merge_rows(name, comma, tmp_path):
    content = f'text{comma}label\n"hello{comma}joy\nshe said "no"{comma}fear\n'
    with pytest.raises(ValueError, match=name):
        load_bytes(tmp_path, content.encode(), name)


@pytest.mark.parametrize("damage", [
    lambda b: b"text,label\nhello,joy\n",
    lambda b: b[:-9],
    lambda b: b[:10] + b"\x07" + b[11:],  # a block of the type that deflate does not have
    lambda b: b[:-8] + bytes(8),
], ids=["not compressed", "truncated", "corrupted", "checksum"])  # fmt: skip
def test_a_bad_gz_file_is_refused(damage, tmp_path):
    rows = [{"text": f"text {i * i}", "label": "joy"} for i in range(99)]
    with pytest.raises(ValueError, match="train.csv.gz: not readable"):
        load_bytes(tmp_path, damage(encode(rows, ".csv.gz")), "train.csv.gz")


@pytest.mark.parametrize("kind", [".jsonl", ".tsv"])
def test_a_missing_column_is_refused_with_those_that_are_there(kind, tmp_path):
    rows = encode([{"sentence": "a", "label": "joy"}], kind)
    with pytest.raises(ValueError, match="no column 'text'; it has sentence, label.*--text-column"):
        load_bytes(tmp_path, rows, f"train{kind}")


def test_a_null_text_is_not_called_a_missing_column(tmp_path):
    with pytest.raises(ValueError, match="train.jsonl, line 2: .*text") as error:
        load_bytes(tmp_path, GOOD + b'{"text": null, "label": "joy"}\n')
    assert "no column" not in str(error.value)


def test_two_files_for_a_split_are_refused(tmp_path):
    for name in ("dev.jsonl", "validation.csv.gz"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="validation.csv.gz and dev.jsonl are both the validation"):
        load_split(tmp_path, "validation")


@pytest.mark.parametrize("name", ["validation.jsonl", "task.toml"])
def test_a_link_to_nothing_is_an_error(name, tmp_path):
    """A tenth of train, or train's classes, in place of what is meant would go unnoticed."""
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"{name}: not .*readable.*No such file"):
        load_task(tmp_path) if name == "task.toml" else load_split(tmp_path, "validation")


def test_a_split_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"no validation file \(validation.jsonl or .*dev.jsonl"):
        load_split(tmp_path, "validation")
    with pytest.raises(ValueError, match="nowhere: no such data folder"):
        load_split(tmp_path / "nowhere", "test")
    with pytest.raises(ValueError, match="neither a task.toml nor a folder"):
        load_task(tmp_path)


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="texts.txt: the name must end in .jsonl, .csv, .tsv"):
        next(read_rows(tmp_path / "texts.txt"))


def test_one_class_is_no_task(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS[::2])
    with pytest.raises(ValueError, match=r"at least two classes; this one has \['joy'\]"):
        load_task(tmp_path)


def test_a_task_has_words_meanings_and_synonyms_for_every_label():
    for odd in (dict(words=("a",)), dict(meanings=("", "", "")), dict(synonyms=((),))):
        with pytest.raises(ValueError, match="as many words, meanings and synonyms as labels"):
            Task(**dict(labels=("a", "b"), words=("a", "b"), meanings=("", "")) | odd)


def test_a_label_that_is_no_class_is_refused():
    task = Task.of_labels(["joy", "fear"])
    assert class_indices(EXAMPLES, task, "test") == [1, 0, 1]
    with pytest.raises(ValueError, match="the test file: label 'Joy' is not one of fear, joy"):
        class_indices([*EXAMPLES, Example("a", "Joy")], task, "the test file")


# ----------------------------------------------------------------------------- task.toml

TASK = r"""
prompt = "Which shelf?\nClasses:{classes}\n\nText: {text}"
[[classes]]
label = " 3 "
word = " animals "
meaning = "pets, wildlife"
[[classes]]
label = "0"
"""


def read_task(folder: Path, content: str) -> Task:
    (folder / "task.toml").write_text(content, encoding="utf-8")
    return load_task(folder)


def test_a_task_is_read_in_the_order_of_its_file(tmp_path):
    prompt = "Which shelf?\nClasses:{classes}\n\nText: {text}"
    task = read_task(tmp_path, TASK)
    assert task == Task(("3", "0"), ("animals", "0"), ("pets, wildlife", ""), prompt)
    assert load_task(tmp_path / "task.toml") == task
    assert Task.from_dict(json.loads(json.dumps(asdict(task)))) == task


def test_the_task_file_comes_before_the_classes_of_train(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    assert read_task(tmp_path, TASK).labels == ("3", "0")


def test_a_byte_order_mark_and_space_around_a_label_are_no_part_of_them(tmp_path):
    (tmp_path / "task.toml").write_text(TASK, encoding="utf-8-sig")
    assert load_task(tmp_path).labels == ("3", "0")
    assert load_bytes(tmp_path, b"text,label\n a , joy \n", "train.csv") == [(" a ", "joy")]


@pytest.mark.parametrize("old, new, message", [
    ("prompt =", "promt =", "unknown key 'promt': classes have"),
    ("meaning =", "description =", "unknown key 'description'"),
    ('label = " 3 "', "", "every class needs a label"),
    ('label = " 3 "', 'label = "0"', "the label '0' is empty or of two classes"),
    ('word = " animals "', 'word = "0"', "the word '0' is empty or of two classes"),
    ('word = " animals "', 'word = " "', "the word '' is empty"),
    ("{text}", "it", "the task's prompt must have {text} once"),
    ("{text}", "{text} {text}", "prompt must have {text} once"),
    ("{classes}", "", "prompt must have {classes} once"),
    ('"Which shelf?\\nClasses:{classes}\\n\\nText: {text}"', "3", "prompt"),
    ("[[classes]]", "[[class]]", r"it needs one \[\[classes\]\] table"),
    ('label = " 3 "', "label = ", "Invalid value .at line"),
], ids=lambda s: s[:20])  # fmt: skip
def test_a_wrong_task_file_is_refused(old, new, message, tmp_path):
    assert old in TASK
    with pytest.raises(ValueError, match=f"task.toml: not a readable task: .*{message}"):
        read_task(tmp_path, TASK.replace(old, new))


def test_a_task_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "task.toml").write_bytes(TASK.replace("animals", "zoë").encode("latin-1"))
    with pytest.raises(ValueError, match="task.toml: not a readable task: 'utf-8' codec"):
        load_task(tmp_path)


# ------------------------------------------------------------------------------- samples

CROWD = [Example(f"text {i}", "abbcccccdd"[i * 7 % 10]) for i in range(200)]  # 20, 40, 100, 40


@pytest.mark.parametrize("n, counts", [
    (50, {"a": 5, "b": 10, "c": 25, "d": 10}),
    (20, {"a": 2, "b": 4, "c": 10, "d": 4}),
    (3, {"b": 1, "c": 1, "d": 1}),  # shares 0.3, 0.6, 1.5, 0.6: the largest remainders are 0.6
    (1, {"c": 1}),
    (199, {"a": 20, "b": 40, "c": 99, "d": 40}),  # shares 19.9, 39.8, 99.5, 39.8
])  # fmt: skip
def test_a_sample_has_the_size_and_shares_asked_for(n, counts):
    sample = stratified_sample(CROWD, n, seed=0)
    assert Counter(example.label for example in sample) == counts
    assert len(set(sample)) == n


def test_a_sample_keeps_the_order_and_depends_on_the_seed_alone():
    samples = [stratified_sample(CROWD, 50, seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    for sample in samples:
        assert sample == sorted(sample, key=CROWD.index)


def test_which_texts_are_drawn_does_not_depend_on_their_place():
    chosen = Counter(e for seed in range(200) for e in stratified_sample(CROWD, 50, seed))
    assert len(chosen) == len(CROWD)
    assert 20 < min(chosen.values()) and max(chosen.values()) < 80  # 50 expected, deviation 6


@pytest.mark.parametrize("n", [None, 200, 201])
def test_no_limit_or_a_large_one_takes_everything(n):
    assert stratified_sample(CROWD, n, seed=0) == CROWD


# ----------------------------------------------------------------------------- replacing


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_file_is_replaced_whole_or_not_at_all(mode, tmp_path):
    path, old, new = tmp_path / "result", "älter", "neuer"

    def write(file, text: str) -> None:
        file.write(text if mode == "w" else text.encode())

    with replacing(path, mode) as file:
        write(file, old)
        file.flush()
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == old
    with pytest.raises(KeyboardInterrupt), replacing(path, mode) as file:
        write(file, new)
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == old
    assert list(tmp_path.iterdir()) == [path]
    with open(path, encoding="utf-8") as reader:
        with replacing(path, mode) as file:
            write(file, new)
        assert reader.read() == old  # who had the old file open has it whole
    assert path.read_text(encoding="utf-8") == new
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write raises it, without a name
    for error, said in ((full, str(path)), (OSError("of another kind"), "of another kind")):
        with pytest.raises(OSError, match=re.escape(said)), replacing(path, mode):
            raise error
    assert list(tmp_path.iterdir()) == [path]

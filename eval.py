"""Score a run on a split, or classify texts with it.

    python eval.py runs/x                                   # the test split of its data
    python eval.py runs/x --data DIR --split validation --json result.json
    python eval.py runs/x --text "i am so happy for you" --text "leave me alone"
    python eval.py runs/x --predict texts.jsonl --out predictions.jsonl    # '-': stdin, stdout
    python eval.py --model DIR --data DIR                   # zero-shot: no run
    torchrun --nproc-per-node 2 eval.py runs/x ...          # each GPU, or CPU, takes its share

--predict reads .jsonl, .csv or .tsv, also .gz (stdin: JSON Lines), and writes one JSON object a
text, in input order: what --keep names, text, label, probabilities. It is streamed: a file may have
any size.
"""

import json
import os
import signal
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import deque
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from minislm import METHODS, Classifier, distributed, quant
from minislm.data import (
    class_indices,
    field,
    load_split,
    load_task,
    read_rows,
    replacing,
    stratified_sample,
    with_shots,
)  # fmt: skip
from minislm.methods import CALIBRATIONS, DTYPES, OPTIONS, POOLINGS, read_run
from minislm.metrics import report
from minislm.text import CHATS


def parse_arguments() -> Namespace:
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    methods = "; ".join(f"{name}: {method.about}" for name, method in METHODS.items())
    p.add_argument("run", nargs="?", help="a run folder that train.py wrote")
    p.add_argument("--model", help="model folder or hub id; with a run: where its model is now")
    p.add_argument("--data", help="data folder [the run's]")
    p.add_argument(
        "--split", default="test", choices=("train", "validation", "test"),
        help="a file of --data; train holds what train.py took for validation, too [test]",
    )  # fmt: skip
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    p.add_argument("--text", action="append", help="classify this text; may be given again")
    p.add_argument("--predict", metavar="FILE", help="classify a file of texts; - for stdin")
    p.add_argument("--out", metavar="FILE", default="-", help="of predictions, as JSON Lines [-]")
    p.add_argument(
        "--keep", action="append", default=[], metavar="COLUMN",
        help="copy it from --predict's file to the predictions, an id say; may be given again",
    )  # fmt: skip
    p.add_argument(
        "--eval-limit", type=int, default=0, help="a stratified sample of this many; 0: all [0]"
    )
    p.add_argument("--seed", type=int, default=0, help="of that sample and of --shots [0]")
    p.add_argument("--text-column", help="column of texts [the run's, else text]")
    p.add_argument("--label-column", help="column of labels [the run's, else label]")
    p.add_argument(
        "--dtype", default="auto", choices=("auto", *DTYPES),
        help="of the frozen weights; auto: the run's, or, without one or with another --quantize, "
        "bfloat16 where it is fast [auto]",
    )  # fmt: skip
    p.add_argument(
        "--quantize", choices=("none", *quant.KINDS),
        help="int8: fastest on x86 CPUs (with AMX only if compiled); nf4: the least memory, not "
        "for a run of full [the run's, else none]",
    )  # fmt: skip
    p.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, or one of several GPUs, as cuda:1 [cuda where there is one, else cpu]",
    )  # fmt: skip
    p.add_argument(
        "--compile", action="store_true",
        help="torch.compile the blocks: half a minute, then 1.0 to 1.4 times as fast (on a CPU "
        "with AMX, int8 1.5 to 2.2 times)",
    )  # fmt: skip
    p.add_argument(
        "--one-by-one", action="store_true",
        help="one text per batch: slower, and bitwise the same whatever other texts there are",
    )  # fmt: skip
    zero_shot = p.add_argument_group("zero-shot only (a run knows its own)")
    zero_shot.add_argument("--method", choices=METHODS, help=f"{methods} [sliced_head]")
    zero_shot.add_argument("--chat", choices=("auto", *CHATS), help="see train.py [auto]")
    zero_shot.add_argument("--max-text-tokens", type=int, help="cut longer texts [512]")
    zero_shot.add_argument("--instruction", help="in place of the method's own; none: without")
    zero_shot.add_argument("--pooling", choices=("auto", *POOLINGS), help="of embeddings [auto]")
    zero_shot.add_argument(
        "--bidirectional", action="store_const", const=True,
        help="let a decoder's tokens see the whole text",
    )  # fmt: skip
    zero_shot.add_argument("--shots", type=int, help="training examples per class in prompts [0]")
    zero_shot.add_argument(
        "--calibration", choices=CALIBRATIONS,
        help="fitted: on the validation file; contextual: on a text without content [none]",
    )  # fmt: skip
    a = p.parse_args()
    if not a.run and not (a.model and a.data):
        raise ValueError("give a run folder, or --model and --data for zero-shot (see --help)")
    own = [name for name in (*OPTIONS, "shots", "calibration") if getattr(a, name) is not None]
    if a.run and own:
        raise ValueError(f"--{own[0].replace('_', '-')} is for zero-shot; a run has its own")
    jobs = [f"--{name}" for name in ("text", "predict", "json") if getattr(a, name) is not None]
    if len(jobs) > 1:
        raise ValueError(f"{' and '.join(jobs)} are different jobs: give one of them")
    if (a.out != "-" or a.keep) and a.predict is None:
        raise ValueError("--out and --keep are for the predictions of --predict")
    if taken := {"text", "label", "probabilities"} & set(a.keep):
        raise ValueError(f"--keep {min(taken)}: predictions have one of that name; rename yours")
    if a.predict and a.out != "-" and Path(a.predict).resolve() == Path(a.out).resolve():
        raise ValueError(f"--out {a.out}: the texts are in it; name another file")
    if a.json == Path("-"):
        raise ValueError("--json -: name a file; the figures are printed in any case")
    if a.json and a.json.exists() and not a.json.is_file():
        raise ValueError(f"--json {a.json}: that is no regular file; name one")
    if a.json and not a.json.parent.is_dir():
        raise ValueError(f"--json {a.json}: there is no folder {a.json.parent}")
    if a.out.endswith((".gz", ".csv", ".tsv")):
        raise ValueError(f"--out {a.out}: predictions are written as plain JSON Lines: name it so")
    if (a.text or a.predict is not None) and (a.eval_limit or a.split != "test"):
        raise ValueError("--eval-limit and --split are for scoring, not for --text and --predict")
    if min(a.eval_limit, a.shots or 0) < 0:
        raise ValueError("--eval-limit and --shots must be at least 0")
    settings = read_run(Path(a.run))["settings"] if a.run else {}
    a.data = a.data or settings["data"]
    a.text_column = a.text_column or settings.get("text_column", "text")
    a.label_column = a.label_column or settings.get("label_column", "label")
    return a


def load_classifier(a: Namespace) -> Classifier:
    device = distributed.start(a.device)
    if a.run:
        return Classifier.load(a.run, a.dtype, device, a.model, a.quantize or "auto")
    given = {k: v for k in (*OPTIONS, "quantize") if (v := getattr(a, k)) is not None}
    task = load_task(Path(a.data), a.label_column)
    columns = a.text_column, a.label_column
    if a.shots:
        train = load_split(Path(a.data), "train", columns)
        class_indices(train, task, f"{a.data}, train")
        task = with_shots(task, train, a.shots, a.seed)
    clf = Classifier.zero_shot(a.model, task, a.dtype, device, **given)
    if a.calibration == "fitted":
        clf.calibrate("fitted", load_split(Path(a.data), "validation", columns))
    elif a.calibration == "contextual":
        clf.calibrate("contextual", [])
    return clf


def show(clf: Classifier, texts: list[str]) -> None:
    """Each text with its labels, most probable first."""
    for text, row in clf.stream(texts):
        print(text if len(text) <= 200 else f"{text[:200]} ... ({len(text):,} characters)")
        if clf.row.generates:
            print(f"  {clf.label(row) or 'no class'}")
            continue
        for i in (-row).argsort()[:10]:
            print(f"  {row[i]:6.1%}  {clf.labels[i]}")


def predict_file(clf: Classifier, a: Namespace) -> None:
    """Streams texts to a file of predictions, which appears only when it is complete."""
    stdin = a.predict == "-"
    if stdin and distributed.world_size() > 1:
        raise ValueError("--predict - reads stdin, which only one process can: give a file's name")
    if stdin:
        sys.stdin.reconfigure(encoding="utf-8-sig")
    if a.out == "-" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    path = Path("stdin.jsonl" if stdin else a.predict)
    kept = deque()  # of the texts on their way

    def texts():
        for number, row in read_rows(path, sys.stdin if stdin else None):
            if missing := [column for column in a.keep if column not in row]:
                have = ", ".join(map(str, row))
                raise ValueError(f"{path}, line {number}: --keep {missing[0]}: it has {have}")
            kept.append({column: row[column] for column in a.keep})
            yield field(row, a.text_column, path, number)

    total = 0
    if not stdin and path.is_file():  # a bad row is found at once, not after hours
        for total, _ in enumerate(texts(), 1):
            kept.clear()
    first = distributed.rank() == 0  # of torchrun's processes: the one that prints and writes
    to_screen = a.out == "-" or not first
    with (
        nullcontext(sys.stdout) if to_screen else replacing(Path(a.out)) as file,
        tqdm(
            desc="predict", total=total or None, unit=" texts", mininterval=0.5, disable=not first
        ) as bar,
    ):
        for text, row in clf.stream(texts(), bar=bar):
            line = kept.popleft() | {"text": text, "label": clf.label(row)}
            if not clf.row.generates:
                line["probabilities"] = {k: round(float(p), 6) for k, p in zip(clf.labels, row)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def score_split(clf: Classifier, a: Namespace) -> None:
    examples = load_split(Path(a.data), a.split, (a.text_column, a.label_column))
    if a.split == "train":  # without those that stand in the prompt
        examples = [example for example in examples if tuple(example) not in clf.task.shots]
        if not examples:
            raise ValueError(f"{a.data}, train: all its texts are shown in the prompt")
    everything, name = len(examples), f"{Path(a.data).name}, {a.split}"
    examples = stratified_sample(examples, a.eval_limit, a.seed)
    result = {"split": a.split, "sampled_from": everything, **clf.evaluate(examples, name)}
    sample = f", a stratified sample of {everything:,}" if len(examples) < everything else ""
    print(f"{a.run or a.model} on {a.data}, {a.split}: {len(examples):,} texts{sample}\n")
    print(report(result))
    if a.json and distributed.rank() == 0:
        with replacing(a.json) as file:
            json.dump(result, file, indent=2)


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # a screen may not know every character
    a = parse_arguments()
    clf = load_classifier(a)
    clf.one_by_one, clf.prompt.truncated = a.one_by_one, 0  # calibration may have cut some
    if a.compile:
        clf.compile()
    if a.text:
        show(clf, a.text)
    elif a.predict is not None:
        predict_file(clf, a)
    else:
        return score_split(clf, a)
    truncated = sum(distributed.all_gather(clf.prompt.truncated))
    if truncated and distributed.rank() == 0:
        limit = clf.prompt.max_text_tokens
        print(f"texts cut at {limit} tokens: {truncated}", file=sys.stderr)


if __name__ == "__main__":
    if "LOCAL_RANK" not in os.environ:  # torchrun's processes may be where no handler is called
        for name in ("SIGTERM", "SIGHUP"):  # leaves no half a file
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores the latter
                signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        main()
        print(end="", flush=True)  # here, where a reader that has gone is no surprise
    except BrokenPipeError:  # whoever read the output, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

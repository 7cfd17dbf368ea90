"""Methods side by side, on the same texts, with intervals, tests and costs.

    python benchmarks/compare.py --model DIR --data DIR --methods sliced_head,tfidf
        [--encoder DIR] [--embedder DIR] [--out FOLDER] [--seeds 3] [--epochs 3]
        [--limit 1000] [--eval-limit 500]
        [--lr published | 3e-4 | sliced_head=5e-4,letters=2e-4] [--lr-search 1e-4,3e-4,1e-3]
        [--curve 8,32,128,512] [--jobs 2] [--threads 4] [--device cpu] [--dtype bfloat16]
        [--text-column text] [--label-column label] [--plot FILE.png]
        [--table-only] [--for METHOD="OPTIONS"] [-- TRAIN.PY'S OPTIONS]

A cell is a method, a seed (and a number of examples per class): train.py, then eval.py --predict,
each a process of its own. METHOD:zero is without training. Methods without gradients run one seed.
The same command again goes on: finished cells (cell.json) stay, killed ones resume.

- Texts: drawn once, with seed 0, so seeds change initialisation and order, not the sample (but an
  --eval-limit after -- draws its validation texts by seed). train.py sees no test text: FOLDER/data
  holds train and validation, FOLDER/test.jsonl the test texts.
- Learning rates of --lr-search, for methods without an --lr, are chosen by seed 0's validation
  macro-F1.
- Intervals and tests: benchmarks/significance.py. McNemar's test compares the first seeds.
- training: wall time of train.py as a whole, with loading and validations; not of resumed cells.
- texts/s: eval.py's progress bar at its end, from first text to last, without loading the model.
- peak GB: of the processes' main memory (wait4's ru_maxrss), training / inference.
"""

import json
import platform
import re
import shlex
import signal
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from compare_cells import EMBEDDERS, ROOT, Cell, run_cells, usable_cores, write_json
from compare_report import analyse, curve_table, load_matplotlib, plot, table, verdict

from minislm.data import Example, Task, class_indices, find_split, replacing, stratified_sample
from minislm.methods import METHODS, OPTIONS
from minislm.weights import read_json, sha256

sys.path.append(str(ROOT))
from train import Settings, claim, commit, load_data

PUBLISHED_LR = 5e-5


def separated(kind):
    def numbers(text: str) -> list:
        return [kind(part.strip()) for part in text.split(",")]

    return numbers


def parse_arguments() -> Namespace:
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="folder or hub id")
    p.add_argument("--encoder", help="the model of encoder_mlp")
    p.add_argument("--embedder", help=f"the model of {', '.join(sorted(EMBEDDERS))} [--model]")
    p.add_argument("--data", required=True, type=Path, help="data folder, with a test file")
    p.add_argument("--methods", required=True, type=separated(str), help="METHOD[:zero],...")
    p.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1 [3]")
    p.add_argument("--out", type=Path, help="folder of cells and table [runs/compare-DATA]")
    p.add_argument("--limit", type=int, default=0, help="training texts [all]")
    p.add_argument("--eval-limit", type=int, default=0, help="validation and test texts [all]")
    p.add_argument("--text-column", default="text", help="of --data [text]")
    p.add_argument("--label-column", default="label", help="of --data [label]")
    p.add_argument("--lr", default="", help="published (5e-5), RATE, METHOD=RATE,... [train.py's]")
    p.add_argument("--lr-search", type=separated(float), default=[], help="rates to choose from")
    p.add_argument("--epochs", type=int, help="[train.py's]")
    p.add_argument("--curve", type=separated(int), default=[], help="also train on so many a class")
    p.add_argument("--dtype", help="of the frozen weights [train.py's]")
    p.add_argument("--device", help="cpu or cuda [a GPU, where there is one]")
    p.add_argument("--threads", type=int, default=len(usable_cores()), help="in all [%(default)s]")
    p.add_argument("--jobs", type=int, default=1, help="cells at once, sharing the threads [1]")
    p.add_argument("--table-only", action="store_true", help="of finished cells; run nothing")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="needs matplotlib")
    p.add_argument(
        "--for", dest="own", action="append", default=[], metavar='METHOD="OPTIONS"',
        help='of one method alone: --for encoder_mlp="--head-lr 5e-3"',
    )  # fmt: skip
    p.add_argument("train", nargs="*", help="after --: more options for train.py")
    a = p.parse_args()
    a.out = a.out or Path("runs") / f"compare-{a.data.resolve().name}"
    for name in ("seeds", "threads", "jobs"):
        if getattr(a, name) < 1:
            raise ValueError(f"--{name} must be at least 1")
    if min(a.limit, a.eval_limit) < 0:
        raise ValueError("--limit and --eval-limit must be at least 0")
    a.cores = usable_cores()[: a.threads]
    if len(a.cores) < max(a.threads, a.jobs):
        raise ValueError(
            f"--threads {a.threads}, --jobs {a.jobs}: a job needs a thread, and each a core of "
            f"the {len(usable_cores())} there are"
        )
    known = [*METHODS, *(f"{m}:zero" for m, row in METHODS.items() if row.ready)]
    if odd := [m for m in a.methods if m not in known]:
        raise ValueError(f"--methods: {odd[0]!r} is not one of {', '.join(known)}")
    if len(set(a.methods)) < len(a.methods):
        raise ValueError("--methods: one is there twice")
    given, a.own = a.own, {}
    for m, _, options in (x.partition("=") for x in given):
        a.own[m] = a.own.get(m, []) + shlex.split(options)
    if odd := a.own.keys() - set(a.methods):
        raise ValueError(f"--for: {min(odd)!r} is not one of --methods")
    prompts = {f"--{n.replace('_', '-')}" for n in (*OPTIONS, "shots", "calibration")}
    for m in (m for m in a.methods if not Cell(m, 0).trains):  # they are eval.py's, too
        given, own = ({x.partition("=")[0] for x in y} for y in (a.train, a.own.get(m, [])))
        if missed := prompts & given - own:
            raise ValueError(f"{min(missed)} after -- is train.py's: say --for {m}=... as well")
    more = {x.partition("=")[0] for part in (a.train, *a.own.values()) for x in part}
    if odd := more & {f"--{n}" for n in "device seed limit method model data out lr".split()}:
        raise ValueError(f"{min(odd)} after -- or in --for is train.py's: give compare.py's own")
    if not a.encoder and any(m.startswith("encoder_mlp") for m in a.methods):
        raise ValueError("encoder_mlp needs --encoder, its model folder")
    if a.plot:
        load_matplotlib()  # without it, say so before the work
    a.rates, learning = dict.fromkeys(a.methods), [m for m in a.methods if Cell(m, 0).random]
    for part in filter(None, a.lr.split(",")):
        method, _, rate = part.rpartition("=")
        if method and method not in learning:
            raise ValueError(f"--lr: {method!r} is not one of --methods that has a learning rate")
        for m in [method] if method else learning:
            try:
                a.rates[m] = PUBLISHED_LR if rate == "published" else float(rate)
            except ValueError:
                raise ValueError(f"--lr: {rate!r} is no number") from None
    if min([lr for lr in a.rates.values() if lr is not None] + a.lr_search + [1]) <= 0:
        raise ValueError("--lr and --lr-search: a learning rate is above 0")
    if min([*a.curve, 1]) < 1:
        raise ValueError("--curve: at least 1 example a class")
    for name in ("model", "encoder", "embedder"):  # found again from another working directory
        if getattr(a, name) and Path(getattr(a, name)).is_dir():
            setattr(a, name, str(Path(getattr(a, name)).resolve()))
    return a


# The texts


def write_examples(path: Path, examples: list[Example]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.writelines(json.dumps(e._asdict(), ensure_ascii=False) + "\n" for e in examples)


def as_toml(value: str | tuple[str, ...]) -> str:
    """TOML's strings, and arrays of them, are JSON's, but for surrogates and DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def few_a_class(examples: list[Example], n: int) -> list[Example]:
    """n examples of each class, in file order; more hold those that fewer do."""
    rows, order = defaultdict(list), np.random.default_rng(0).permutation(len(examples))
    for i in order:
        rows[examples[i].label].append(i)
    label = min(rows, key=lambda label: len(rows[label]))
    if len(rows[label]) < n:
        raise ValueError(f"--curve {n}: {label!r} has {len(rows[label])} training examples")
    return [examples[i] for i in sorted(i for found in rows.values() for i in found[:n])]


def prepare(a: Namespace) -> tuple[Task, list, dict]:
    """Writes the samples into the folder; returns task, test sample, and its origin."""
    own = {name: getattr(a, name) for name in ("text_column", "label_column", "eval_limit")}
    task, sample, available = load_data(Settings(data=str(a.data), **own))
    if not sample["test"]:
        raise ValueError(f"{a.data}: no test file to compare on")
    everything = sample["train"]  # a curve draws from all
    sample["train"] = stratified_sample(everything, a.limit, 0)
    files = [*(find_split(a.data, name) for name in sample), a.data / "task.toml"]
    drawn = {
        "data": a.data.resolve().name, "seed": 0, "columns": [a.text_column, a.label_column],
        "examples": {k: len(v) for k, v in sample.items()}, "sampled_from": available,
        "sha256": {path.name: sha256(path) for path in files if path and path.exists()},
    }  # fmt: skip
    record = a.out / "sample.json"
    if record.exists() and (old := read_json(record)) != drawn:
        key = next(k for k in drawn if drawn[k] != old.get(k))
        change = f"its {key} was {old.get(key)} and is now {drawn[key]}"
        raise ValueError(f"{a.out}: {change}; choose another --out")
    toml = f"prompt = {as_toml(task.prompt)}\n" if task.prompt is not None else ""
    keys = ("label", "word", "meaning", "synonyms")
    for values in zip(task.labels, task.words, task.meanings, task.synonyms):
        rows = [f"{key} = {as_toml(value)}\n" for key, value in zip(keys, values)]
        toml += "\n[[classes]]\n" + "".join(rows)
    for n in (0, *a.curve):
        folder = a.out / (f"data-{n}" if n else "data")
        train = few_a_class(everything, n) if n else sample["train"]
        write_examples(folder / "train.jsonl", train)
        write_examples(folder / "validation.jsonl", sample["validation"])
        (folder / "task.toml").write_text(toml, encoding="utf-8")
    write_examples(a.out / "test.jsonl", sample["test"])
    write_json(record, drawn)
    return task, sample["test"], drawn


def choose_rates(a: Namespace, task: Task, truth: np.ndarray, failed: dict) -> None:
    """Sets each method's rate to the one with which seed 0 does best on validation."""
    a.searched = [m for m in a.rates if Cell(m, 0).random and a.rates[m] is None]
    search = [Cell(m, 0, lr) for m in a.searched for lr in a.lr_search]
    print(f"learning rates: {len(search)} cells")
    results = run_cells(search, a, task, truth, failed)
    for m in a.searched:
        scores = {c.lr: r["training"]["validation"] for c, r in results.items() if c.method == m}
        a.rates[m] = max(scores, key=scores.get, default=None)
        if scores:
            print(f"{m}: " + ", ".join(f"{lr:g} {f1:.3f}" for lr, f1 in scores.items()))
    a.methods = [m for m in a.methods if m not in a.searched or a.rates[m]]


def hardware(device: str | None) -> str:
    """The processor, and the GPU if figures may be of one."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"model name\s*: (.*)", info) or [platform.processor() or "unknown CPU"]
    count = 0 if device == "cpu" else torch.cuda.device_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(count)]
    return ", ".join([*gpus, names[0]])


def notes(a: Namespace, drawn: dict, rows: dict, cells: list[dict]) -> list[str]:
    """What stands beneath the table: samples, models, machine, rates, command."""

    def all_of(key: str) -> str:
        found = [part[key] for cell in cells for part in (cell["training"], cell) if key in part]
        return ", ".join(sorted(map(str, set(found)))) or "unknown"

    def short(method: str, row: dict) -> bool:
        return row["seeds"] < a.seeds and Cell(method, 0).random

    of = drawn["sampled_from"]
    many = [f"{n:,} {split} (of {of[split]:,})" for split, n in drawn["examples"].items()]
    models = {"model": a.model, "encoder": a.encoder, "embedder": a.embedder}
    lines = [
        f"- data: {drawn['data']}; {', '.join(many)} texts, drawn once: the intervals are "
        "over test texts and seeds, not over training samples",
        f"- seeds: {', '.join(map(str, range(a.seeds)))}; without gradients or training: 0"
        + "".join(f"; {m}: only {r['seeds']}" for m, r in rows.items() if short(m, r)),
        f"- {'; '.join(f'{k}: {Path(v).name}' for k, v in models.items() if v)}",
        f"- hardware: {all_of('hardware')}; threads per cell: {all_of('threads')}; "
        f"{all_of('jobs')} at once; torch {all_of('torch')}; commit {all_of('commit')}",
    ]
    if a.lr_search:
        rates = sorted(a.lr_search)
        at_end = [m for m in a.searched if m in rows and a.rates[m] in (rates[0], rates[-1])]
        lines.append(
            f"- learning rates: of {', '.join(f'{lr:g}' for lr in rates)}, that of seed 0's best "
            f"validation macro-F1; at an end of these: {', '.join(at_end) or 'none'}"
        )
    return [*lines, f"- command: python {shlex.join(sys.argv)}"]


def main() -> None:
    a = parse_arguments()
    a.out = a.out.resolve()
    a.where = {"commit": commit(), "hardware": hardware(a.device), "torch": torch.__version__}
    a.where |= {"threads": len(a.cores) // a.jobs, "jobs": a.jobs}
    task, test, drawn = prepare(a)
    truth, failed = np.array(class_indices(test, task, "test")), {}
    lock = open(a.out / "lock", "ab")  # until the process ends
    if not a.table_only:
        claim(a.out, lock)
    if a.lr_search:
        choose_rates(a, task, truth, failed)
    cells = [
        Cell(m, seed, a.rates[m], n)
        for n in (0, *a.curve) for seed in range(a.seeds) for m in a.methods
        if (Cell(m, 0).random or seed == 0) and (Cell(m, 0).trains or n == 0)
    ]  # fmt: skip
    results = run_cells(cells, a, task, truth, failed)
    groups = {n: defaultdict(list) for n in (0, *a.curve)}
    for cell, result in results.items():
        groups[cell.per_class][cell.method].append(result | {"folder": str(a.out / cell.name)})
    if not groups[0]:
        raise ValueError(f"no cell succeeded: {next(iter(failed.values()), 'none was run')}")
    points = {n: analyse(g, truth, task.labels) for n, g in groups.items() if g}
    rows = points[0]
    curve = {m: {n: r[m]["macro_f1"] for n, r in points.items() if m in r} for m in rows}
    text = [verdict(rows), "", table(rows), ""]
    text += [curve_table(curve, drawn["examples"]["train"]), ""] if a.curve else []
    text += notes(a, drawn, rows, list(results.values()))
    text += [f"- failed: {cell.name}: {line}" for cell, line in failed.items()]
    (a.out / "table.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    write_json(a.out / "results.json", {"methods": rows, "curve": curve, "sample": drawn})
    print("\n" + "\n".join(text))
    if a.plot:
        plot(a.plot, rows, curve if a.curve else {}, task.labels)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # progress is for reading as it comes
    for name in ("SIGTERM", "SIGHUP"):  # the cells are sessions of their own: they must be told
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores the latter
            signal.signal(number, signal.default_int_handler)
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        sys.exit(130)

"""The cells of a comparison: which there are, and how each is run, timed and gone on with.

A cell's folder is its run folder, with cell.json once it is complete: arguments, commit, threads,
times, memory, figures; train.log and predict.log hold what the scripts printed.
"""

import functools
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from compare_report import read_predictions
from significance import FIGURES, figures

from minislm.data import Task, replacing
from minislm.methods import METHODS
from minislm.weights import hashes, read_json

ROOT = Path(__file__).resolve().parent.parent
EMBEDDERS = {"similarity", "nearest", "logistic", "prototypes"}
RATE = re.compile(r"([\d.]+) texts/s\]|([\d.]+)s/ texts\]")  # of the progress bar
TRAINED = re.compile(r"of which ([\d,]+) are trained")
# A process's ru_maxrss begins at the memory of the process that starts it, and this one has loaded
# torch: a small process between them starts the script, waits, and writes status and peak. Where
# this one is killed it stops the script, as Ctrl-C does: nothing else would.
LAUNCH = """
import os, signal, sys
signal.signal(signal.SIGINT, lambda *_: None)  # the script decides what Ctrl-C does
parent, pid = os.getppid(), os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
def look(*_):
    if os.getppid() != parent:
        signal.setitimer(signal.ITIMER_REAL, 0)  # once
        os.kill(pid, signal.SIGINT)
signal.signal(signal.SIGALRM, look)
signal.setitimer(signal.ITIMER_REAL, 1, 1)  # seconds
_, status, usage = os.wait4(pid, 0)
kilobyte = 1 if sys.platform == "darwin" else 1024
with open(sys.argv[1], "w") as file:
    print(os.waitstatus_to_exitcode(status), usage.ru_maxrss * kilobyte, file=file)
"""


@dataclass(frozen=True)
class Cell:
    method: str  # of train.py, or METHOD:zero
    seed: int
    lr: float | None = None  # None: train.py's
    per_class: int = 0  # training examples per class; 0: the --limit sample

    @property
    def name(self) -> str:
        rate = f"-lr{self.lr:g}" if self.lr else ""
        few = f"-n{self.per_class}" if self.per_class else ""
        return f"{self.method.replace(':', '-')}{rate}{few}-seed{self.seed}"

    @property
    def base(self) -> str:
        return self.method.partition(":")[0]

    @property
    def trains(self) -> bool:
        return not self.method.endswith(":zero")

    @property
    def random(self) -> bool:
        """Whether seeds, rates and epochs mean anything."""
        return self.trains and METHODS[self.base].trains != "fit"


def usable_cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def arguments(cell: Cell, a: Namespace) -> list[str]:
    """The cell's options of train.py or, without training, of eval.py; without --data and --out."""
    model = a.encoder if cell.base == "encoder_mlp" else a.model
    model = a.embedder or a.model if cell.base in EMBEDDERS else model
    given = {"method": cell.base, "model": model, "dtype": a.dtype, "device": a.device}
    if cell.trains:
        given["seed"] = cell.seed
    if cell.random:
        given |= {"epochs": a.epochs, "lr": cell.lr}
    listed = [x for k, v in given.items() if v is not None for x in (f"--{k}", str(v))]
    return listed + a.train * cell.trains + a.own.get(cell.method, [])


weights_of = functools.cache(hashes)  # of a model's files


def origin(cell: Cell, a: Namespace) -> dict:
    """What a cell's results come from: its options, and the files of its model."""
    given = arguments(cell, a)
    model = given[given.index("--model") + 1]
    return {"arguments": given, "weights": weights_of(model) if cell.base != "tfidf" else {}}


def run_process(command: list, log: Path, cores: list[int], running: set) -> tuple[float, int]:
    """Runs a script of the project on some cores; returns its seconds and its peak bytes.

    Raises ValueError where it failed, with the last line of what it printed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(len(cores))}
    usage = log.with_suffix(".usage")
    with open(log, "wb") as file:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-ISc", LAUNCH, usage, sys.executable, *map(str, command)],
            env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, cores)  # before it starts the script
        running.add(process)
        process.wait()
        seconds = time.perf_counter() - began
        running.remove(process)
    status, peak = map(int, usage.read_text().split()) if usage.exists() else (-9, 0)
    usage.unlink(missing_ok=True)
    if status:
        lines = re.split(r"[\r\n]+", log.read_text(errors="replace").strip())
        killed = f"killed by signal {-status}; " if status < 0 else ""
        raise ValueError(f"{killed}{lines[-1] or 'it printed nothing'} ({log})")
    return seconds, peak


def write_json(path: Path, content: dict) -> dict:
    with replacing(path) as file:
        json.dump(content, file, indent=2)
    return content


def run_cell(cell: Cell, a: Namespace, task: Task, truth: np.ndarray, cores, running: set) -> dict:
    """Runs what is not yet done of a cell; returns its cell.json."""
    folder, given = a.out / cell.name, arguments(cell, a)
    trained = folder / "training.json"
    data = ["--data", a.out / (f"data-{cell.per_class}" if cell.per_class else "data")]
    training = {"seconds": None, "peak_bytes": 0, "trained": 0, "lr": None}
    if cell.trains and trained.exists():
        training = read_json(trained)
    elif cell.trains:
        resumed = (folder / "checkpoint.pt").exists()
        if not resumed:
            shutil.rmtree(folder, ignore_errors=True)  # killed before there was anything to go on
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "begun.json", origin(cell, a))
        script, log = ROOT / "train.py", folder / "train.log"
        command = [script, *given, *data, "--out", folder, *["--resume"] * resumed]
        seconds, peak = run_process(command, log, cores, running)
        said = TRAINED.search(log.read_text())[1]
        entries = map(json.loads, (folder / "metrics.jsonl").open())
        training = write_json(trained, a.where | origin(cell, a) | {
            "resumed": resumed, "seconds": None if resumed else seconds,
            "peak_bytes": peak, "trained": int(said.replace(",", "")),
            "lr": read_json(folder / "config.json")["settings"]["lr"] if cell.random else None,
            "validation": max(e["validation"]["macro_f1"] for e in entries if "validation" in e),
        })  # fmt: skip
    folder.mkdir(exist_ok=True)
    of = [folder, *["--device", a.device] * bool(a.device)] if cell.trains else [*given, *data]
    command = [ROOT / "eval.py", *of, "--predict", a.out / "test.jsonl"]
    command += ["--out", folder / "predictions.jsonl"]
    seconds, peak = run_process(command, folder / "predict.log", cores, running)
    rates = RATE.findall((folder / "predict.log").read_text())
    fast, slow = rates[-1] if rates else ("", "")  # texts/s, s/text
    speed = float(fast) if fast else 1 / float(slow) if slow else None
    predicted, _ = read_predictions(folder / "predictions.jsonl", task.labels, len(truth))
    found = figures(truth, predicted[None], len(task.labels)).ravel().tolist()
    return write_json(folder / "cell.json", a.where | origin(cell, a) | {
        "cell": asdict(cell), "training": training, "texts_per_s": speed,
        "predict_seconds": seconds, "predict_peak_bytes": peak, **dict(zip(FIGURES, found)),
    })  # fmt: skip


def run_cells(
    cells: list[Cell], a: Namespace, task: Task, truth: np.ndarray, failed: dict[Cell, str]
) -> dict[Cell, dict]:
    """Runs the cells, --jobs at a time; returns those that succeeded, each with its cell.json."""
    results, cells = {}, [*dict.fromkeys(cells)]  # a rate may be given twice
    for cell in cells:
        names = ["training.json", "cell.json"]
        if (a.out / cell.name / "checkpoint.pt").exists():
            names.insert(0, "begun.json")  # it goes on as it began
        paths = [a.out / cell.name / name for name in names]
        for path in filter(Path.exists, paths):
            was, given = read_json(path), arguments(cell, a)
            if was["arguments"] != given:
                raise ValueError(
                    f"{path}: it was run with {shlex.join(was['arguments'])}, and is now to be run "
                    f"with {shlex.join(given)}; choose another --out"
                )
            known = "weights" in was and not a.table_only
            if known and was["weights"] != origin(cell, a)["weights"]:
                raise ValueError(f"{path}: its model's files are others now; choose another --out")
        if paths[-1].exists():
            results[cell] = read_json(paths[-1])
    todo = [] if a.table_only else [cell for cell in cells if cell not in results]
    times, running = defaultdict(list), set()
    share, slots = len(a.cores) // a.jobs, queue.SimpleQueue()
    for job in range(a.jobs):
        slots.put(a.cores[job * share : (job + 1) * share])

    def timed(cell: Cell) -> tuple[dict, float]:
        cores, began = slots.get(), time.perf_counter()
        try:
            return run_cell(cell, a, task, truth, cores, running), time.perf_counter() - began
        finally:
            slots.put(cores)

    def expected(cell: Cell) -> float:
        """Seconds: of the method's cells of that size, or of any, or of any method's."""
        of_method = [t for (method, _), ts in times.items() if method == cell.method for t in ts]
        every = [t for ts in times.values() for t in ts]
        return np.mean(times.get((cell.method, cell.per_class)) or of_method or every)

    if results:
        print(f"{len(results)} of {len(cells)} cells are finished already")
    pool = ThreadPoolExecutor(a.jobs)
    futures = {pool.submit(timed, cell): cell for cell in todo}
    try:
        for i, future in enumerate(as_completed(futures), 1):
            cell, left = futures.pop(future), ""
            try:
                results[cell], seconds = future.result()
                times[cell.method, cell.per_class].append(seconds)
                wait = sum(map(expected, futures.values())) / a.jobs
                left = f"   about {wait / 60:.0f} min left" if futures else ""
                said = f"macro-F1 {results[cell]['macro_f1']:.3f}   {seconds:.0f} s"
            except (ValueError, OSError) as error:
                failed[cell] = str(error)
                said = f"failed: {error}"
            print(f"[{i}/{len(todo)}] {cell.name:<24} {said}{left}", flush=True)
    finally:  # Ctrl-C: training stops after its step, with a checkpoint
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGINT)
        pool.shutdown()
    return {cell: results[cell] for cell in cells if cell in results}

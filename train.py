"""Fine-tune a small language model as a classifier.

    python train.py                                     # the bundled model on the bundled data
    python train.py --model DIR --data DIR --out runs/x
    python train.py --model DIR --data DIR --out runs/x --resume
    torchrun --nproc-per-node 2 train.py ...            # the same run, on several GPUs or CPUs

By default LoRA adapters (and the method's own head, if it has one) are trained by cross-entropy on
the class scores; what does best on the validation split is kept and scored on the test split.
Ctrl-C, or a closed terminal, stops after the current step; a run that was stopped or killed
continues with --resume, and on one kind of CPU, with as many threads and without --compile, ends
with the same bytes as one that never stopped.
"""

import inspect
import json
import math
import os
import pickle
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import count
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder are not noticed
    fcntl = None

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import minislm
from minislm import METHODS, Classifier, distributed, lora, metrics
from minislm.data import (
    Example,
    Task,
    class_indices,
    find_split,
    load_split,
    load_task,
    replacing,
    stratified_sample,
    with_shots,
)  # fmt: skip
from minislm.decoder import Decoder
from minislm.graphs import Replayed
from minislm.methods import CALIBRATIONS, DTYPES, OPTIONS, POOLINGS, choose_dtype, read_run
from minislm.metrics import report
from minislm.packing import common_prefix
from minislm.quant import NF4Linear
from minislm.text import CHATS
from minislm.weights import hashes, read_json, sha256

HERE = Path(__file__).resolve().parent
BUNDLED, DESK = HERE / "weights" / "tiny", HERE / "examples" / "desk"
FIGURES = ("accuracy", "macro_f1", "weighted_f1", "n")  # of metrics.jsonl
WEIGHTS = [f"{n}.safetensors" for n in ("adapter_model", "model", "head", "calibration")]
WRITTEN = ("config.json", "test.json", "checkpoint.pt", "adapter_config.json", *WEIGHTS)


class AdamW(torch.optim.AdamW):
    """PyTorch's, without the wrappers around its methods: they import the compiler, 2 s, 60 MB."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)


def setting(default, help: str, choices=None, low=0, below=math.inf):
    """A field of Settings; low, below: the bounds of a number."""
    shown = help if default == "" or isinstance(default, bool) else f"{help} [{default}]"
    told = {"help": shown, "choices": choices}
    return field(default=default, metadata={"told": told, "bounds": (low, below)})


@dataclass(frozen=True)
class Settings:
    model: str = setting(str(BUNDLED), "model folder in Hugging Face layout, or hub id (org/name)")
    data: str = setting(str(DESK), "folder with train, validation, test files")
    method: str = setting(
        "sliced_head", "; ".join(f"{k}: {m.about}" for k, m in METHODS.items()), tuple(METHODS)
    )
    out: str = setting("", "run folder; empty: the first free of runs/DATA-1, runs/DATA-2, ...")
    epochs: int = setting(3, "passes over the training examples (bundled model: 8)", low=1)
    max_steps: int = setting(0, "stop after this many optimizer steps; 0: after the epochs")
    batch_size: int = setting(8, "examples per step, over all processes", low=1)
    micro_batch: int = setting(0, "examples per pass, their gradients accumulated; 0: all at once")
    recompute: bool = setting(False, "compute a decoder's blocks twice: slower, less memory")
    lr: float = setting(5e-5, "peak; adapters want 5e-4 to 4e-3 (bundled: 4e-3, with full 5e-4)")
    head_lr: float = setting(0.0, "peak learning rate of the method's own head; 0: that of --lr")
    warmup: float = setting(0.0, "share of the steps over which the learning rate rises", below=1)
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay")
    clip: float = setting(1.0, "largest norm of the gradient; 0: not clipped")
    lora_rank: int = setting(16, "r, the adapters' rank", low=1)
    lora_alpha: float = setting(32.0, "alpha; the adapters are scaled by alpha / r")
    lora_dropout: float = setting(0.05, "dropout before the adapters", below=1)
    evals_per_epoch: int = setting(4, "validations per epoch, at least (or one per step)", low=1)
    patience: int = setting(0, "stop after this many validations without a better one; 0: never")
    limit: int = setting(0, "train on a stratified sample of this many examples; 0: all")
    eval_limit: int = setting(0, "validate and test on this many texts each; 0: all")
    max_text_tokens: int = setting(512, "longer texts are cut at their end, and counted", low=1)
    chat: str = setting(
        "auto",
        "chatml, qwen3 (ChatML without thinking), granite, none (a base model); auto: the model's",
        ("auto", *CHATS),
    )
    instruction: str = setting(
        "auto", "in place of the method's own (auto; a base model has none); none: without"
    )
    shots: int = setting(0, "training examples per class to show in prompts that list the classes")
    pooling: str = setting(
        "auto", "of embeddings; auto: the encoder's own, decoders: last", ("auto", *POOLINGS)
    )
    bidirectional: bool = setting(False, "let a decoder's tokens see the whole text")
    calibration: str = setting(
        "none",
        "of the probabilities; fitted: on validation; contextual: from a text without content",
        CALIBRATIONS,
    )
    text_column: str = setting("text", "the data's column of texts")
    label_column: str = setting("label", "the data's column of labels")
    seed: int = setting(0, "of adapters, order, dropout and samples", below=2**32)
    dtype: str = setting(
        "auto", "of the frozen weights; auto: bfloat16 where it is fast (bundled, full: float32)",
        ("auto", *DTYPES),
    )  # fmt: skip
    quantize: str = setting("none", "nf4: frozen weights in 4 bits (QLoRA)", ("none", "nf4"))
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, or cuda:1")
    compile: bool = setting(False, "torch.compile a decoder's blocks: a minute or two, then faster")
    resume: bool = setting(False, "go on with the run in --out")


def parse_settings() -> Settings:
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    for f in fields(Settings):
        flag = "--" + f.name.replace("_", "-")
        if f.type is bool:
            p.add_argument(flag, action="store_true", help=f.metadata["told"]["help"])
        else:
            p.add_argument(flag, type=f.type, default=f.default, **f.metadata["told"])
    known = p.parse_known_args()[0]
    if known.resume and not known.out:
        raise ValueError("--resume needs --out, the run folder to go on with")
    if Path(known.model).resolve() == BUNDLED:  # five million parameters want larger steps
        p.set_defaults(epochs=8, lr=5e-4 if METHODS[known.method].trains == "full" else 4e-3)
    if known.resume and (Path(known.out) / "config.json").exists():
        begun = read_run(Path(known.out))["settings"]
        if odd := begun.keys() - vars(known).keys():
            problem = f"began with {min(odd)}, which is no setting of this version"
            raise ValueError(f"{known.out}: {problem}")
        p.set_defaults(**begun)
    s = Settings(**vars(p.parse_args()))
    for f in fields(Settings):
        value, (low, below) = getattr(s, f.name), f.metadata["bounds"]
        if f.type in (int, float) and not low <= value < below:  # nan is in no range
            flag, end = f.name.replace("_", "-"), f" and below {below}" * (below < math.inf)
            raise ValueError(f"--{flag} must be a finite number, at least {low}{end}, not {value}")
    row = METHODS[s.method]
    if s.calibration != "none" and row.generates:
        raise ValueError(f"--calibration: {s.method} has no probabilities to calibrate")
    if s.quantize != "none" and row.trains != "lora":
        raise ValueError(f"--quantize {s.quantize} is for adapters; {s.method} has none")
    # a run must be found again from another working directory
    paths = {"model": Path(s.model), "data": Path(s.data)}
    folders = {k: str(path.resolve()) for k, path in paths.items() if path.is_dir()}
    # bfloat16 gains nothing with so few parameters, and loses full's updates of a thousandth
    small = s.dtype == "auto" and (row.trains == "full" or Path(s.model).resolve() == BUNDLED)
    return replace(s, dtype="float32" if small else choose_dtype(s.dtype, s.device), **folders)


def run_folder(s: Settings) -> Path:
    """The folder of this run, checked before any work is done."""
    numbered = (Path(f"runs/{Path(s.data).name}-{i}") for i in count(1))
    out = Path(s.out) if s.out else next(path for path in numbered if not path.exists())
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file, where the run's folder is to be")
    if s.resume and not (out / "config.json").exists():
        raise ValueError(f"{out}: no run there to resume")
    log = out / "metrics.jsonl"
    # a step above 0 is logged once there is a checkpoint, which is removed when the run ends
    logged = log.read_text() if log.exists() else ""
    trained = re.search(r'"step": [1-9]', logged)
    ended = trained and not (out / "checkpoint.pt").exists()
    if METHODS[s.method].trains == "fit":  # at once: if stopped before its test, it begins anew
        ended = (out / "test.json").exists()
    if s.resume and ended:
        raise ValueError(f"{out}: that run is finished (there is no checkpoint to go on from)")
    held = [name for name in WRITTEN if (out / name).exists()] + [log.name] * bool(logged)
    if not s.resume and held:
        remedy = "go on with --resume, or choose another --out"
        raise ValueError(f"{out}: holds a run already ({held[0]}); {remedy}")
    return out


def claim(out: Path, log_file) -> None:
    """Takes the run's folder for this process, until it ends."""
    try:
        if fcntl:
            fcntl.lockf(log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{out}: another process is training there") from None
    except OSError:  # a file system without locks
        pass


def commit() -> str:
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # there is no git
        return "unknown"


def load_data(s: Settings) -> tuple[Task, dict[str, list[Example]], dict[str, int]]:
    """The task, the examples per split, and how many each split has without the limits."""
    folder, columns = Path(s.data), (s.text_column, s.label_column)
    splits = {"train": load_split(folder, "train", columns)}
    task = load_task(folder, s.label_column)
    for name in ("validation", "test"):
        splits[name] = load_split(folder, name, columns) if find_split(folder, name) else []
    if not splits["validation"]:
        train, why = splits["train"], f"{folder}: no validation file"
        if len(train) < 10:
            raise ValueError(f"{why}, and too few training examples to take any")
        splits["validation"] = stratified_sample(train, len(train) // 10, s.seed)
        chosen = set(map(id, splits["validation"]))
        splits["train"] = [example for example in train if id(example) not in chosen]
        print(f"{why}, so a tenth of train ({len(chosen)} texts) serves as one")
    for name, examples in splits.items():
        class_indices(examples, task, f"{folder}, {name}")
    limits = {"train": s.limit, "validation": s.eval_limit, "test": s.eval_limit}
    samples = {k: stratified_sample(v, limits[k], s.seed) for k, v in splits.items()}
    if s.shots:  # shown in every prompt, so no longer trained on
        task = with_shots(task, samples["train"], s.shots, s.seed)
        shown = set(map(id, task.shots))
        samples["train"] = [example for example in samples["train"] if id(example) not in shown]
        if not samples["train"]:
            raise ValueError(f"--shots {s.shots} leaves no training example: show fewer")
    return task, samples, {name: len(examples) for name, examples in splits.items()}


def record(s: Settings, clf: Classifier, splits: dict, available: dict) -> dict:
    """The run's config.json."""
    files = [path for name in splits if (path := find_split(Path(s.data), name))]
    settings = {k: v for k, v in asdict(s).items() if k not in ("out", "resume")}
    if clf.row.form == "embedding":
        settings["pooling"] = clf.pooling  # what auto was, whatever the model's folder says later
    return {
        "settings": settings,
        "task": asdict(clf.task),
        "prompt": clf.render(""),
        "prompt_ids": str(clf.prompt.branches("")),  # and what ends it; in one line
        "examples": {name: len(examples) for name, examples in splits.items()},
        "sampled_from": available,
        "data_sha256": {path.name: sha256(path) for path in files},
        "architecture": vars(clf.backbone.config) if clf.model else {},
        "weights_sha256": hashes(s.model) if clf.model else {},
        "versions": {
            "minislm": minislm.__version__, "commit": commit(), "torch": torch.__version__,
            "python": platform.python_version(), "threads": torch.get_num_threads(),
            "processes": distributed.world_size(),
        },
    }  # fmt: skip


def check_resumed(out: Path, config: dict) -> dict:
    """The run's config.json, of the same settings, data and weights, wherever these are now."""
    old, now = read_json(out / "config.json"), json.loads(json.dumps(config))
    old["settings"] |= {name: now["settings"][name] for name in ("model", "data")}  # hashes tell
    for part in ("settings", "task", "data_sha256", "architecture", "weights_sha256"):
        before = old.get(part, now[part])
        for key in sorted(now[part].keys() | before.keys()):
            if (was := before.get(key)) != (is_now := now[part].get(key)):
                change = f"{key} was {was!r} and is now {is_now!r} ({part})"
                raise ValueError(f"{out}: {change}; resume it as it began")
    if any(old.get(key, now[key]) != now[key] for key in ("prompt", "prompt_ids")):
        raise ValueError(f"{out}: began with another prompt; is the model's chat template there?")
    return old


def texts(n: int, of: int) -> str:
    """How many texts a figure is of, and of how many they are a sample."""
    return f"{n} texts" + f", a sample of {of}" * (n < of)


def one_line(name: str, r: dict, of: int) -> str:
    """A result in a line. of: see `texts`."""
    low, high = r["interval_95"]["macro_f1"]
    return (
        f"{name:<24} accuracy {r['accuracy']:.3f}   macro-F1 {r['macro_f1']:.3f} "
        f"({low:.3f} to {high:.3f})   weighted-F1 {r['weighted_f1']:.3f}   {texts(r['n'], of)}"
    )


def describe(clf: Classifier, splits: dict, available: dict) -> str:
    """What is about to be trained, for a look before the wait."""
    total = sum(p.numel() for p in clf.modules.parameters())
    in_4_bits = (m for m in clf.modules.modules() if isinstance(m, NF4Linear))
    total += sum(m.in_features * m.out_features for m in in_4_bits)  # not parameters
    trainable = sum(p.numel() for p in clf.trained().values())
    train, shared, lengths = splits["train"], None, []
    for example in train:  # the tokens of all texts at once could fill the memory
        group = clf.prompt.branches(example.text)
        lengths.append(len(group[0]))
        known = group[0] if shared is None else [*shared, -1]  # of which -1 is dropped
        shared = common_prefix([*group, known])
    counts = [
        f"{len(examples):,} {name}" + f" (of {of:,})" * (len(examples) < of)
        for (name, examples), of in zip(splits.items(), available.values())
    ]
    tokens = [""] * len(clf.labels)
    if len(clf.label_token_ids) == len(clf.labels):  # one each, without synonyms
        tokens = [f" ({clf.prompt.tokenizer.decode([i])!r})" for i in clf.label_token_ids]
    classes = [label + token for label, token in zip(clf.labels, tokens)]
    unit = "tokens per prompt" if clf.model else "n-grams per text"
    asked = len(clf.prompt.branches(""))  # prompts per text
    rows = {
        "method": f"{clf.method}: {clf.row.about}",
        "model": clf.model or "none",
        "classes" + " (first token)" * any(tokens): ", ".join(classes),
        "parameters": f"{total:,}, of which {trainable:,} are trained",
        "examples": ", ".join(counts),
        unit: f"{sum(lengths) / len(train):.0f} on average, {max(lengths)} at most, "
        f"{len(shared)} the same in all" + f"; {asked} prompts per text" * (asked > 1),
        "truncated": f"{clf.prompt.truncated} of {len(train):,} training texts",
    }  # fmt: skip
    trained_on = {text for text, _ in [*train, *clf.task.shots]}
    for name in ("validation", "test"):
        if seen := sum(example.text in trained_on for example in splits[name]):
            rows[f"{name} seen in training"] = f"{seen:,} of {len(splits[name]):,} texts"
    lines = [f"{k:<24} {v}" for k, v in rows.items()]
    if clf.model:
        prompt = clf.render(train[0].text).split("\n")
        prompt = prompt[: len(prompt) // asked]  # of several, of as many lines, the first
        lines += ["the first example's prompt", *(f"  | {line}" for line in prompt), ""]
    return "\n".join(lines)


def largest_class(result: dict, of: int) -> str:
    """The floor: the figures of always answering with the test split's largest class."""
    confusion = np.zeros_like(result["confusion"])
    supports = [scores["support"] for scores in result["per_class"].values()]
    confusion[:, np.argmax(supports)] = supports
    floor, _ = metrics.figures(confusion)
    name = "always the largest class"
    figures = f"accuracy {floor['accuracy']:.3f}   macro-F1 {floor['macro_f1']:.3f}"
    return f"{name:<24} {figures}   {texts(result['n'], of)}"


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # a screen may not know every character
    s = parse_settings()
    device = distributed.start(s.device)
    first = distributed.rank() == 0  # of torchrun's processes: the one that writes
    out = distributed.all_gather(run_folder(s) if first else None)[0]
    # a run without one stopped before its first step, and begins anew
    has_checkpoint = s.resume and (out / "checkpoint.pt").exists()
    task, splits, available = load_data(s)
    train, validation, test = splits.values()

    # model
    torch.manual_seed(s.seed)
    options = {name: getattr(s, name) for name in OPTIONS}
    clf = Classifier.zero_shot(s.model, task, s.dtype, device, quantize=s.quantize, **options)
    trains = clf.row.trains
    if s.recompute and not isinstance(clf.backbone, Decoder):
        raise ValueError("--recompute is for decoders")
    clf.backbone.recompute = s.recompute
    if trains == "lora":
        lora.inject(clf.backbone, s.lora_rank, s.lora_alpha, s.lora_dropout)
    elif trains == "full":
        clf.backbone.requires_grad_(True)
    if s.compile:
        clf.compile(training=True)
        print("compiling                in the first steps: a minute or two without progress")
    targets = torch.tensor(class_indices(train, task, "train"))
    torch.manual_seed(s.seed + 7919 * (1 + distributed.rank()))  # each drops other places
    generator = torch.cuda if device.startswith("cuda") else torch  # the one that dropout uses
    print(describe(clf, splits, available), flush=True)

    # schedule: as many optimizer steps as whole and partial batches
    steps_per_epoch = math.ceil(len(train) / s.batch_size)
    steps = 0 if trains == "fit" else s.epochs * steps_per_epoch
    steps = min(steps, s.max_steps or steps)
    eval_every = max(1, steps_per_epoch // s.evals_per_epoch)
    warmup = int(s.warmup * steps)

    trained = clf.trained()
    parameters = list(trained.values())
    if s.head_lr and not any(name.startswith("head") for name in trained):
        raise ValueError(f"--head-lr: {s.method} has no head of its own")
    groups = [
        {"params": [p for name, p in trained.items() if name.startswith(part)], "peak": rate}
        for part, rate in (("backbone", s.lr), ("head", s.head_lr or s.lr))
    ]
    optimizer = AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=s.weight_decay, fused=True)

    # run folder: new, or as it was at the last checkpoint
    config = record(s, clf, splits, available)
    if s.resume:
        begun = check_resumed(out, config)
    elif first:
        try:
            out.mkdir(parents=True, exist_ok=bool(s.out))
        except FileExistsError:
            raise ValueError(f"{out}: another run has begun there; give --out") from None
    log_file = open(out / "metrics.jsonl" if first else os.devnull, "ab")

    def log(**entry) -> None:
        log_file.write(json.dumps(entry).encode() + b"\n")

    if first:
        claim(out, log_file)
        for part in (p for name in WRITTEN for p in out.glob(f".{name}.*.part")):
            part.unlink()  # of a process that was killed as it wrote
    if has_checkpoint:
        try:
            state = torch.load(path := out / "checkpoint.pt", "cpu", weights_only=True)
        except FileNotFoundError:
            raise ValueError(f"{out}: that run has finished meanwhile") from None
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError) as error:
            kind = type(error).__name__
            raise ValueError(f"{path}: not readable ({kind}); begin the run anew") from None
        progress = state["progress"]
        with torch.no_grad():
            for name, tensor in state["trained"].items():
                trained[name].copy_(tensor)
        optimizer.load_state_dict(state["optimizer"])
        if len(state["rng"]) != distributed.world_size():
            raise ValueError(f"{out}: had {len(state['rng'])} processes; resume it with as many")
        generator.set_rng_state(state["rng"][distributed.rank()])
        if first:
            log_file.seek(log_file.truncate(min(state["log_bytes"], log_file.tell())))
            with replacing(out / "config.json") as file:  # data and model may have moved
                json.dump(begun, file, indent=2)
        del state  # a second copy of what is trained
        print(f"resuming after step {progress['step']} of {steps}")
    else:
        if first:
            if not s.resume and (out / "config.json").exists():  # since it was checked
                raise ValueError(f"{out}: another run has been there; choose another --out")
            log_file.seek(log_file.truncate(0))
            with replacing(out / "config.json") as file:
                json.dump(config, file, indent=2)
        progress = dict(step=0, best=-1.0, best_step=0, since_best=0, losses=[], zero_shot={})
        if trains == "fit":
            clf.fit(train, validation)
        if clf.ready:
            name = f"{'fitted' if trains == 'fit' else 'zero-shot'}, validation"
            result = clf.evaluate(validation, name)
            if steps and test:
                progress["zero_shot"]["test"] = clf.evaluate(test, "zero-shot, test")
            progress["best"] = result["macro_f1"]
            print(one_line(name, result, available["validation"]), flush=True)
            log(step=0, validation={k: result[k] for k in FIGURES})
            clf.save(out)
    clf.ready = True

    def checkpoint() -> None:
        """All that a resumed run needs to go on as if it had never stopped."""
        log_file.flush()
        rng = distributed.all_gather(generator.get_rng_state())
        if not first:
            return
        state = {
            "progress": progress,
            "trained": {name: p.detach() for name, p in trained.items()},
            "optimizer": optimizer.state_dict(),
            "rng": rng,
            "log_bytes": log_file.tell(),
        }
        with replacing(path := out / "checkpoint.pt", "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # the zip writer's, where the file's own is lost
                if isinstance(error.__context__, KeyboardInterrupt):
                    raise error.__context__ from None
                raise OSError(f"{path}: not written; is the disk full? ({error})") from None

    stop = []

    def ask_to_stop(number, frame) -> None:
        """The first Ctrl-C stops after the step at hand, a second one at once."""
        stop.append(number)
        if first and sys.stderr.isatty():  # not by print, which this may have interrupted
            os.write(2, b"\nstopping after the step (or validation) at hand; again: at once\n")
        signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows; a closed terminal may send it twice
    if hangup and signal.getsignal(hangup) == signal.SIG_DFL:  # nohup ignores it
        signal.signal(hangup, lambda number, frame: stop.append(number))
    if steps:
        checkpoint()

    # train: a method that generates has log-probabilities of whole answers, not logits of classes
    loss_of = F.nll_loss if clf.row.generates else F.cross_entropy
    replays = device.startswith("cuda") and clf.shares and trains == "lora" and not s.recompute
    score, form = (clf.score, clf.arrange) if replays else (clf.logits, list)

    def backward(inputs: list) -> torch.Tensor:
        """Adds a pass's share of a step's gradients, and returns that of its loss."""
        *batch, (truth, n) = inputs
        scores = score(batch)
        loss = loss_of(scores, truth.to(scores.device), reduction="sum") / n
        loss.backward()
        return loss.detach()

    one_pass = Replayed(backward, device) if replays else backward
    step, losses = progress["step"], progress["losses"]  # the losses since the last logged step

    def examples_of(n: int) -> int:
        """How many n steps see: the last step of an epoch may see fewer."""
        return n // steps_per_epoch * len(train) + n % steps_per_epoch * s.batch_size

    def batches() -> Iterator[tuple[int, list]]:
        """Of each step to come: how many examples it has, and its passes in this process."""
        order = None
        for at_step in range(step, steps):
            epoch, at = divmod(at_step, steps_per_epoch)
            if at == 0 or order is None:  # a new epoch, or a resumed one
                shuffler = torch.Generator().manual_seed(s.seed * 100_003 + epoch)
                order = torch.randperm(len(train), generator=shuffler)
            rows = order[at * s.batch_size : (at + 1) * s.batch_size].tolist()
            own, passes = rows[distributed.rank() :: distributed.world_size()], []
            size, n = s.micro_batch or s.batch_size, torch.tensor(float(len(rows)))
            for part in (own[i : i + size] for i in range(0, len(own), size)):
                groups = [clf.prompt.branches(train[i].text) for i in part]
                passes.append([*form(groups), [targets[part], n]])
            yield len(rows), passes

    seen, since, stopping, upcoming = 0, time.time(), False, batches()
    ahead = next(upcoming, None)
    clf.modules.train()
    with tqdm(
        total=examples_of(steps), initial=examples_of(step), unit=" examples", smoothing=0.05,
        mininterval=0.1 if sys.stderr.isatty() else 30, disable=not first or not steps,
    ) as bar:  # fmt: skip
        while ahead and not stopping and not 0 < s.patience <= progress["since_best"]:
            n, passes = ahead
            factor = (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak"]  # rising, then falling to 0, both linearly

            loss = torch.zeros((), device=device)
            for inputs in passes:
                loss += one_pass(inputs)
            ahead = next(upcoming, None)  # prepared while a GPU works; a copy to it would wait
            for p in parameters:  # this process may have had no example
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            stopping = torch.full_like(loss, len(stop))  # all processes stop together
            distributed.all_reduce([loss, stopping, *(p.grad for p in parameters)])
            if s.clip:
                torch.nn.utils.clip_grad_norm_(parameters, s.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=not replays)  # a graph's gradients keep their memory
            losses.append(loss.item())  # waits for the GPU, as a step's next passes do
            if not math.isfinite(losses[-1]):
                said = f"the loss is {losses[-1]} at step {step}; lower --lr (now {s.lr:g})."
                kept = f" The best so far (step {progress['best_step']}) is in {out}"
                raise ValueError(said + kept * (progress["best"] >= 0))
            step += 1
            progress["step"] = step
            seen += n
            mean_loss = sum(losses) / len(losses)
            bar.update(n)
            bar.set_postfix(loss=f"{mean_loss:.3f}", best=f"{progress['best']:.3f}", refresh=False)

            if step % 10 == 0 or step == steps:
                speed = round(seen / (time.time() - since), 2)
                log(step=step, loss=round(mean_loss, 6), lr=factor * s.lr, examples_per_s=speed)
                losses.clear()
                seen, since = 0, time.time()
            if step % eval_every == 0 or step == steps:
                began = time.time()
                result = clf.evaluate(validation, "validation")
                clf.modules.train()
                log(step=step, validation={k: result[k] for k in FIGURES})
                better = result["macro_f1"] > progress["best"]
                progress["since_best"] = 0 if better else progress["since_best"] + 1
                if better:
                    progress |= {"best": result["macro_f1"], "best_step": step}
                    clf.save(out)
                checkpoint()  # before the screen, which may be gone
                line = one_line(f"step {step}", result, available["validation"])
                bar.write(line + "  *" * better, file=sys.stdout)
                sys.stdout.flush()
                since += time.time() - began
    if any(distributed.all_gather(bool(stop))):
        checkpoint()
        many = distributed.world_size()
        again = shlex.join([sys.argv[0], "--out", str(out), "--resume"])
        python = "python" if many == 1 else f"torchrun --nproc-per-node {many}"
        raise KeyboardInterrupt(f"stopped after step {step}; go on with: {python} {again}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    log_file.flush()  # it stays open: see `claim`
    distributed.all_gather(None)  # wait until the best adapter is written

    # the best on the test split
    best, best_step = progress["best"], progress["best_step"]
    if steps:
        on = texts(len(validation), available["validation"])
        print(f"\nbest validation macro-F1 {best:.3f} at step {best_step} of {steps} ({on})")
        if not best_step:
            print("no step did better than zero-shot: try another --lr, or --warmup 0.1")
        clf.restore(out)
        clf.merge()  # so that it is tested as eval.py loads it
    if s.calibration != "none":
        clf.calibrate(s.calibration, validation)
        clf.save(out)
    if test:
        result = clf.evaluate(test, "test")
        if zero_shot := progress["zero_shot"].get("test"):
            result["zero_shot"] = {k: zero_shot[k] for k in FIGURES}
        result |= {"best_validation_macro_f1": best, "best_step": best_step}
        result |= {"validation_n": len(validation), "sampled_from": available["test"]}
        if first:
            with replacing(out / "test.json") as file:
                json.dump(result, file, indent=2)
        print(largest_class(result, available["test"]))
        if zero_shot:
            print(one_line("zero-shot, test", zero_shot, available["test"]))
        done = "fine-tuned" if steps else "fitted"
        print(one_line(f"{done}, test", result, available["test"]), end="\n\n")
        print(report(result))
    if first:
        (out / "checkpoint.pt").unlink(missing_ok=True)
    ask = f'python eval.py {shlex.quote(str(out))} --text "..."'
    print(f"\nthe run is in {out}; classify with: {ask}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        print(f"\n{str(stopped) or 'stopped'}", file=sys.stderr)
        sys.exit(130)

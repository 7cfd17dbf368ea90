"""Speed and memory beside those of transformers and peft (pip install -e ".[bench]").

    python benchmarks/speed.py --model DIR --data DIR                       # inference, training
    python benchmarks/speed.py --model DIR --data DIR --only agreement [--run runs/x]
    python benchmarks/speed.py --model DIR --data DIR --only growth
    python benchmarks/speed.py --model qwen3-0.6b --random-weights --tokenizer DIR --data DIR

Each contender is a process of its own, so that its peak memory is its own. All those of a table are
loaded, then take turns, round after round, on the same texts and token ids: one computes at a time.
The first round warms up; figures are medians of the others. A round of inference is a whole job: a
shared prefix is computed in each. In inference minislm is timed from strings on and batches as it
likes; all else starts from token ids, in batches of --batch-size, which the others pad on the right
to the longest of the batch.
"""

import copy
import json
import os
import platform
import random
import re
import resource
import shutil
import string
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from fnmatch import fnmatch
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from compare_report import markdown
from torch import Tensor

from minislm import Classifier, Task, lora, metrics
from minislm.data import class_indices, load_split, load_task, stratified_sample
from minislm.decoder import DecoderConfig
from minislm.graphs import Replayed
from minislm.methods import BUDGET, read_run
from minislm.packing import arrange, common_prefix, last_hidden, length_batches, pad
from minislm.text import load_tokenizer
from minislm.weights import read_config, resolve_folder

sys.path.append(str(Path(__file__).resolve().parent.parent))
from train import AdamW, commit

RANK, ALPHA, DROPOUT, LR, CLIP = 16, 32, 0.05, 5e-5, 1.0  # LoRA and AdamW on both sides
ROOF_ROWS = 4096  # of the matrix products that measure the machine

# A contender is HOW-KIND; kind -> dtype, quantize
KINDS = {"float32": ("float32", ""), "bfloat16": ("bfloat16", "")}
KINDS |= {"int8": ("auto", "int8"), "nf4": ("bfloat16", "nf4")}
HOW = {
    "minislm": "its own batches",
    "minislm-compiled": "the same with --compile; compiling is part of the round that warms up",
    "full": "transformers as it comes, logits of all tokens; texts in input order",
    "last": "transformers, logits of each text's last token only; texts in input order",
    "sorted": "as last; texts sorted by length",
    "prefix": "as sorted; the shared prefix once, in a DynamicCache repeated for the batch",
    "peft": "peft as it comes, logits of all tokens",
    "peft-last": "peft, logits of each text's last token only",
}


def both(*hows: str) -> list[str]:
    return [f"{how}-{kind}" for how in hows for kind in ("float32", "bfloat16")]


def ours(quantized: str) -> list[str]:
    hows, kinds = ("minislm", "minislm-compiled"), ("float32", "bfloat16", quantized)
    return [f"{how}-{kind}" for how in hows for kind in kinds]


CONTENDERS = {
    "inference": ours("int8") + both("full", "last", "sorted", "prefix"),
    "training": ours("nf4") + both("peft", "peft-last"),
    "agreement": ours("int8"),
    "growth": both("minislm", "last"),
}
GROWTH = {"text": (20, 60, 200, 600, 2000), "classes": (2, 8, 32, 150)}
GROWTH |= {"prefix": (50, 200, 600, 2000)}
SHAPES = {
    "qwen3-0.6b": dict(
        model_type="qwen3", num_hidden_layers=28, hidden_size=1024, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, intermediate_size=3072, vocab_size=151936,
        tie_word_embeddings=True, max_position_embeddings=40960, rope_theta=1e6,
    )
}  # fmt: skip


# What the work is


def linears(c: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(in, out) features of a block's linear layers."""
    D, M = c.hidden_size, c.intermediate_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return dict(zip(lora.TARGETS, [(D, q), (D, kv), (D, kv), (q, D), (D, M), (D, M), (M, D)]))


def useful_flops(c: DecoderConfig, prompts: list[list[int]], classes: int, rank: int = 0) -> float:
    """FLOPs, two a multiply-add, of classifying prompts or, with a rank, of a training step.

    Every distinct token counts once (the shared prefix, then each text's own tokens), in the last
    block only the texts' last tokens, but for keys and values; of the LM head only the classes.
    """
    shared, last_block = len(common_prefix(prompts)), c.num_hidden_layers - 1
    own, texts = [len(p) - shared for p in prompts], len(prompts)
    tokens = shared + sum(own)
    # attention: a query and a key multiply twice, in q k^T and in the weights times v
    pairs = shared * (shared + 1) / 2 + sum(n * shared + n * (n + 1) / 2 for n in own)
    pairs = pairs * last_block + sum(shared + n for n in own)
    total = 4 * c.num_attention_heads * c.head_dim * pairs * (3 if rank else 1)  # backward: twice
    for block in range(c.num_hidden_layers):
        for name, (fan_in, fan_out) in linears(c).items():
            rows = texts if block == last_block and name not in ("k_proj", "v_proj") else tokens
            # gradients of the inputs, not of frozen weights, nor of the frozen embedding below
            first = block == 0 and name in ("q_proj", "k_proj", "v_proj")
            total += 2 * rows * fan_in * fan_out * (2 if rank and not first else 1)
            # adapters: gradients of the weights too
            total += 2 * rows * rank * ((2 if first else 3) * fan_in + 3 * fan_out)
    return total + 2 * texts * classes * c.hidden_size * (2 if rank else 1)


# Workers: a loader takes the settings and returns a job, which a message's fields are passed to


def timed(run: Callable, device: str) -> tuple[float, object]:
    """Seconds of wall time, and what `run` returned."""
    began = time.perf_counter()
    result = run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def peak_memory(device: str) -> float:
    """GB of this process since it began; on a GPU, what PyTorch took there."""
    if device != "cpu":
        return torch.cuda.max_memory_reserved() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def load_minislm(s: dict, training: bool = False) -> Classifier:
    options = dict(dtype=s["dtype"], device=s["device"])
    if s["quantize"]:
        options["quantize"] = s["quantize"]
    if s.get("run"):
        clf = Classifier.load(s["run"], model=s["model"], **options)
    else:
        clf = Classifier.zero_shot(s["model"], Task.from_dict(s["task"]), **options)
    if s["how"] == "minislm-compiled":
        clf.compile(training)
    return clf


def load_transformers(s: dict):
    from transformers import AutoModelForCausalLM

    options = dict(dtype=getattr(torch, s["dtype"]), attn_implementation="sdpa")
    return AutoModelForCausalLM.from_pretrained(s["model"], **options).to(s["device"]).eval()


def class_logits(model, how: str, prompts, label_ids, shared: int = 0, cache=None) -> Tensor:
    """transformers' logits (B, C) of the classes at each prompt's last token, float32.

    shared: so many of each prompt's tokens, P, are in the cache already.
    """
    ids = pad([prompt[shared:] for prompt in prompts]).to(model.device)  # (B, T)
    real = ids >= 0
    mask = F.pad(real, (shared, 0), value=True).long()  # (B, P + T)
    last, full = real.sum(1, keepdim=True) - 1, how in ("full", "peft")
    logits = model(
        input_ids=ids.clamp(0), attention_mask=mask,
        past_key_values=cache, use_cache=cache is not None,
        logits_to_keep=0 if full else last,  # positions, (B, 1)
    ).logits  # fmt: skip
    assert logits.shape[:2] == (ids.shape if full else last.shape), "it needs transformers 5.21"
    if full:
        logits = logits[torch.arange(len(ids), device=model.device)[:, None], last]
    return logits[:, 0, label_ids].float()


@torch.inference_mode()
def probabilities_of(model, how: str, prompts, label_ids, batch_size: int) -> np.ndarray:
    """transformers' class probabilities (N, C)."""
    order, shared, kept, cache = list(range(len(prompts))), [], None, None
    if how in ("sorted", "prefix"):
        order.sort(key=lambda i: -len(prompts[i]))
    if how == "prefix":
        shared = common_prefix(prompts)
        ids = torch.tensor([shared], device=model.device)
        kept = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        kept.batch_repeat_interleave(batch_size)
    probabilities = np.empty((len(prompts), len(label_ids)), np.float32)
    for at in range(0, len(prompts), batch_size):
        rows = order[at : at + batch_size]
        if kept is not None:  # a batch appends to it, into new tensors: no need to copy the old
            cache = copy.copy(kept)
            cache.layers = [copy.copy(layer) for layer in kept.layers]
            if len(rows) < batch_size:
                cache.batch_select_indices(torch.arange(len(rows), device=model.device))
        logits = class_logits(model, how, [prompts[i] for i in rows], label_ids, len(shared), cache)
        probabilities[rows] = logits.softmax(-1).cpu().numpy()
    return probabilities


def load_inference(s: dict) -> Callable[[], dict]:
    own = s["how"].startswith("minislm")
    model = load_minislm(s) if own else load_transformers(s)

    def job() -> dict:
        if own:
            if s["job"] == "inference":  # a round is a whole job: no prefix is kept from the last
                model._cached = None  # (int8's is then int8; users get a better one)
            found = model.predict_proba(s["texts"])
        else:
            found = probabilities_of(model, s["how"], s["prompts"], s["label_ids"], s["batch_size"])
        return {"probabilities": found.tolist()}

    return job


def load_training(s: dict) -> Callable[..., dict]:
    torch.manual_seed(0)
    replays = s["how"].startswith("minislm") and s["device"] != "cpu"
    if s["how"].startswith("minislm"):
        clf = load_minislm(s, training=True)
        model = clf.backbone
        lora.inject(model, RANK, ALPHA, DROPOUT)
        score, form = (clf.score, clf.arrange) if replays else (clf.logits, list)
    else:
        from peft import LoraConfig, get_peft_model

        names = [name for name in lora.TARGETS if name.endswith("_proj")]  # a decoder's
        targets = dict(target_modules=names, task_type="CAUSAL_LM")
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, **targets)
        model = get_peft_model(load_transformers(s), config)

        def score(groups: list[list[list[int]]]) -> Tensor:
            return class_logits(model, s["how"], [prompt for (prompt,) in groups], s["label_ids"])

        form = list

    def backward(inputs: list) -> Tensor:  # as in train.py
        *batch, (truth,) = inputs
        loss = F.cross_entropy(score(batch), truth)
        loss.backward()
        return loss.detach()

    model.train()
    one_pass = Replayed(backward, s["device"]) if replays else backward
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)

    def job(batches: list[list[int]]) -> dict:
        losses = []
        for rows in batches:
            truth = torch.tensor([s["targets"][i] for i in rows], device=s["device"])
            loss = one_pass([*form([[s["prompts"][i]] for i in rows]), [truth]])
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=not replays)
            losses.append(loss.item())
        return {"first_loss": losses[0]}

    return job


@torch.inference_mode()
def minislm_growth(clf: Classifier, prompts: list[list[int]], shared: int, classes: int) -> float:
    """The steps of Classifier by hand, for ids without a text; returns the prefix's seconds."""
    decoder, rows = clf.backbone, clf.backbone.embed_tokens.weight[:classes]
    first = torch.tensor([prompts[0][:shared]], device=rows.device)
    seconds, prefix = timed(lambda: decoder.extend(first)[1], rows.device.type)
    groups, copied = [[prompt] for prompt in prompts], 0 if prefix.serves_all() else shared
    for batch in length_batches(groups, shared, copied, BUDGET[rows.device.type]):
        hidden = last_hidden(decoder, arrange([groups[i] for i in batch], shared, True), prefix)
        F.linear(hidden, rows).float().softmax(-1).cpu()
    return seconds


def load_growth(s: dict) -> Callable[..., dict]:
    model = load_minislm(s) if s["how"] == "minislm" else load_transformers(s)

    def job(prompts: list[list[int]], shared: int, classes: int) -> dict:
        if s["how"] == "minislm":
            return {"prefix": minislm_growth(model, prompts, shared, classes)}
        probabilities_of(model, s["how"], prompts, list(range(classes)), s["batch_size"])
        return {"prefix": 0.0}

    return job


def product(dtype: str, fan_in: int, fan_out: int, device: str) -> Callable:
    """A linear layer on ROOF_ROWS rows."""
    if dtype != "int8":
        like = dict(dtype=getattr(torch, dtype), device=device)
        x, w = torch.randn(ROOF_ROWS, fan_in, **like), torch.randn(fan_out, fan_in, **like)
        return lambda: F.linear(x, w)
    # unsigned activations: for signed ones oneDNN has no fast kernel on most CPUs
    x = torch.randint(256, (ROOF_ROWS, fan_in), dtype=torch.uint8, device=device)
    w = torch.randint(-127, 128, (fan_out, fan_in), dtype=torch.int8, device=device)
    w = torch.ops.onednn.qlinear_prepack(w, list(x.shape))
    scales, zeros = torch.ones(fan_out), torch.zeros(fan_out, dtype=torch.int64)
    out = None, 1.0, 0, torch.float32, "none", [], ""  # no bias, no requantization, no fused op
    return lambda: torch.ops.onednn.qlinear_pointwise(x, 1.0, 128, w, scales, zeros, *out)


def load_roof(s: dict) -> Callable[..., dict]:
    """The best GFLOP/s of a plain product of the model's own linear shapes, a dtype each."""
    shapes = sorted(set(linears(read_config(Path(s["model"]))).values()))

    @torch.inference_mode()
    def job(**_) -> dict:
        rates = {}
        for dtype in ("float32", "bfloat16", "int8"):
            try:
                for shape in shapes:
                    run = product(dtype, *shape, s["device"])
                    seconds = min(timed(run, s["device"])[0] for _ in range(4))
                    rate = 2e-9 * ROOF_ROWS * shape[0] * shape[1] / seconds
                    rates[dtype] = max(rates.get(dtype, 0.0), rate)
            except (RuntimeError, AttributeError) as error:  # this build or device has no int8
                print(f"no roof for {dtype}: {error}", file=sys.stderr)
        return {"rates": rates}

    return job


def with_codes(task: Task, model: Path) -> Task:
    """The classes under codes that are one token each: A, B, ..., AA, AB, ..., then words."""
    tokenizer, letters, found = load_tokenizer(model), string.ascii_uppercase, []
    words = sorted(w for w in tokenizer.get_vocab() if w.isascii() and w.isalpha())
    for code in dict.fromkeys([*letters, *(a + b for a in letters for b in letters), *words]):
        ids = [tokenizer.encode(w, add_special_tokens=False).ids for w in (code, " " + code)]
        found += [code] * all(len(i) == 1 for i in ids)
    if len(found) < len(task.words):
        raise ValueError(f"{model}: its tokenizer has {len(found)} codes, not {len(task.words)}")
    return Task(task.labels, tuple(found[: len(task.words)]), task.words, task.prompt)


def load_prompts(s: dict) -> Callable[..., dict]:
    task, model = load_task(Path(s["data"]), s["label"]), Path(s["model"])
    try:
        clf = Classifier.zero_shot(model, task)
    except ValueError:  # classes that begin with the same token; any other error comes again
        clf = Classifier.zero_shot(model, with_codes(task, model))

    def job(texts: dict[str, list[str]]) -> dict:
        prompts = {name: [clf.prompt.branches(t)[0] for t in texts[name]] for name in texts}
        found = {"task": asdict(clf.task), "coded": clf.task != task, "prompts": prompts}
        return found | {"label_ids": clf.label_token_ids, "cores_used": torch.get_num_threads()}

    return job


def load_random_weights(s: dict) -> Callable[..., dict]:
    from transformers import AutoConfig, AutoModelForCausalLM

    def job(source: str, tokenizer: str) -> dict:
        shape = SHAPES.get(source)
        config = AutoConfig.for_model(**shape) if shape else AutoConfig.from_pretrained(source)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(s["model"])  # bfloat16: the same weights in every dtype
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (path := Path(tokenizer) / name).exists():
                shutil.copy(path, s["model"])
        return {}

    return job


LOADERS = {
    "inference": load_inference, "agreement": load_inference, "training": load_training,
    "growth": load_growth, "roof": load_roof, "prompts": load_prompts,
    "weights": load_random_weights,
}  # fmt: skip


def serve(name: str) -> None:
    """A worker: reads a line of settings, then a line a job, and answers each with a line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    job, device = None, "cpu"
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if job is None:
                how, _, kind = name.rpartition("-")
                dtype, quantize = KINDS.get(kind, ("", ""))
                message |= {"how": how, "dtype": dtype, "quantize": quantize}
                device = message["device"]
                torch.set_num_threads(message["threads"] or torch.get_num_threads())
                load = LOADERS[name if name in LOADERS else message["job"]]
                seconds, job = timed(lambda: load(message), device)
                answer = {}
            else:
                seconds, answer = timed(lambda: job(**message), device)
            answer |= {"seconds": seconds, "peak": peak_memory(device)}
        except Exception as error:  # of whatever kind: this contender is left out, and it says why
            answer = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
        print(json.dumps(answer), file=answers)


# The parent: starts workers, takes turns, makes tables


def start(name: str) -> subprocess.Popen:
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    command, pipe = [sys.executable, __file__, "--worker", name], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | quiet)


def ask(worker: subprocess.Popen, message: dict) -> dict:
    """The worker's answer; its "error" is there where it has none."""
    line = ""
    if worker.poll() is None:
        print(json.dumps(message), file=worker.stdin, flush=True)
        line = worker.stdout.readline()
    return json.loads(line) if line else {"error": f"its process ended, code {worker.wait()}"}


def ask_once(name: str, settings: dict, message: dict) -> dict:
    with start(name) as worker:
        for part in (settings, message):
            answer = ask(worker, part)
            if "error" in answer:
                raise ValueError(f"{name}: {answer['error']}")
    return answer


def take_turns(a, job: str, settings: dict, messages: list[dict], *more: str) -> tuple[dict, dict]:
    """Every contender's answers to the messages, and why which were left out."""
    patterns, answers, left_out = a.contenders.split(","), {}, {}
    names = [n for n in CONTENDERS[job] if any(fnmatch(n, p) for p in patterns)]
    if not names:
        raise ValueError(f"--contenders {a.contenders}: none of {', '.join(CONTENDERS[job])}")
    with ExitStack() as stack:
        workers = {}
        for number, message in enumerate([settings | {"job": job}, *messages]):
            for name in [n for n in (*names, *more) if n not in left_out]:
                if number == 0:
                    workers[name] = stack.enter_context(start(name))
                answer = ask(workers[name], message)
                answers.setdefault(name, []).append(answer)
                if "error" in answer:
                    left_out[name] = answer["error"]
                note = answer.get("error") or f"{answer['seconds']:.2f} s"
                print(f"{job} {number}/{len(messages)}: {name} {note}", file=sys.stderr, flush=True)
    answers = {name: found[1:] for name, found in answers.items() if name not in left_out}
    return answers, left_out  # the first answer was to the settings


def notes(answers: dict, left_out: dict) -> str:
    hows = dict.fromkeys(name.rpartition("-")[0] for name in answers)
    lines = [f"- {how}: {HOW[how]}" for how in hows]
    return "\n".join(lines + [f"- left out: {name}: {why}" for name, why in left_out.items()])


def speed_table(unit: str, named: str, n: int, work: list[float], found: tuple, extra) -> str:
    """A row a contender, with its ratio to the named peer and to the best.

    work: FLOPs a round, of n texts; extra: a column's name, and a value for each contender.
    """
    answers, left_out = found
    measured = [answer["rates"] for answer in answers.pop("roof", [])[1:]]
    roofs = {d: median(m[d] for m in measured) for d in (measured[0] if measured else {})}
    rates = {k: [n / answer["seconds"] for answer in found[1:]] for k, found in answers.items()}
    speed, rows = {k: median(r) for k, r in rates.items()}, []
    for name in answers:
        kind = name.rpartition("-")[2]
        dtype, quantize = KINDS[kind]
        peers = {k: v for k, v in speed.items() if not k.startswith("minislm")}
        if not quantize:
            peers = {k: v for k, v in peers.items() if k.endswith(dtype)}
        of = [[v for k, v in peers.items() if k in both(named)], [*peers.values()]]
        useful = median(rate * flops / n / 1e9 for rate, flops in zip(rates[name], work[1:]))
        roof = roofs.get("int8" if kind == "int8" else dtype)
        spread = (max(rates[name]) - min(rates[name])) / speed[name]
        ratios = [f"{speed[name] / max(values):.2f}" if values else "-" for values in of]
        row = [name, f"{speed[name]:.3g}", f"{spread:.0%}", *ratios, extra[1][name]]
        row += [f"{answers[name][-1]['peak']:.2f}", f"{useful:.3g}"]
        rows.append([*row, f"{useful / roof:.0%}" if roof else "-"])
    header = ["contender", unit, "spread", f"x {named}", "x best peer", extra[0], "peak GB"]
    plain = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in roofs.items()) or "not measured"
    return f"""{markdown([*header, "GFLOP/s", "of roof"], rows)}

{notes(answers, left_out)}
- x: speed over that of {named}, and of the fastest of the peers, in the same dtype (int8 and nf4:
  in whichever they are faster); spread: from the slowest to the fastest round
- GFLOP/s: useful work, each distinct token once; peak GB: of the process, loading included
- roof: GFLOP/s of a plain product of {ROOF_ROWS} rows: {plain}"""


def inference(a, settings: dict, config: DecoderConfig) -> str:
    answers, left_out = take_turns(a, "inference", settings, [{}] * a.rounds, "roof")
    found = {k: np.array(v[-1]["probabilities"]) for k, v in answers.items() if k != "roof"}
    exact = [p for k, p in found.items() if k.endswith("float32") and not k.startswith("minislm")]
    off = {k: f"{abs(p - exact[0]).max():.1e}" if exact else "-" for k, p in found.items()}
    work = [useful_flops(config, settings["prompts"], len(settings["label_ids"]))] * a.rounds
    extra = "probabilities off", off
    rows = speed_table("texts/s", "last", a.texts, work, (answers, left_out), extra)
    about = "- probabilities off: the largest difference from transformers in float32"
    return f"## Inference\n\n{rows}\n{about}"


def training(a, settings: dict, config: DecoderConfig) -> str:
    messages, work = [], []
    for number in range(a.rounds):
        order = random.Random(number).sample(range(a.texts), a.texts)
        batches = [order[at : at + a.batch_size] for at in range(0, a.texts, a.batch_size)]
        prompts = [[settings["prompts"][i] for i in rows] for rows in batches]
        classes = len(settings["label_ids"])
        messages.append({"batches": batches})
        work.append(sum(useful_flops(config, batch, classes, RANK) for batch in prompts))
    answers, left_out = take_turns(a, "training", settings, messages, "roof")
    first = {k: f"{v[0]['first_loss']:.4f}" for k, v in answers.items() if k != "roof"}
    extra = "first loss", first
    rows = speed_table("examples/s", "peft", a.texts, work, (answers, left_out), extra)
    about = f"LoRA r {RANK}, alpha {ALPHA}, dropout {DROPOUT}, all seven linears, AdamW {LR:g}"
    return f"## Training\n\n{about}, batch {a.batch_size}\n\n{rows}"


def agreement(a, settings: dict, examples: list, available: int) -> str:
    texts = [example.text for example in examples]
    task = Task.from_dict(read_run(Path(a.run))["task"] if a.run else settings["task"])
    truth, rows, exact = class_indices(examples, task, "test"), [], None
    own = settings | {"texts": texts, "run": a.run}
    answers, left_out = take_turns(a, "agreement", own, [{}])
    for name, found in answers.items():
        p = np.array(found[0]["probabilities"])
        confusion = metrics.confusion_matrix(truth, p.argmax(-1), len(task.labels))
        f1 = float(metrics.figures(confusion)[0]["macro_f1"])
        exact = (p, f1) if exact is None else exact
        same = (p.argmax(-1) == exact[0].argmax(-1)).mean()
        off = f"{abs(p - exact[0]).max():.1e}"
        rows.append([name, f"{f1:.4f}", f"{f1 - exact[1]:+.4f}", f"{same:.2%}", off])
    header = ["contender", "macro-F1", "to the first", "same class", "probabilities off"]
    what = f"the run {a.run}" if a.run else "zero-shot"
    what += f"; {len(texts)} test texts" + f", a sample of {available}" * (len(texts) < available)
    return f"## Agreement\n\n{what}\n\n{markdown(header, rows)}\n\n{notes({}, left_out)}".rstrip()


def growth(a, settings: dict) -> str:
    points, messages = [(axis, n) for axis, steps in GROWTH.items() for n in steps], []
    for axis, value in points:
        at = {"text": 30, "classes": 8} | {axis: value}
        shared, rng = at.get("prefix", 60 + 5 * at["classes"]), random.Random(0)
        prefix = rng.choices(range(1000), k=shared)
        prompts = [prefix + rng.choices(range(1000), k=at["text"]) for _ in range(a.batch_size)]
        message = {"prompts": prompts, "shared": shared, "classes": at["classes"]}
        messages += [message] * a.rounds
    answers, left_out = take_turns(a, "growth", settings, messages)
    columns = {}  # milliseconds, a value per point
    for name, found in answers.items():
        parts = [found[i + 1 : i + a.rounds] for i in range(0, len(found), a.rounds)]
        once = [1e3 * median(answer["prefix"] for answer in part) for part in parts]
        whole = [1e3 * median(answer["seconds"] for answer in part) for part in parts]
        columns[name] = [(x - y) / a.batch_size for x, y in zip(whole, once)]
        if name.startswith("minislm"):
            columns[f"{name}, prefix"] = once
    for kind in ("float32", "bfloat16"):
        if {own := f"minislm-{kind}", theirs := f"last-{kind}"} <= columns.keys():
            columns[f"x {kind}"] = [y / x for x, y in zip(columns[own], columns[theirs])]
    rows = [
        [axis, str(value), *(f"{column[i]:.3g}" for column in columns.values())]
        for i, (axis, value) in enumerate(points)
    ]
    return f"""## Growth

Milliseconds per text, of {a.batch_size} texts of random tokens. Where nothing else is said, a text
has 30 tokens, there are 8 classes, and the prefix has 60 tokens and 5 a class. minislm's prefix has
a column of its own, milliseconds once; last computes it with every text.

{markdown(["grows", "to", *columns], rows)}

{notes(answers, left_out)}"""


def machine(a: Namespace, threads: int) -> str:
    info = Path("/proc/cpuinfo")
    cpu = info.read_text() if info.exists() else ""
    name = re.search(r"model name\s*: (.*)", cpu)
    wanted = ("avx2", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    has = "".join(f", {flag}" for flag in wanted if re.search(rf"\b{flag}\b", cpu))
    gpu = f"{torch.cuda.get_device_name()}, " if a.device != "cpu" else ""
    there = filter(find_spec, ("torch", "transformers", "peft"))
    versions = ", ".join(f"{package} {version(package)}" for package in there)
    return (
        f"{gpu}{name[1] if name else platform.processor()}, {os.cpu_count()} cores{has}; "
        f"{threads} threads; load at the start {os.getloadavg()[0]:.1f}\n"
        f"{versions}, python {platform.python_version()}, minislm at {commit()}"
    )


def parse() -> Namespace:
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", help=f"required: model folder or hub id, or a shape: {', '.join(SHAPES)}"
    )
    p.add_argument("--data", help="required: folder with train and test files")
    p.add_argument("--text-column", default="text", help="column of texts [text]")
    p.add_argument("--label-column", default="label", help="column of labels [label]")
    p.add_argument("--texts", type=int, default=64, help="texts per round [64]")
    p.add_argument("--rounds", type=int, default=3, help="of which the first warms up [3]")
    p.add_argument("--batch-size", type=int, default=8, help="of training, and of the peers [8]")
    p.add_argument("--threads", type=int, default=0, help="a process; 0: as torch chooses [0]")
    p.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    p.add_argument("--only", default="inference,training", help=f"of {', '.join(CONTENDERS)}")
    p.add_argument("--contenders", default="*", help="names or patterns: minislm-*,last-float32")
    p.add_argument("--agree", type=int, default=2000, help="test texts for agreement [2000]")
    p.add_argument("--run", default="", help="agreement of a fine-tuned run instead of zero-shot")
    p.add_argument("--random-weights", action="store_true", help="of MODEL's shape (config.json)")
    p.add_argument("--tokenizer", help="folder of the tokenizer for random weights [MODEL]")
    p.add_argument("--worker", help=SUPPRESS)
    a = p.parse_args()
    if not a.worker and not (a.model and a.data):
        p.error("--model and --data are required")
    if a.rounds < 2 or a.texts < 2 or a.batch_size < 1:
        p.error("at least two rounds (the first warms up), two texts and a batch of one")
    if a.random_weights and a.model in SHAPES and not a.tokenizer:
        p.error(f"{a.model} is a shape alone: name a folder with a tokenizer, --tokenizer DIR")
    if wrong := [name for name in a.only.split(",") if name not in CONTENDERS]:
        p.error(f"--only {wrong[0]}: not one of {', '.join(CONTENDERS)}")
    return a


def report(a: Namespace, temporary: str) -> None:
    """Prints each table as soon as it is measured."""
    settings = {"device": a.device, "threads": a.threads, "batch_size": a.batch_size}
    if a.random_weights:
        message = {"source": a.model, "tokenizer": a.tokenizer or a.model}
        ask_once("weights", settings | {"model": temporary}, message)
    settings["model"] = temporary if a.random_weights else str(resolve_folder(a.model))
    config, folder = read_config(Path(settings["model"])), Path(a.data)
    splits, columns = {}, (a.text_column, a.label_column)
    for job, split in (("inference", "test"), ("training", "train")):
        splits[job] = load_split(folder, split, columns)
    a.texts = min(a.texts, *map(len, splits.values()))
    samples = {job: stratified_sample(split, a.texts, 0) for job, split in splits.items()}
    texts = {job: [example.text for example in sample] for job, sample in samples.items()}
    found = ask_once(
        "prompts", settings | {"data": a.data, "label": a.label_column}, {"texts": texts}
    )
    settings |= {"task": found["task"], "label_ids": found["label_ids"]}
    task = Task.from_dict(found["task"])

    lines = [
        machine(a, found["cores_used"]),
        f"{a.model}{', random weights' * a.random_weights} on {folder.name}: {len(task.labels)} "
        f"classes; {a.rounds - 1} rounds after one to warm up; batches of {a.batch_size}",
    ]
    for job, prompts in found["prompts"].items():
        lengths, shared = [len(p) for p in prompts], len(common_prefix(prompts))
        lines.append(
            f"{job}: {a.texts} texts, {sum(lengths) / a.texts:.0f} tokens per prompt on average, "
            f"{max(lengths)} at most, {shared} the same in all"
        )
    if found["coded"]:
        example = f"- {task.words[-1]}: {task.meanings[-1]}"
        lines.append(f"class words would collide; codes stand for them in the prompt: {example!r}")
    print("\n".join(lines), end="\n\n", flush=True)

    for job in a.only.split(","):
        if job in samples:
            own = {"texts": texts[job], "prompts": found["prompts"][job]}
            own["targets"] = class_indices(samples[job], task, job)
            make = inference if job == "inference" else training
            table = make(a, settings | own, config)
        elif job == "agreement":
            test = splits["inference"]
            table = agreement(a, settings, stratified_sample(test, a.agree, 0), len(test))
        else:
            table = growth(a, settings)
        print(table, end="\n\n", flush=True)


def main() -> None:
    a = parse()
    if a.worker:
        return serve(a.worker)
    with tempfile.TemporaryDirectory() as temporary:
        report(a, temporary)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

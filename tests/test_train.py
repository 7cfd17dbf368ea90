"""train.py and eval.py as a user runs them: runs, resuming, bad input, predictions."""

import ast
import csv
import errno
import gzip
import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BEFORE, CHAT_TIED, LOADED, int8, write_jsonl
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import eval as eval_script
import train as train_script
from minislm import Classifier, distributed, lora
from minislm.data import replacing
from minislm.quant import Int8Linear, NF4Linear

ROOT = Path(__file__).resolve().parent.parent


def run(script, monkeypatch, *arguments) -> None:
    """Runs a script's main() in this process, on the CPU if nothing else is said."""
    caught = [getattr(signal, n, signal.SIGTERM) for n in ("SIGINT", "SIGTERM", "SIGHUP")]
    handlers = {number: signal.getsignal(number) for number in caught}
    device = ["--device", "cpu"] * (script in (train_script, eval_script))
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *device, *map(str, arguments)])
    try:
        script.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(monkeypatch, data: Path, out: Path, *arguments) -> None:
    fast = ("--lr", "5e-3", "--epochs", "2", "--evals-per-epoch", "2", "--lora-rank", "4")
    run(
        train_script,
        monkeypatch,
        "--model",
        CHAT_TIED,
        "--data",
        data,
        "--out",
        out,
        *fast,
        *arguments,
    )


def artefacts(out: Path) -> dict[str, bytes]:
    names = ("adapter_model.safetensors", "adapter_config.json", "test.json")
    return {name: (out / name).read_bytes() for name in names}


def test_a_run_learns_and_reloads(moods, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    train(monkeypatch, moods, out, "--epochs", "6")
    screen = capsys.readouterr().out
    for expected in (
        "parameters", "tokens per prompt", "truncated", "<|im_start|>user", "macro-F1",
        "always the largest class", "zero-shot, test", "fine-tuned, test", "95% interval",
        "true \\ predicted",
    ):  # fmt: skip
        assert expected in screen
    result = json.loads((out / "test.json").read_text())
    assert result["n"] == 18 and np.sum(result["confusion"]) == 18
    assert result["macro_f1"] > 0.8 > result["zero_shot"]["macro_f1"]
    assert result["interval_95"]["macro_f1"][0] <= result["macro_f1"]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kinds = {tuple(record) for record in records}
    assert kinds == {("step", "loss", "lr", "examples_per_s"), ("step", "validation")}
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["seed"] == 0 and config["task"]["labels"] == ["anger", "fear", "joy"]
    assert set(config["data_sha256"]) == {"train.jsonl", "validation.jsonl", "test.jsonl"}
    assert not (out / "checkpoint.pt").exists()

    rows = [json.loads(line) for line in (moods / "test.jsonl").read_text().splitlines()]
    predicted = Classifier.load(out).predict([r["text"] for r in rows])
    accuracy = np.mean([p == r["label"] for p, r in zip(predicted, rows)])
    assert accuracy == pytest.approx(result["accuracy"], abs=1e-6)

    as_trained = Classifier.load(out).backbone.embed_tokens.weight.dtype
    assert str(as_trained) == f"torch.{config['settings']['dtype']}"

    run(eval_script, monkeypatch, out, "--json", tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["confusion"] == result["confusion"]

    assert not lora.adapters(Classifier.load(out, dtype="bfloat16").backbone)
    # bfloat16 weights would swallow a small adapter, so it stays beside them
    state = load_file(path := out / "adapter_model.safetensors")
    save_file({k: v * (1e-3 if "lora_B" in k else 1) for k, v in state.items()}, path)
    assert lora.adapters(Classifier.load(out, dtype="bfloat16").backbone)
    assert not lora.adapters(Classifier.load(out, dtype="float32").backbone)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(moods, tmp_path, monkeypatch):
    seen, logits = [], Classifier.logits
    monkeypatch.setattr(Classifier, "logits", lambda clf, x: seen.extend(x) or logits(clf, x))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(monkeypatch, moods, tmp_path / name, "--seed", seed)
    a, b, c = (artefacts(tmp_path / name) for name in "abc")
    assert a == b
    assert a["adapter_model.safetensors"] != c["adapter_model.safetensors"]
    first, second, *again, other, last = (seen[i : i + 48] for i in range(0, len(seen), 48))
    assert again == [first, second]
    assert sorted(first) == sorted(second) == sorted(other) == sorted(last)
    assert first != second and other not in (first, second), "each epoch has an order of its own"


def adapter_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


# one epoch, so that the best adapter is the last; in float64 the order of sums does not show
EXACT = ("--epochs", "1", "--evals-per-epoch", "1", "--lora-dropout", "0", "--dtype", "float64")


@pytest.mark.parametrize("extra", [("--micro-batch", "3"), ("--recompute",), ("torchrun",)])
def test_the_same_batch_gives_the_same_adapter(extra, moods, tmp_path, monkeypatch):
    """Gradients accumulated, recomputed, or summed over two processes: as in one pass."""
    train(monkeypatch, moods, tmp_path / "plain", *EXACT)
    sizes, logits = [], Classifier.logits
    monkeypatch.setattr(Classifier, "logits", lambda c, x: sizes.append(len(x)) or logits(c, x))
    if extra == ("torchrun",):
        two_processes("train.py", "--model", CHAT_TIED, "--data", moods, "--lr", "5e-3",
                      "--lora-rank", "4", "--out", tmp_path / "other", *EXACT)  # fmt: skip
    else:
        train(monkeypatch, moods, tmp_path / "other", *EXACT, *extra)
    assert sizes == {"--micro-batch": [3, 3, 2] * 6, "--recompute": [8] * 6}.get(extra[0], [])
    plain, other = adapter_of(tmp_path / "plain"), adapter_of(tmp_path / "other")
    assert plain.keys() == other.keys()
    for name in plain:
        torch.testing.assert_close(other[name], plain[name], atol=1e-9, rtol=0, msg=name)
    losses = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("plain", "other")]
    first, second = ([json.loads(x).get("loss") for x in text.splitlines()] for text in losses)
    assert first == second
    assert (tmp_path / "plain" / "test.json").read_text() == (
        tmp_path / "other" / "test.json"
    ).read_text()


def two_processes(script: str, *arguments) -> str:
    """What they print, started as torchrun starts them, but without its own seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alike = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    alike |= dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    to_pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    environments = [alike | dict(RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    processes = [subprocess.Popen(command, env=own, **to_pipe) for own in environments]
    said = "".join(process.communicate(timeout=300)[0] for process in processes)
    assert not any(process.returncode for process in processes), said
    return said


def test_processes_begin_with_the_same_adapter_and_drop_other_places(moods, tmp_path, monkeypatch):
    adapters, kept = [], []

    def begun(clf, *_):
        adapters.append(lora.adapter_state(clf.backbone))
        kept.append(torch.nn.functional.dropout(torch.ones(64)))
        raise Killed

    monkeypatch.setattr(train_script, "describe", begun)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        with pytest.raises(Killed):
            train(monkeypatch, moods, tmp_path / "run")
    torch.testing.assert_close(*adapters, atol=0, rtol=0)
    assert not torch.equal(*kept)


def test_processes_predict_in_order(moods, tmp_path, monkeypatch):
    """Nine texts on two processes: rows in the file's order, and nothing said twice.

    So are the texts of the calibration shared out, and all are counted.
    """
    texts = [f"glad {'sunny ' * i}" for i in range(9)]
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text, "id": len(text)} for text in texts])
    ask = ("--model", CHAT_TIED, "--data", moods, "--keep", "id", "--calibration", "fitted")
    ask += ("--predict", tmp_path / "texts.jsonl", "--out")
    run(eval_script, monkeypatch, *ask, tmp_path / "one.jsonl", "--dtype", "float64")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "eval.py", *ask, tmp_path / "two.jsonl", "--dtype", "float64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    assert "error" not in done.stderr.lower()
    assert done.stderr.count("9/9") == 1, done.stderr


def test_a_process_may_have_no_text(moods, tmp_path):
    """One text, cut, on two processes: the counts are those of all processes together."""
    said = two_processes("eval.py", "--model", CHAT_TIED, "--data", moods, "--eval-limit", 1,
                         "--max-text-tokens", 1, "--json", tmp_path / "result.json")  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["n"] == 1 and result["truncated"] == 1
    assert said.count("macro-F1") == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_the_process_group_says_nothing_on_stdout_and_no_thread_of_it_outlives_it():
    """One that still ends its work while the interpreter ends aborts the process, now and then."""
    script = """
import atexit, os, torch
from minislm import distributed
init = distributed.dist.init_process_group
distributed.dist.init_process_group = lambda kind: (init(kind), os.write(1, b"as PyTorch 2.8 does"))
threads = lambda: {*os.listdir("/proc/self/task")}
before = threads()
atexit.register(lambda: print(sorted(groups & threads())))
distributed.start("cpu")
assert (groups := threads() - before)
torch.compile(torch.nn.Linear(1, 1), backend="eager")(torch.ones(1, 1))  # as --compile may
"""
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | alone, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_process_without_its_gpu_says_so(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="device 'cuda:1' is not one of cpu$"):
        distributed.start("cuda")


def test_a_run_is_resumed_with_as_many_processes(moods, tmp_path, monkeypatch):
    train_and_die(monkeypatch, 8, moods, tmp_path / "run")
    with pytest.raises(AssertionError, match="had 1 processes; resume it with as many"):
        two_processes("train.py", "--out", tmp_path / "run", "--resume")


@int8
def test_int8_inference_of_a_run(moods, tmp_path, monkeypatch):
    out = tmp_path / "run"
    train(monkeypatch, moods, out, "--epochs", "6", "--dtype", "float32")
    texts = ["glad sunny laugh", "shout furious", "dark shiver hide ghost"]
    clf = Classifier.load(out, quantize="int8")
    assert not lora.adapters(clf.backbone)
    blocks = clf.backbone.layers[:-1]  # the last is not quantised
    linears = [m for name, m in blocks.named_modules() if name.endswith("_proj")]
    assert all(type(m) is Int8Linear for m in linears) and len(linears) == 7
    difference = clf.predict_proba(texts) - Classifier.load(out).predict_proba(texts)
    assert 0 < abs(difference).max() < 0.1
    with pytest.raises(ValueError, match="int4"):
        Classifier.load(out, quantize="int4")


def test_eval_passes_its_flags_on(moods, monkeypatch):
    seen, zero_shot = {}, Classifier.zero_shot

    def watched(*arguments, **given):
        clf = zero_shot(*arguments, **given)
        seen.update(given, dtype=clf.backbone.norm.weight.dtype, clf=clf)
        monkeypatch.setattr(clf, "compile", lambda: seen.update(compiled=True))
        return clf

    monkeypatch.setattr(Classifier, "zero_shot", watched)
    flags = ("--one-by-one", "--compile", "--dtype", "float64", "--quantize", "nf4")
    run(eval_script, monkeypatch, "--model", CHAT_TIED, "--data", moods, *flags)
    assert seen["compiled"] and seen["clf"].one_by_one
    assert seen["dtype"] == torch.float64 and seen["quantize"] == "nf4"


def test_training_is_compiled_if_asked(moods, tmp_path, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(
        Classifier, "compile", lambda clf, training: compiled.append([training, *clf.trained()])
    )
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        train(monkeypatch, moods, tmp_path / name, "--max-steps", "1", *flags)
        assert len(compiled) == len(flags)
        assert ("compiling" in capsys.readouterr().out) == bool(flags)
    training, *names = compiled[0]
    assert training and any("lora_A" in name for name in names)  # with the adapters, not before


def test_4_bit_training_is_evaluated_in_4_bits(moods, tmp_path, monkeypatch):
    out = tmp_path / "run"
    train(monkeypatch, moods, out, "--epochs", "6", "--quantize", "nf4", "--dtype", "float32")
    result = json.loads((out / "test.json").read_text())
    assert result["macro_f1"] > 0.8 > result["zero_shot"]["macro_f1"]
    clf = Classifier.load(out)
    assert {type(a.base) for a in lora.adapters(clf.backbone).values()} == {NF4Linear}
    run(eval_script, monkeypatch, out, "--json", tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["confusion"] == result["confusion"]


class Killed(Exception):
    pass


def train_and_die(monkeypatch, at: int, data: Path, out: Path, *arguments) -> None:
    """A run that ends without warning in its optimizer step number `at`."""
    calls, clip = [], torch.nn.utils.clip_grad_norm_

    def killed(*arguments):
        calls.append(1)
        if len(calls) == at:
            raise Killed
        return clip(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", killed)
        train(patch, data, out, *arguments)


def log_of(out: Path) -> list[dict]:
    """metrics.jsonl without the speeds."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [{k: v for k, v in r.items() if k != "examples_per_s"} for r in records]


def test_the_learning_rate_rises_and_falls(moods, tmp_path, monkeypatch):
    train(monkeypatch, moods, tmp_path / "run", "--epochs", 5, "--warmup", 0.4, "--lr", 3e-3)
    rates = {entry["step"]: entry["lr"] for entry in log_of(tmp_path / "run") if "lr" in entry}
    assert rates == pytest.approx({10: 3e-3 * 10 / 12, 20: 3e-3 * 11 / 18, 30: 3e-3 * 1 / 18})


def test_patience_ends_a_run_that_gets_no_better(moods, tmp_path, monkeypatch, capsys):
    train(monkeypatch, moods, tmp_path / "run", "--lr", 0, "--evals-per-epoch", 6, "--patience", 2)
    steps = [entry["step"] for entry in log_of(tmp_path / "run") if "validation" in entry]
    assert steps == [0, 1, 2]
    assert "no step did better than zero-shot: try another --lr" in capsys.readouterr().out
    before = artefacts(tmp_path / "run")
    with pytest.raises(ValueError, match="finished"):
        run(train_script, monkeypatch, "--out", tmp_path / "run", "--resume")
    assert artefacts(tmp_path / "run") == before


def test_patience_counts_from_the_last_better_validation(moods, tmp_path, monkeypatch):
    scores, evaluate = iter((0.1, 0.2, 0.1, 0.3, 0.1, 0.1, 0.9)), Classifier.evaluate

    def scored(clf, examples, name):
        score = {"macro_f1": next(scores)} if name.endswith("validation") else {}
        return evaluate(clf, examples, name) | score

    monkeypatch.setattr(Classifier, "evaluate", scored)
    train(monkeypatch, moods, tmp_path / "run", "--evals-per-epoch", 6, "--patience", 2)
    steps = [entry["step"] for entry in log_of(tmp_path / "run") if "validation" in entry]
    assert steps == [0, 1, 2, 3, 4, 5]


def test_two_runs_do_not_share_a_folder(moods, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = train_script.record

    def overtaken(*arguments):
        (tmp_path / "runs" / f"{moods.name}-1").mkdir(parents=True)
        return record(*arguments)

    monkeypatch.setattr(train_script, "record", overtaken)
    with pytest.raises(ValueError, match="another run has begun there"):
        run(train_script, monkeypatch, "--model", CHAT_TIED, "--data", moods)


def test_shots_are_shown_and_not_trained_on(moods, tmp_path, monkeypatch):
    train(monkeypatch, moods, tmp_path / "run", "--shots", 1, "--max-steps", 1)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    shown = [text for text, label in config["task"]["shots"]]
    assert len(shown) == 3
    assert config["examples"]["train"] == config["sampled_from"]["train"] - 3
    assert all(text in Classifier.load(tmp_path / "run").render("a") for text in shown)


@pytest.mark.parametrize("at", [1, 2, 5, 12])
def test_a_killed_run_resumes_to_the_same_bytes(at, moods, tmp_path, monkeypatch):
    train(monkeypatch, moods, tmp_path / "whole")
    train_and_die(monkeypatch, at, moods, tmp_path / "killed")
    assert not (tmp_path / "killed" / "test.json").exists()
    run(train_script, monkeypatch, "--out", tmp_path / "killed", "--resume")
    assert artefacts(tmp_path / "killed") == artefacts(tmp_path / "whole")
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")


def test_what_a_killed_process_left_half_written_is_removed(moods, tmp_path, monkeypatch):
    """And a log that was removed since then begins again, without what would stand before it."""
    out = tmp_path / "run"
    train_and_die(monkeypatch, 10, moods, out)
    for name in (".checkpoint.pt.123.part", ".mine.part"):
        (out / name).write_text("half")
    (out / "metrics.jsonl").unlink()
    run(train_script, monkeypatch, "--out", out, "--resume")
    assert [path.name for path in out.glob(".*")] == [".mine.part"]
    assert [entry["step"] for entry in log_of(out) if "loss" in entry] == [10, 12]


def test_ctrl_c_as_a_checkpoint_is_written_is_no_full_disk(moods, tmp_path, monkeypatch):
    class Pressed(io.BytesIO):
        def write(self, content):
            if self.tell():  # the zip writer then loses it
                raise KeyboardInterrupt
            return super().write(content)

    def written(path, mode="w"):
        return nullcontext(Pressed()) if path.name == "checkpoint.pt" else replacing(path, mode)

    monkeypatch.setattr(train_script, "replacing", written)
    with pytest.raises(KeyboardInterrupt):
        train(monkeypatch, moods, tmp_path / "run")


def test_resuming_another_task_is_refused(moods, tmp_path, monkeypatch):
    train_and_die(monkeypatch, 5, moods, tmp_path / "run")
    classes = "".join(f'[[classes]]\nlabel = "{label}"\n' for label in ("joy", "fear", "anger"))
    (moods / "task.toml").write_text(classes)
    with pytest.raises(ValueError, match="labels was .*anger.* and is now .*joy"):
        run(train_script, monkeypatch, "--out", tmp_path / "run", "--resume")


def test_resuming_needs_the_runs_name(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--resume needs --out"):
        run(train_script, monkeypatch, "--resume")


def test_resuming_with_other_settings_is_refused(moods, tmp_path, monkeypatch):
    train_and_die(monkeypatch, 5, moods, tmp_path / "run")
    with pytest.raises(ValueError, match="batch_size was 8 and is now 4"):
        train(monkeypatch, moods, tmp_path / "run", "--batch-size", 4, "--resume")


def test_what_is_to_be_trained_is_shown(moods, tmp_path, monkeypatch, capsys):
    """Of a text's prompts the first; and how many texts are no test, since training has them."""
    known = (moods / "train.jsonl").read_text().splitlines(keepends=True)[:5]
    with open(moods / "test.jsonl", "a") as file:
        file.writelines(known)
    given = ("--method", "pairs", "--max-steps", 1)
    train(monkeypatch, moods, tmp_path / "run", *given)
    screen = capsys.readouterr().out
    assert "test seen in training    5 of 23 texts" in screen and "validation seen" not in screen
    p, text = Classifier.load(tmp_path / "run").prompt, json.loads(known[0])["text"]
    shown = [line[4:] for line in screen.splitlines() if line.startswith("  | ")]
    assert "\n".join(shown) == p.opening + p.before + text + p.afters[0] + p.closing
    train(monkeypatch, moods, tmp_path / "shown", "--shots", 5, "--max-steps", 1)
    task = Classifier.load(tmp_path / "shown").task
    assert {text for text, _ in task.shots} & {json.loads(row)["text"] for row in known}
    assert "test seen in training    5 of 23 texts" in capsys.readouterr().out


@pytest.mark.parametrize("changed", ["train.jsonl", "model.safetensors", "tokenizer_config.json"])
def test_resuming_on_other_files_is_refused(changed, moods, tmp_path, monkeypatch):
    """Other texts, other weights, or another prompt, since the chat template is gone."""
    model = shutil.copytree(CHAT_TIED, tmp_path / "model")
    train_and_die(monkeypatch, 5, moods, tmp_path / "run", "--model", model)
    if changed == "train.jsonl":
        (moods / changed).write_text((moods / changed).read_text().replace("glad", "sad", 1))
    elif changed == "model.safetensors":
        content = bytearray((model / changed).read_bytes())
        content[-1] ^= 1
        (model / changed).write_bytes(content)
    else:
        (model / changed).unlink()
    said = "another prompt" if changed == "tokenizer_config.json" else f"{changed} was .* is now"
    with pytest.raises(ValueError, match=said):
        run(train_script, monkeypatch, "--out", tmp_path / "run", "--resume")


def test_data_and_model_that_have_moved_are_resumed_from(moods, tmp_path, monkeypatch):
    model, out = shutil.copytree(CHAT_TIED, tmp_path / "model"), tmp_path / "run"
    train_and_die(monkeypatch, 5, moods, out, "--model", model)
    there = model.rename(tmp_path / "model2"), moods.rename(tmp_path / "moods2")
    ask = ("--out", out, "--resume", "--model", there[0], "--data", there[1])
    run(train_script, monkeypatch, *ask)
    run(eval_script, monkeypatch, out)  # the run knows where they are now
    train(monkeypatch, there[1], tmp_path / "whole", "--model", there[0])
    assert artefacts(out) == artefacts(tmp_path / "whole")


def test_the_adapters_and_the_optimizers_settings_are_passed_on(moods, tmp_path, monkeypatch):
    seen, given = {}, ("--max-steps", 1, "--lora-alpha", 8, "--lora-dropout", 0.2)
    begin, inject = train_script.AdamW, lora.inject

    def watched(groups, **options):
        seen.update(options=options, optimizer=(optimizer := begin(groups, **options)))
        return optimizer

    monkeypatch.setattr(train_script, "AdamW", watched)
    monkeypatch.setattr(lora, "inject", lambda *x: seen.update(given=x[1:]) or inject(*x))
    train(monkeypatch, moods, tmp_path / "run", *given, "--weight-decay", 0.1, "--clip", 1e-3)
    assert seen["given"] == (4, 8.0, 0.2)
    options = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    assert options.items() <= seen["options"].items()
    moments = [state["exp_avg"].flatten() for state in seen["optimizer"].state.values()]
    gradient = torch.cat(moments) / (1 - 0.9)  # of the one step
    assert gradient.norm().item() == pytest.approx(1e-3, rel=1e-2)
    written = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (4, 8.0, 0.2)


def test_what_is_not_for_testing_sees_no_test_split(moods, tmp_path, monkeypatch):
    """Fitting, choosing and calibrating: with no such file they all work."""
    (moods / "test.jsonl").unlink()
    for method in ("logistic", "sliced_head"):
        given = ("--method", method, "--calibration", "fitted", "--max-steps", 1)
        train(monkeypatch, moods, tmp_path / method, *given)
        assert (tmp_path / method / "calibration.safetensors").exists()
    zero_shot = ("--model", CHAT_TIED, "--data", moods, "--calibration", "fitted", "--json")
    run(eval_script, monkeypatch, *zero_shot, tmp_path / "json", "--split", "train")
    assert json.loads((tmp_path / "json").read_text())["n"] == 48


def test_a_run_is_scored_on_the_data_that_are_given(moods, tmp_path, monkeypatch):
    train(monkeypatch, moods, tmp_path / "run", "--max-steps", 1)
    other = shutil.copytree(moods, tmp_path / "other")
    lines = (moods / "test.jsonl").read_text().splitlines(keepends=True)
    (other / "test.jsonl").write_text("".join(lines[:7]))
    for data, n in ((), 18), (("--data", other), 7):
        run(eval_script, monkeypatch, tmp_path / "run", *data, "--json", tmp_path / "json")
        assert json.loads((tmp_path / "json").read_text())["n"] == n


def test_a_finished_run_without_a_test_split_is_not_trained_again(moods, tmp_path, monkeypatch):
    (moods / "test.jsonl").unlink()
    train(monkeypatch, moods, tmp_path / "run", "--max-steps", 1)
    before = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="finished"):
        run(train_script, monkeypatch, "--out", tmp_path / "run", "--resume")
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == before


def test_ctrl_c_saves_and_says_how_to_go_on(moods, tmp_path, monkeypatch):
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), "--model", CHAT_TIED, "--data", str(moods),
               "--out", str(out), "--epochs", "200", "--evals-per-epoch", "1"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)  # fmt: skip
    deadline = time.time() + 60
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    screen = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "--resume" in screen
    stopped = torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["step"]
    assert 0 < stopped < 1200 and f"stopped after step {stopped}" in screen


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal here")
def test_a_closed_terminal_stops_after_the_step_at_hand(moods, tmp_path, monkeypatch):
    def hang_up(self) -> None:
        AdamW.step(self)
        steps.append(1)
        if len(steps) == 5:  # the terminal tells, then the shell; seen in the next step
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)

    steps, AdamW = [], train_script.AdamW
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    try:
        with monkeypatch.context() as patched:
            patched.setattr(train_script, "AdamW", type("Hung", (AdamW,), {"step": hang_up}))
            with pytest.raises(KeyboardInterrupt, match="stopped after step 6"):
                train(patched, moods, tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, before)
    train(monkeypatch, moods, tmp_path / "whole")
    run(train_script, monkeypatch, "--out", tmp_path / "run", "--resume")
    assert artefacts(tmp_path / "run") == artefacts(tmp_path / "whole")


def test_a_run_stopped_before_its_first_step_is_resumed(moods, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Classifier, "save", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(patched, moods, tmp_path / "run")
    train(monkeypatch, moods, tmp_path / "whole")
    run(train_script, monkeypatch, "--out", tmp_path / "run", "--resume")
    assert artefacts(tmp_path / "run") == artefacts(tmp_path / "whole")


def test_neither_git_nor_a_repository_is_needed(moods, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    train(monkeypatch, moods, tmp_path / "run", "--max-steps", 1)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["versions"]["commit"] == "unknown"


def test_not_a_number_stops_and_keeps_the_last_good_adapter(moods, tmp_path, monkeypatch):
    steps, cross_entropy = [], torch.nn.functional.cross_entropy

    def broken(*arguments, **settings):
        steps.append(1)
        loss = cross_entropy(*arguments, **settings)
        return loss * float("nan") if len(steps) == 5 else loss

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", broken)
    with pytest.raises(ValueError, match="nan at step 4; lower --lr"):
        train(monkeypatch, moods, tmp_path / "run")
    assert not tqdm._instances, "an open bar would be drawn once more, after the error"
    state = Classifier.load(tmp_path / "run").predict_proba(["glad sunny"])
    assert np.isfinite(state).all()


def test_weights_that_make_no_numbers_are_not_the_best(moods, tmp_path, monkeypatch):
    """The loss of the last step before a validation is that of the weights before it."""
    extra = ("--method", "hidden_mlp", "--lr", "1e30", "--max-steps", 1)
    with pytest.raises(ValueError, match="scores are not numbers; was --lr too high"):
        train(monkeypatch, moods, tmp_path / "run", *extra)
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda run: (run / "checkpoint.pt").write_bytes(b"PK" * 99),
            "checkpoint.pt: not readable",
        ),
        (lambda run: os.truncate(run / "checkpoint.pt", 5000), "checkpoint.pt: not readable"),
        (lambda run: os.truncate(run / "checkpoint.pt", 0), "checkpoint.pt: not readable"),
        (lambda run: change_settings(run, later=1), "began with later, which is no setting"),
        (lambda run: change_settings(run, method=None), "no run there"),
        (lambda run: (run / "config.json").write_text('{"settings": []}'), "no run there"),
        (lambda run: (run / "config.json").write_text('{"settings": null}'), "no run there"),
        (lambda run: remove_key(run, "task"), "no run there"),
        (lambda run: remove_key(run, "weights_sha256"), "no run there"),
    ],
)
def test_what_a_run_cannot_go_on_from_is_named(change, message, moods, tmp_path, monkeypatch):
    train_and_die(monkeypatch, 4, moods, tmp_path / "run")
    change(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        run(train_script, monkeypatch, "--out", tmp_path / "run", "--resume")


def locking(file: Path) -> subprocess.Popen:
    """A process that has a lock on the file, and says so."""
    code = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX)"
    code += "; print('mine', flush=True); sys.stdin.read()"
    command, pipe = [sys.executable, "-c", code, file], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe)
    assert process.stdout.readline() == b"mine\n"
    return process


@pytest.mark.skipif(train_script.fcntl is None, reason="no such locks here")
def test_two_processes_do_not_train_in_one_folder(moods, tmp_path, monkeypatch):
    train_and_die(monkeypatch, 4, moods, tmp_path / "run")
    (tmp_path / "new").mkdir()
    for name, how in (("run", "--resume"), ("new", "--recompute")):
        with locking(tmp_path / name / "metrics.jsonl") as other:
            before = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
            with pytest.raises(ValueError, match="another process is training there"):
                train(monkeypatch, moods, tmp_path / name, how)
            assert before == {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
            other.communicate()
        train(monkeypatch, moods, tmp_path / name, how)  # it has ended


def test_a_run_that_ends_while_another_loads_to_resume_it_is_left_alone(
    moods, tmp_path, monkeypatch
):
    train_and_die(monkeypatch, 4, moods, tmp_path / "run")
    record, log = train_script.record, tmp_path / "run" / "metrics.jsonl"

    def overtaken(*arguments):
        (tmp_path / "run" / "checkpoint.pt").unlink(missing_ok=True)
        return record(*arguments)

    before = log.read_bytes()
    monkeypatch.setattr(train_script, "record", overtaken)
    with pytest.raises(ValueError, match="has finished meanwhile"):
        run(train_script, monkeypatch, "--out", tmp_path / "run", "--resume")
    assert log.read_bytes() == before


@pytest.mark.skipif(train_script.fcntl is None, reason="no such locks here")
def test_where_there_are_no_locks_one_trains_all_the_same(moods, tmp_path, monkeypatch):
    def unknown(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(train_script.fcntl, "lockf", unknown)
    train(monkeypatch, moods, tmp_path / "run", "--max-steps", 1)


def test_another_tools_log_is_not_emptied(moods, tmp_path, monkeypatch):
    (log := tmp_path / "metrics.jsonl").write_text("loss 1\n")
    with pytest.raises(ValueError, match="holds a run already .metrics.jsonl"):
        train(monkeypatch, moods, tmp_path)
    assert log.read_text() == "loss 1\n"


def test_automatic_dtypes_are_float32_where_bfloat16_would_lose(monkeypatch):
    """Whether auto is said or not; elsewhere they are what the device computes fast."""
    fast = {"auto": "bfloat16"}
    monkeypatch.setattr(train_script, "choose_dtype", lambda dtype, _: fast.get(dtype, dtype))
    for model, method, dtype in [
        (CHAT_TIED, "sliced_head", "bfloat16"), (CHAT_TIED, "full", "float32"),
        (train_script.BUNDLED, "sliced_head", "float32"),
    ]:  # fmt: skip
        for said in ([], ["--dtype", "auto"]):
            given = ["--model", str(model), "--method", method, *said]
            monkeypatch.setattr(sys, "argv", ["train.py", *given])
            assert train_script.parse_settings().dtype == dtype
        monkeypatch.setattr(sys, "argv", ["train.py", *given[:4], "--dtype", "bfloat16"])
        assert train_script.parse_settings().dtype == "bfloat16"


def test_a_folder_with_an_adapter_is_no_place_for_a_run(moods, tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"\(adapter_config.json\); .*choose another --out"):
        train(monkeypatch, moods, tmp_path)
    assert (tmp_path / "adapter_config.json").read_text() == "{}"


def test_commands_that_are_shown_can_be_given(moods, tmp_path, monkeypatch, capsys):
    train(monkeypatch, moods, tmp_path / "my run", "--max-steps", 1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"python eval.py '{tmp_path / 'my run'}' --text \"...\"")


def change_settings(run: Path, **changes) -> None:
    """Other settings in config.json; those of None are left out."""
    config = json.loads((run / "config.json").read_text())
    settings = config["settings"] | changes
    config["settings"] = {k: v for k, v in settings.items() if v is not None}
    (run / "config.json").write_text(json.dumps(config))


def remove_key(run: Path, key: str) -> None:
    config = json.loads((run / "config.json").read_text())
    del config[key]
    (run / "config.json").write_text(json.dumps(config))


def test_a_finished_or_foreign_run_is_not_overwritten(moods, tmp_path, monkeypatch):
    train(monkeypatch, moods, tmp_path / "run", "--max-steps", 1)
    before = artefacts(tmp_path / "run")
    for extra, message in (([], "--resume, or choose another"), (["--resume"], "finished")):
        with pytest.raises(ValueError, match=message):
            train(monkeypatch, moods, tmp_path / "run", *extra)
    assert artefacts(tmp_path / "run") == before


def test_limits_are_samples_and_recorded(moods, tmp_path, monkeypatch, capsys):
    """Of every class its share, though the file has one class after the other."""
    rows = [json.loads(line) for line in (moods / "test.jsonl").read_text().splitlines()]
    write_jsonl(moods / "test.jsonl", sorted(rows, key=lambda row: row["label"]))
    train(monkeypatch, moods, tmp_path / "run", "--limit", 12, "--eval-limit", 6)
    screen = capsys.readouterr().out
    lines = [line for line in screen.splitlines() if "macro-F1 " in line and "interval" not in line]
    assert "12 train (of 48)" in screen and len(lines) > 5
    assert all("6 texts, a sample of 18" in line for line in lines), "a figure says what it is of"
    log = log_of(tmp_path / "run")
    assert {entry["validation"]["n"] for entry in log if "validation" in entry} == {6}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["examples"] == {"train": 12, "validation": 6, "test": 6}
    assert config["sampled_from"] == {"train": 48, "validation": 18, "test": 18}
    again = tmp_path / "again.json"
    run(eval_script, monkeypatch, tmp_path / "run", "--eval-limit", 6, "--json", again)
    assert "6 texts, a stratified sample of 18" in capsys.readouterr().out
    for path in (tmp_path / "run" / "test.json", again):
        result = json.loads(path.read_text())
        assert result["sampled_from"] == 18
        assert [scores["support"] for scores in result["per_class"].values()] == [2, 2, 2]


def test_csv_with_other_columns_and_no_validation_or_test_file(tmp_path, monkeypatch, capsys):
    """The shape of a public set: numeric label ids, columns of its own, gzip."""
    data = tmp_path / "data"
    data.mkdir()
    with gzip.open(data / "train.csv.gz", "wt", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "speaker", "utterance", "intent"])
        rows.writerows([i, "A", f"text, number {i}\nline", i % 3] for i in range(30))
    columns = ("--text-column", "utterance", "--label-column", "intent")
    train(monkeypatch, data, tmp_path / "run", "--max-steps", 2, *columns)
    screen = capsys.readouterr().out
    assert "a tenth of train (3 texts)" in screen and "27 train, 3 validation" in screen
    assert "seen in training" not in screen
    assert Classifier.load(tmp_path / "run").labels == ["0", "1", "2"]
    run(eval_script, monkeypatch, tmp_path / "run", "--split", "train")
    assert "30 texts" in capsys.readouterr().out
    zero_shot = ("--model", CHAT_TIED, "--data", data, "--split", "train", *columns)
    run(eval_script, monkeypatch, *zero_shot)
    assert "30 texts" in capsys.readouterr().out


def test_predict_streams_to_a_file_in_order(moods, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minislm.methods.WINDOW", 3)
    texts = [{"text": f"{'dark ' * (i % 4)}{i}", "n": i / 2 or None, "id": i} for i in range(10)]
    write_jsonl(tmp_path / "in.jsonl", texts)
    out = tmp_path / "out.jsonl"
    ask = ("--model", CHAT_TIED, "--data", moods, "--predict", tmp_path / "in.jsonl", "--out", out)
    run(eval_script, monkeypatch, *ask, "--keep", "id", "--keep", "n")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [list(r) for r in rows] == [["id", "n", "text", "label", "probabilities"]] * 10
    assert [{key: r[key] for key in ("text", "n", "id")} for r in rows] == texts
    with pytest.raises(ValueError, match="line 1: --keep ID: it has text, n, id"):
        run(eval_script, monkeypatch, *ask, "--keep", "ID")
    with open(tmp_path / "in.jsonl", "a") as file:
        file.write('{"text": null}\n')
    capsys.readouterr()
    with pytest.raises(ValueError, match="line 11: text must be"):  # before all work
        run(eval_script, monkeypatch, *ask[:-1], "-")
    assert capsys.readouterr().out == ""
    probabilities = Classifier.zero_shot(CHAT_TIED, moods).predict_proba([t["text"] for t in texts])
    for row, expected in zip(rows, probabilities):
        assert list(row["probabilities"]) == ["anger", "fear", "joy"]
        np.testing.assert_allclose(list(row["probabilities"].values()), expected, atol=1e-5)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)


def test_a_killed_prediction_leaves_no_half_a_file(moods, tmp_path):
    ask = ("--model", CHAT_TIED, "--data", moods, "--predict", "-", "--out", tmp_path / "out.jsonl")
    command = [sys.executable, ROOT / "eval.py", *map(str, ask)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob(".*.part")):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) == 143
    assert not [path for path in tmp_path.iterdir() if "out.jsonl" in path.name]


def test_scripts_run_where_the_screen_is_no_file(moods, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", screen := io.StringIO())  # a notebook's, say
    train(monkeypatch, moods, tmp_path / "run", "--max-steps", 1)
    run(eval_script, monkeypatch, tmp_path / "run", "--text", "a dark night")
    (tmp_path / "in.jsonl").write_text('{"text": "a dark night"}')
    run(eval_script, monkeypatch, tmp_path / "run", "--predict", tmp_path / "in.jsonl")
    assert screen.getvalue().count("a dark night") == 2


def test_predictions_appear_whole_or_not_at_all(moods, tmp_path, monkeypatch):
    monkeypatch.setattr("minislm.methods.WINDOW", 1)
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n{"text": "fi')
    arguments = ("--model", CHAT_TIED, "--data", moods, "--predict", tmp_path / "in.jsonl")
    with pytest.raises(ValueError, match="line 2"):
        run(eval_script, monkeypatch, *arguments, "--out", tmp_path / "out.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "moods"]


def test_predictions_do_not_replace_their_texts(moods, tmp_path, monkeypatch):
    (tmp_path / "link.jsonl").symlink_to(moods / "test.jsonl")
    before = (moods / "test.jsonl").read_bytes()
    ask = ("--model", CHAT_TIED, "--data", moods, "--predict", moods / "test.jsonl", "--out")
    with pytest.raises(ValueError, match="the texts are in it"):
        run(eval_script, monkeypatch, *ask, tmp_path / "link.jsonl")
    assert (moods / "test.jsonl").read_bytes() == before


def test_a_folder_for_the_figures_is_missed_before_the_work(moods, tmp_path, monkeypatch):
    monkeypatch.setattr(Classifier, "zero_shot", None)
    odd = {"no/x.json": "there is no folder", moods: "no regular", os.devnull: "no regular"}
    for file, message in odd.items():
        with pytest.raises(ValueError, match=message):
            run(eval_script, monkeypatch, "--model", CHAT_TIED, "--data", moods, "--json", file)


def test_half_a_character_does_not_end_a_long_job(moods, tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"text": "a \\ud800 b"}\n')
    arguments = ("--model", CHAT_TIED, "--data", moods, "--predict", tmp_path / "in.jsonl")
    run(eval_script, monkeypatch, *arguments, "--out", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"] == "a \ud800 b"


def test_options_that_would_be_ignored_are_refused(moods, tmp_path, monkeypatch):
    train(monkeypatch, moods, tmp_path / "run", "--max-steps", 1)
    refused = (
        "--chat none", "--text a --json f", "--text a --predict f", "--out f", "--eval-limit -1",
        "--predict f --out g.gz", "--predict f --out g.csv", "--eval-limit 9 --text a",
        "--split validation --predict f", "--keep id", "--predict f --keep label", "--json -",
    )  # fmt: skip
    for extra in map(str.split, refused):
        with pytest.raises(ValueError, match=extra[-2]):
            run(eval_script, monkeypatch, tmp_path / "run", *extra)


def test_a_run_whose_model_lost_its_chat_template_is_refused(moods, tmp_path, monkeypatch):
    """Its weights are the same, its prompt is not."""
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(CHAT_TIED, model)
    train(monkeypatch, moods, out, "--max-steps", 1, "--model", model)
    proba = Classifier.load(out).predict_proba(["so glad"])
    (model / "tokenizer_config.json").unlink()
    written = (out / "config.json").read_text()
    for known in (written, written.replace("prompt_ids", "unknown")):  # as once it was
        (out / "config.json").write_text(known)
        with pytest.raises(ValueError, match="prompt is not .*run's; is its chat template there"):
            Classifier.load(out)
    whole = Classifier.load(out, model=CHAT_TIED)
    assert json.loads((out / "config.json").read_text())["prompt"] == whole.render("")
    np.testing.assert_array_equal(whole.predict_proba(["so glad"]), proba)


def test_a_run_whose_model_ends_texts_with_another_token_is_refused(moods, tmp_path, monkeypatch):
    """Which no string of the prompt shows."""
    model, out = shutil.copytree(CHAT_TIED, tmp_path / "model"), tmp_path / "run"
    train(monkeypatch, moods, out, "--max-steps", 1, "--model", model, "--method", "similarity")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    with pytest.raises(ValueError, match="the prompt is not .*run's"):
        Classifier.load(out)


def test_a_run_whose_model_got_another_tokenizer_is_refused(moods, tmp_path, monkeypatch):
    """Such as one that splits texts otherwise, where the template's tokens are the same."""
    model = shutil.copytree(CHAT_TIED, tmp_path / "model")
    train(monkeypatch, moods, tmp_path / "run", "--max-steps", 1, "--model", model)
    content = json.loads((model / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not the tokenizer.json that"):
        Classifier.load(tmp_path / "run")


def test_a_run_that_lost_its_adapter_is_refused(moods, tmp_path, monkeypatch):
    train(monkeypatch, moods, tmp_path / "run", "--max-steps", 1)
    (tmp_path / "run" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="adapter_config.json: not readable"):
        Classifier.load(tmp_path / "run")


def test_a_file_in_the_place_of_the_run_folder_is_refused(moods, tmp_path, monkeypatch):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="run: a file"):
        train(monkeypatch, moods, tmp_path / "run")


def test_the_progress_bar_ends_where_the_steps_do(moods, tmp_path, monkeypatch, capsys):
    """48 examples in batches of 10: every fifth step has eight."""
    for steps, examples in ((1, 10), (5, 48), (6, 58)):
        given = ("--batch-size", 10, "--max-steps", steps)
        train(monkeypatch, moods, tmp_path / str(steps), *given)
        assert f" {examples}/{examples} " in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(moods):
    command = [sys.executable, ROOT / "eval.py", "--model", CHAT_TIED, "--data", moods]
    command = shlex.join(map(str, [*command, "--text", "a", "--text", "b"]))
    pipe = ["bash", "-c", f"set -o pipefail; {command} | true"]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    for process in [
        subprocess.Popen(pipe, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        for environment in (buffered, buffered | {"PYTHONUNBUFFERED": "1"})
    ]:
        assert process.communicate()[1] == b"" and process.returncode == 141


def test_a_run_on_other_weights_is_refused(moods, tmp_path, monkeypatch):
    train(monkeypatch, moods, tmp_path / "run", "--max-steps", 1)
    other = tmp_path / "other"
    shutil.copytree(CHAT_TIED, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="not the model.safetensors that"):
        Classifier.load(tmp_path / "run", model=other)


def test_texts_on_the_command_line(moods, monkeypatch, capsys):
    texts = ("--text", "so glad", "--text", "")
    run(eval_script, monkeypatch, "--model", CHAT_TIED, "--data", moods, *texts)
    screen = capsys.readouterr().out
    assert screen.startswith("so glad\n") and screen.count("%") == 6


def script(name: str, *arguments, stdin: str | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, arguments)], input=stdin,
                          env=environment, capture_output=True, text=True, timeout=100)  # fmt: skip


def test_standard_input_to_standard_output(moods):
    text = '{"text": "so glad"}\n\n{"text": "caf\\u00e9"}\n'
    done = script("eval.py", "--model", CHAT_TIED, "--data", moods, "--predict", "-", stdin=text)
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["so glad", "café"]


def test_training_loads_no_compiler(moods, tmp_path):
    """PyTorch's own AdamW would, for two seconds and 60 MB; ours is the same one for all else."""
    code = f"""
{BEFORE}
import train
sys.argv = ["train.py", "--model", {str(CHAT_TIED)!r}, "--data", {str(moods)!r}, "--max-steps", "2"]
sys.argv += ["--out", {str(tmp_path / "run")!r}]
train.main()
{LOADED}
weights = [torch.nn.Parameter(torch.arange(4.0)) for _ in range(2)]
for weight, kind in zip(weights, (train.AdamW, torch.optim.AdamW)):
    optimizer = kind([weight], lr=0.1, fused=True)
    for step in range(3):
        weight.pow(3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
print(torch.equal(*weights), weights[0].grad)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("set()\nTrue None\n"), done.stdout + done.stderr


def no_file(folder, name):
    (folder / name).unlink()


BAD_DATA = {
    "empty train file": (lambda d: (d / "train.jsonl").write_text(""), "no examples"),
    "one class": (lambda d: write_jsonl(d / "train.jsonl", [{"text": "a", "label": "x"}] * 9),
                  "at least two classes"),
    "unknown label": (lambda d: write_jsonl(d / "test.jsonl", [{"text": "a", "label": "x"}]),
                      "'x' is not one of"),
    "not UTF-8": (lambda d: (d / "train.jsonl").write_bytes('{"text": "é"'.encode("latin-1")),
                  "not UTF-8"),
    "no such column": (lambda d: write_jsonl(d / "train.jsonl", [{"txt": "a", "label": "x"}]),
                       "no column 'text'"),
    "no train file": (lambda d: no_file(d, "train.jsonl"), "no train file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_named_and_nothing_is_written(case, moods, tmp_path, monkeypatch):
    damage, message = BAD_DATA[case]
    damage(moods)
    with pytest.raises(ValueError, match=message):
        train(monkeypatch, moods, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "no/folder/here"], "no/folder/here"),
        (["--data", "no-such-folder"], "no-such-folder"),
        (["--batch-size", "0"], "--batch-size"),
        (["--lr", "-1"], "--lr"),
        (["--warmup", "100"], "--warmup must be .* and below 1, not 100"),
        (["--seed", "-1"], "--seed must be .* at least 0 and below 4294967296, not -1"),
        (["--method", "tfidf", "--shots", "1"], "shots: the prompt of tfidf has no place"),
        (["--device", "cuda:99"], "'cuda:99' is not one of cpu"),
        (["--clip", "-1"], "--clip"),
        (["--lr", "nan"], "--lr must be a finite number, .*not nan"),
        (["--lora-alpha", "inf"], "--lora-alpha must be a finite number, .*not inf"),
        (["--lora-rank", "0"], "rank"),
        (["--resume"], "no run there"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(
    arguments, message, moods, tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match=message):
        train(monkeypatch, moods, tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_errors_are_one_line_and_exit_status_2(moods, tmp_path):
    (moods / "train.jsonl").write_text("")
    given = "--model", CHAT_TIED, "--data", moods
    with ThreadPoolExecutor() as pool:
        found = [pool.submit(script, name, *given) for name in ("train.py", "eval.py")]
    for done in (future.result() for future in found):
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_imports_need_only_the_declared_packages():
    declared = {"torch", "safetensors", "tokenizers", "numpy", "huggingface_hub", "tqdm", "minislm"}
    for path in [*(ROOT / "minislm").glob("*.py"), ROOT / "train.py", ROOT / "eval.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            roots = {name.partition(".")[0] for name in names}
            assert roots <= declared | sys.stdlib_module_names, path

"""benchmarks/compare.py: its statistics against scipy and brute force; its runner on cells that end
well, fail, or were killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import compare
import compare_cells
import numpy as np
import pytest
import torch
from compare_cells import Cell, arguments
from compare_report import analyse, curve_table, plot, read_predictions, verdict
from conftest import write_jsonl
from significance import (
    FIGURES,
    bootstrap,
    expected_calibration_error,
    figures,
    holm,
    mcnemar,
)  # fmt: skip
from test_metrics import plain_f1, texts
from test_train import Killed, locking, log_of, run
from tqdm import tqdm

import train as train_script
from minislm.data import Example, Task
from minislm.metrics import evaluate

ROOT = Path(__file__).resolve().parent.parent
CORES = min(2, len(compare_cells.usable_cores()))


# -------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("a, b, p", [
    # scipy 1.17.1: scipy.stats.binomtest(min(a, b), a + b, 0.5).pvalue
    (3, 10, 0.09228515625), (10, 3, 0.09228515625), (0, 1, 1.0), (5, 5, 1.0), (0, 8, 0.0078125),
    (121, 163, 0.0148326825981), (1400, 1600, 0.000278563961039),
])  # fmt: skip
def test_mcnemar_is_scipys_exact_test(a, b, p):
    both_right, both_wrong = [(True, True)] * 7, [(False, False)] * 4
    pairs = np.array(both_right + [(True, False)] * a + both_wrong + [(False, True)] * b)
    assert mcnemar(*pairs.T) == pytest.approx(p, rel=1e-9)


def test_without_a_difference_nothing_is_significant():
    assert mcnemar(np.ones(9, bool), np.ones(9, bool)) == 1.0


def test_holm_as_worked_by_hand():
    # worked by hand: sorted p times 4, 3, 2, 1, then the running maximum, at most 1
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == []


def by_seed(n: int, classes: int, right: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """truth (N,) and predictions (S, N), a seed for each share of right ones."""
    found = [texts(n, classes, share) for share in right]
    return found[0][0], np.stack([predicted for _, predicted in found])


def test_figures_are_those_of_the_library_and_of_each_resample():
    truth, predicted = by_seed(60, 7, [4, 8])
    ours = figures(truth, predicted, 7)
    for s, row in enumerate(predicted):
        theirs = evaluate(truth, row, list("abcdefg"))
        assert ours[:, 0, s].tolist() == pytest.approx([theirs[k] for k in FIGURES], abs=1e-6)
    draws = np.random.default_rng(0).integers(0, 60, (20, 60))
    ours = figures(truth, predicted, 7, draws)
    for r, draw in enumerate(draws):
        for s, row in enumerate(predicted):
            expected = plain_f1(truth[draw], row[draw])
            assert ours[:, r, s].tolist() == pytest.approx([expected[k] for k in FIGURES], abs=1e-6)


def test_a_refusal_is_wrong_and_no_class():
    truth, refused = np.array([0, 0, 1, 1]), np.array([[0, -1, 1, 1]])
    macro, weighted, accuracy = figures(truth, refused, 3)[:, 0, 0]
    assert (macro, weighted, accuracy) == pytest.approx(((2 / 3 + 1) / 2, (2 / 3 + 1) / 2, 3 / 4))


def test_the_bootstrap_is_that_of_drawing_seeds_and_texts():
    truth, a = by_seed(150, 4, [2, 6, 9])
    b = by_seed(150, 4, [5])[1]
    ours, rng, brute = bootstrap(truth, {"a": a, "b": b}, 4), np.random.default_rng(7), []
    for _ in range(1500):
        draw = rng.integers(0, 150, 150)
        of_a = np.mean(
            [plain_f1(truth[draw], a[s][draw])["macro_f1"] for s in rng.integers(0, 3, 3)]
        )
        brute.append((of_a, plain_f1(truth[draw], b[0][draw])["macro_f1"]))
    brute = np.array(brute).T
    for values, expected in [
        (ours["a"][0], brute[0]), (ours["b"][0], brute[1]),
        (ours["a"][0] - ours["b"][0], brute[0] - brute[1]),
    ]:  # fmt: skip
        ends = (0.025, 0.5, 0.975)
        np.testing.assert_allclose(
            np.quantile(values, ends), np.quantile(expected, ends), atol=0.015
        )
        assert np.std(values) == pytest.approx(np.std(expected), rel=0.08)


def test_methods_see_the_same_resamples():
    truth, predicted = by_seed(80, 3, [6])
    draws = bootstrap(truth, {"a": predicted, "b": predicted}, 3, resamples=150)
    assert draws["a"].shape == (3, 150) and (draws["a"] == draws["b"]).all()
    other = bootstrap(truth, {"a": predicted}, 3, resamples=150, seed=1)
    assert (draws["a"] != other["a"]).any()
    several = by_seed(80, 3, [2, 9])[1]  # seeds are drawn for each by itself
    draws = bootstrap(truth, {"a": several, "b": several}, 3, resamples=150)
    assert 50 < (draws["a"][0] != draws["b"][0]).sum() < 140


def test_calibration_error_as_worked_by_hand():
    # 4 bins: (.5, .75] holds .6 (right), .7 (wrong) and .75 (right); (.75, 1] holds 1 (right)
    p = np.array([[0.6, 0.4], [0.7, 0.3], [0.25, 0.75], [1.0, 0.0]])
    error = expected_calibration_error(p, [0, 1, 1, 0], bins=4)
    assert error == pytest.approx(3 / 4 * abs(2 / 3 - 2.05 / 3) + 1 / 4 * 0)
    assert expected_calibration_error(np.eye(3), [1, 2, 0]) == 1


def analysed(tmp_path: Path, truth: np.ndarray, wrong: dict[str, list[int]]) -> dict:
    """What is said of methods that are wrong on so many texts, the first, a seed.

    They are 90% sure of each, and take as many seconds and GB, at as many texts per second.
    """
    groups = {method: [] for method in wrong}
    for method in wrong:
        for seed, n in enumerate(wrong[method]):
            folder = tmp_path / f"{method}-{seed}"
            folder.mkdir()
            said = np.where(np.arange(len(truth)) < n, 1 - truth, truth)
            sure = [{"a": 0.9, "b": 0.1}, {"a": 0.1, "b": 0.9}]
            rows = [{"text": "", "label": "ab"[i], "probabilities": sure[i]} for i in said]
            write_jsonl(folder / "predictions.jsonl", rows)
            training = {"trained": 0, "lr": None, "seconds": n, "peak_bytes": n * 10**9}
            cell = {"training": training, "texts_per_s": n, "predict_peak_bytes": n * 10**9}
            groups[method].append(cell | {"folder": str(folder)})
    return analyse(groups, truth, ["a", "b"])


def test_a_lead_of_one_text_is_none(tmp_path):
    """More than a third of the resamples leave that text out: the methods tie in them."""
    rows = analysed(tmp_path, np.array([0, 1] * 150), {"best": [20], "second": [21]})
    lead, low, high = rows["second"]["to_best"]
    assert low < lead < high == 0
    assert "not significant" in verdict(rows)


def test_the_interval_of_a_lead_is_one_of_macro_f1(tmp_path):
    """All errors are in a class of a tenth of the texts: weighted-F1's lead is a third of it."""
    rows = analysed(tmp_path, np.array([0] * 20 + [1] * 180), {"best": [2], "second": [12]})
    lead, low, high = rows["second"]["to_best"]
    assert low < lead - 0.05 and lead + 0.05 < high < 0


def test_a_row_is_of_all_seeds(tmp_path):
    row = analysed(tmp_path, np.array([0, 1] * 20), {"only": [8, 16, 3]})["only"]
    assert row["seeds"] == 3 and np.sum(row["confusion"]) == np.sum(row["reliability"][0]) == 120
    assert row["accuracy"][0] == pytest.approx(1 - 9 / 40)
    assert row["ece"] == pytest.approx((0.1 + 0.3 + 0.025) / 3)  # .8, .6 and .925 are right
    assert row["training_s"] == row["texts_per_s"] == 9
    assert row["training_gb"] == row["inference_gb"] == 16


def test_every_pair_of_methods_counts_as_a_test(tmp_path):
    """The best is found on the same texts, so that it is compared with is no plan made before."""
    truth = np.array([0, 1] * 20)
    rows = analysed(tmp_path, truth, {"worst": [30, 29], "best": [4, 4], "middle": [12, 11]})
    assert list(rows) == ["best", "middle", "worst"] and "to_best" not in rows["best"]
    for method in ("middle", "worst"):
        lead, low, high = rows[method]["to_best"]
        assert lead == rows[method]["macro_f1"][0] - rows["best"]["macro_f1"][0]
        assert low < lead < high < 0
    # McNemar's, of the first seed: only one is right, and always the better: 2 / 2**n
    assert rows["middle"]["mcnemar_p"] == 2 / 2**8 and rows["worst"]["mcnemar_p"] == 2 / 2**26
    assert rows["worst"]["holm_p"] == 3 * 2 / 2**26  # the least of three; the second is 2 / 2**18
    assert rows["middle"]["holm_p"] == 2 / 2**8  # the largest of three
    assert rows["middle"]["wrong_more_often"] and rows["worst"]["wrong_more_often"]


# -------------------------------------------------------------------------------- runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A comparison of two seeds, of which one was killed before, and a method that fails."""
    out = tmp_path_factory.mktemp("compare") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command(out))
        a = compare.parse_arguments()
        compare.prepare(a)
        cell, calls, clip = Cell("sliced_head", 1), [], torch.nn.utils.clip_grad_norm_
        given = [*arguments(cell, a), "--data", out / "data"]

        def killed(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise Killed
            return clip(*arguments)

        patch.setattr(torch.nn.utils, "clip_grad_norm_", killed)
        with pytest.raises(Killed):
            run(train_script, patch, *given, "--out", out / cell.name)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        run(train_script, patch, *given, "--out", out.parent / "whole")
        run(compare, patch, *command(out)[1:])
    return out


def command(out: Path, *more: str) -> list[str]:
    given = {
        "model": ROOT / "weights" / "tiny", "data": ROOT / "examples" / "desk", "out": out,
        "methods": "sliced_head,similarity:zero", "embedder": ROOT / "tests",  # which is no model
        "seeds": 2, "limit": 16, "eval-limit": 24, "epochs": 1, "threads": CORES, "jobs": CORES,
    }  # fmt: skip
    return ["compare.py", *(str(x) for k, v in given.items() for x in (f"--{k}", v)), *more]


def cell_of(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "cell.json").read_text())


def test_the_table_is_that_of_the_predictions(folder):
    rows = [json.loads(line) for line in (folder / "test.jsonl").open()]
    labels = sorted({row["label"] for row in rows})
    truth, found = np.array([labels.index(row["label"]) for row in rows]), []
    for seed in (0, 1):
        lines = (folder / f"sliced_head-seed{seed}" / "predictions.jsonl").open()
        predicted = [json.loads(line) for line in lines]
        assert [p["text"] for p in predicted] == [row["text"] for row in rows] and len(rows) == 24
        found.append(evaluate(truth, [labels.index(p["label"]) for p in predicted], labels))
    table = (folder / "table.md").read_text()
    cells = next(x for x in table.splitlines() if x.startswith("| sliced_head")).split("|")[2:5]
    for key, cell in zip(FIGURES, cells):
        mean = np.mean([result[key] for result in found])
        value, low, high = map(float, re.findall(r"[\d.]+", cell))
        assert value == pytest.approx(mean, abs=5.1e-4) and low < value < high
    assert "16 train (of 522), 24 validation (of 138), 24 test (of 320) texts" in table


def test_a_cell_says_what_it_took(folder):
    cell = cell_of(folder, "sliced_head-seed0")
    assert cell["threads"] == 1 and cell["training"]["seconds"] > 0.5 and cell["texts_per_s"] > 1
    assert cell["training"]["trained"] == 358_400 and cell["training"]["lr"] == 4e-3
    for peak in (cell["training"]["peak_bytes"], cell["predict_peak_bytes"]):
        assert 1e8 < peak < 2e9


def test_a_process_does_not_inherit_the_peak_of_this_one(tmp_path):
    log, held = tmp_path / "log", np.ones(2 * 10**7)  # 160 MB
    _, peak = compare_cells.run_process(
        ["-c", "pass"], log, compare_cells.usable_cores()[:1], set()
    )
    assert peak < 1e8 < held.nbytes


@pytest.mark.parametrize("seconds", [2, 40])
def test_speed_is_that_of_the_whole_job(seconds, monkeypatch, tmp_path):
    """Where a text takes more than a second, the progress bar says how many it takes."""
    monkeypatch.setattr(sys, "argv", command(tmp_path))
    a = compare.parse_arguments()
    a.where = {}

    def run_process(command, log, *_):
        times = {1: seconds / 2, 8: seconds}
        log.write_text("\r".join(tqdm.format_meter(n, 8, times[n], unit=" texts") for n in times))
        write_jsonl(command[-1], [{"text": "", "label": "a"}] * 8)
        return seconds, 10**9

    monkeypatch.setattr(compare_cells, "run_process", run_process)
    given = Cell("sliced_head:zero", 0), a, Task.of_labels("ab"), np.zeros(8, int)
    assert compare_cells.run_cell(*given, a.cores, set())["texts_per_s"] == 8 / seconds


def test_train_sees_no_test_text(folder):
    assert {p.name for p in (folder / "data").iterdir()} == {
        "train.jsonl", "validation.jsonl", "task.toml",
    }  # fmt: skip


def test_a_killed_cell_resumes_to_what_it_would_have_been(folder):
    cell, whole = folder / "sliced_head-seed1", folder.parent / "whole"
    training = json.loads((cell / "training.json").read_text())
    assert training["resumed"] and training["seconds"] is None
    adapters = [(run / "adapter_model.safetensors").read_bytes() for run in (cell, whole)]
    assert adapters[0] == adapters[1] and log_of(cell) == log_of(whole)


def test_a_closed_terminal_stops_the_cells_too(tmp_path):
    given = [*command(tmp_path / "out")[1:], "--methods", "sliced_head", "--epochs", "500"]
    own = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    own["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests' nohup
    process = subprocess.Popen([sys.executable, ROOT / "benchmarks" / "compare.py", *given], **own)
    cell, deadline = tmp_path / "out" / "sliced_head-seed0", time.time() + 90
    try:
        while not (cell / "checkpoint.pt").exists():
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGHUP)
        assert "the same command goes on" in process.communicate(timeout=60)[1]
    finally:
        process.terminate()
    assert process.returncode == 130
    assert "stopped after step" in (cell / "train.log").read_text()  # and so by itself


def test_a_cell_stops_where_the_comparison_is_killed(tmp_path):
    """As by Ctrl-C; or it would go on unseen, beside the cells of the next call."""
    script = "import time\nprint(1, flush=True)\ntry: time.sleep(60)\nfinally: print('stopped')"
    (tmp_path / "script.py").write_text(script)
    call = "import sys; from compare_cells import *; "
    call += "run_process(sys.argv[1:], Path('log'), usable_cores()[:1], set())"
    begun = subprocess.Popen(
        [sys.executable, "-c", call, "script.py"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"},
    )  # fmt: skip
    log, deadline = tmp_path / "log", time.time() + 60
    for printed in ("1", "stopped"):
        while not log.exists() or printed not in log.read_text():
            assert time.time() < deadline
            time.sleep(0.1)
        begun.kill()
    begun.wait()


def test_a_failing_cell_is_reported_and_the_rest_goes_on(folder):
    assert not (folder / "similarity-zero-seed0" / "cell.json").exists()
    failed = [x for x in (folder / "table.md").read_text().splitlines() if "- failed" in x]
    assert len(failed) == 1 and "similarity-zero-seed0" in failed[0] and "config.json" in failed[0]


def test_a_second_call_runs_only_what_failed(folder, monkeypatch, capsys):
    commands, table = [], (folder / "table.md").read_text()

    def refuse(command, *rest):
        commands.append(command)
        raise ValueError("once more")

    monkeypatch.setattr(compare_cells, "run_process", refuse)
    run(compare, monkeypatch, *command(folder)[1:])
    assert len(commands) == 1 and "similarity" in commands[0]
    assert "2 of 3 cells are finished already" in capsys.readouterr().out
    again = (folder / "table.md").read_text()
    assert again.splitlines()[:5] == table.splitlines()[:5] and "once more" in again
    run(compare, monkeypatch, *command(folder)[1:], "--seeds", "3", "--table-only")
    assert len(commands) == 1 and "sliced_head: only 2" in (folder / "table.md").read_text()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--epochs", "2"], "--epochs 1.* now to be run with .*--epochs 2.*another --out"),
        (["--limit", "17"], "examples was .*'train': 16.* is now .*'train': 17"),
        (["--methods", "tfidf,slicedhead"], "'slicedhead' is not one of sliced_head, letters"),
        (["--methods", "sliced_head,tfidf:zero"], "'tfidf:zero' is not one of .*, letters:zero"),
        (["--methods", "encoder_mlp"], "needs --encoder"),
        (["--lr", "letters=1e-3"], "'letters' is not one of"),
        (["--lr", "-1"], "above 0"),
        (["--curve", "500"], "has .* training examples"),
        (["--jobs", "3"], "a job needs a thread"),
        (["--lr", "sliced_head=x"], "--lr: 'x' is no number"),
        (["--limit", "-1"], "--limit and --eval-limit must be at least 0"),
        (["--", "--device", "cpu"], "--device after -- or in --for .* give compare"),
        (["--for", "sliced_head=--device cpu"], "--device after -- or in --for"),
        (["--for", "letters=--head-lr 1"], "'letters' is not one of"),
        (["--", "--seed", "5"], "--seed after -- or in --for .* give compare"),
        (["--for", "sliced_head=--limit=3"], "--limit after -- or in --for"),
        (["--", "--lr", "1e-3"], "--lr after -- or in --for .* give compare"),
    ],
)
def test_what_cannot_be_compared_is_refused(folder, monkeypatch, more, message):
    with pytest.raises(ValueError, match=message):
        run(compare, monkeypatch, *command(folder)[1:], *more)


def test_cells_of_another_model_in_the_same_place_are_refused(folder, monkeypatch):
    monkeypatch.setattr(compare_cells, "weights_of", lambda model: {"model.safetensors": "0"})
    with pytest.raises(ValueError, match="its model's files are others now"):
        run(compare, monkeypatch, *command(folder)[1:])
    monkeypatch.setattr(compare_cells, "weights_of", None)  # a table needs no model
    run(compare, monkeypatch, *command(folder)[1:], "--table-only")


def test_a_stopped_cell_goes_on_as_it_began(folder, monkeypatch, tmp_path):
    """An option that the command no longer has would be the resumed run's all the same."""
    moved = shutil.copytree(folder, tmp_path / "moved")
    for name in ("training.json", "cell.json"):
        (moved / "sliced_head-seed0" / name).unlink()
    given = [*command(moved)[1:], "--table-only", "--for", "sliced_head=--patience 3"]
    given += ["--methods", "sliced_head", "--seeds", "1"]
    with pytest.raises(ValueError, match="no cell succeeded: none was run"):
        run(compare, monkeypatch, *given)  # it would begin again
    (moved / "sliced_head-seed0" / "checkpoint.pt").touch()
    with pytest.raises(ValueError, match="begun.json: .* now to be run with .*--patience 3"):
        run(compare, monkeypatch, *given)


@pytest.mark.skipif(train_script.fcntl is None, reason="no such locks here")
def test_two_processes_do_not_compare_in_one_folder(folder, monkeypatch):
    with locking(folder / "lock") as other:
        with pytest.raises(ValueError, match="another process"):
            run(compare, monkeypatch, *command(folder)[1:])
        other.communicate()


def test_other_data_of_the_same_name_are_refused(folder, monkeypatch, tmp_path):
    """Such as the words that another task.toml gives the classes: finished cells had the old."""
    data = shutil.copytree(ROOT / "examples" / "desk", tmp_path / "desk")
    moved = shutil.copytree(folder, tmp_path / "moved")
    given = [*command(moved)[1:], "--data", data, "--table-only"]
    run(compare, monkeypatch, *given)  # the same, in other places
    task = data / "task.toml"
    task.write_text(task.read_text().replace("meaning", "synonyms = []\nmeaning", 1))
    with pytest.raises(ValueError, match="sha256 was .*task.toml.*another --out"):
        run(compare, monkeypatch, *given)


def test_rates_are_chosen_on_validation(monkeypatch, tmp_path):
    more = ["--methods", "sliced_head,tfidf,letters,pairs", "--lr-search", "1e-4,1e-3,1e-2"]
    more += ["--lr", "pairs=1e-2"]  # and so not searched
    monkeypatch.setattr(sys, "argv", command(tmp_path, *more))
    a, seen = compare.parse_arguments(), []

    def run_cells(cells, *rest):
        seen.extend(cells)
        scores = {1e-4: 0.5, 1e-3: 0.7, 1e-2: 0.6}
        done = [c for c in cells if c.method == "sliced_head"]
        return {c: {"macro_f1": 1 - c.lr, "training": {"validation": scores[c.lr]}} for c in done}

    monkeypatch.setattr(compare, "run_cells", run_cells)
    compare.choose_rates(a, None, None, {})
    assert {c.method for c in seen} == {"sliced_head", "letters"} and {c.seed for c in seen} == {0}
    assert a.rates["sliced_head"] == 1e-3 and a.rates["tfidf"] is None
    assert a.rates["pairs"] == 1e-2
    assert a.methods == ["sliced_head", "tfidf", "pairs"]  # letters failed at every rate
    drawn = {"data": "", "examples": {}, "sampled_from": {}}
    lines = compare.notes(a, drawn, {m: {"seeds": 3, "lr": a.rates[m]} for m in a.methods}, [])
    assert lines[-2].endswith("at an end of these: none")


def test_each_method_gets_its_model_and_rate(monkeypatch, tmp_path):
    methods = "encoder_mlp,similarity:zero,embedding_mlp,letters,tfidf"
    more = ["--methods", methods, "--encoder", "E", "--embedder", "S"]
    more += ["--lr", "published,letters=1"]
    more += ["--for", "encoder_mlp=--head-lr 5e-3", "--for", "encoder_mlp=--warmup 0.1"]
    more += ["--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command(tmp_path, *more))
    a = compare.parse_arguments()
    given = [arguments(Cell(m, 3, a.rates[m], 8), a) for m in methods.split(",")]
    options = [dict(zip(x[::2], x[1::2])) for x in given]
    assert [o["--model"] for o in options[:3]] == ["E", "S", a.model]
    assert [o.get("--lr") for o in options] == ["5e-05", None, "5e-05", "1.0", None]
    assert [o.get("--head-lr") for o in options] == ["5e-3", None, None, None, None]
    assert [o.get("--warmup") for o in options] == ["0.1", None, None, None, None]
    assert [o["--device"] for o in options] == ["cpu"] * 5
    assert "--seed" not in options[1] and "--epochs" not in options[4]
    assert Cell("similarity:zero", 0, None, 8).name == "similarity-zero-n8-seed0"


def test_a_prompt_for_training_alone_is_refused_where_zero_shot_is_compared(monkeypatch, tmp_path):
    more = ["--methods", "letters,letters:zero"]
    shared = ["--", "--instruction", "Choose.", "--evals-per-epoch", "1"]
    own = ["--for", "letters:zero=--instruction Choose."]
    monkeypatch.setattr(sys, "argv", command(tmp_path, *more, *shared))
    with pytest.raises(ValueError, match="--instruction after -- .*--for letters:zero="):
        compare.parse_arguments()
    monkeypatch.setattr(sys, "argv", command(tmp_path, *more, *own, *shared))
    a = compare.parse_arguments()
    for cell in (Cell("letters", 0), Cell("letters:zero", 0)):
        assert arguments(cell, a).count("Choose.") == 1


def test_a_cell_that_is_asked_for_twice_runs_once(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", command(tmp_path, "--lr-search", "1e-3,0.001"))
    a, ran = compare.parse_arguments(), []
    a.out = tmp_path
    monkeypatch.setattr(compare_cells, "run_cell", lambda c, *_: ran.append(c) or {"macro_f1": 0.5})
    cells = [Cell("sliced_head", 0, lr) for lr in a.lr_search]
    assert list(compare_cells.run_cells(cells, a, None, None, {})) == ran == cells[:1]


def test_larger_samples_hold_the_smaller():
    examples = [Example(f"{label}{i}", label) for i in range(30) for label in "ab"]
    few, more = (compare.few_a_class(examples, n) for n in (3, 9))
    assert set(few) < set(more) and [e for e in examples if e in set(more)] == more
    assert [sum(e.label == label for e in more) for label in "ab"] == [9, 9]


def test_the_folder_is_named_after_the_data(monkeypatch):
    given = command(Path("x"))
    at = given.index("--out")
    monkeypatch.setattr(sys, "argv", given[:at] + given[at + 2 :])
    assert compare.parse_arguments().out == Path("runs/compare-desk")


def test_a_curve_draws_from_more_than_the_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", command(tmp_path, "--curve", "3,20"))  # --limit: 2 a class
    compare.prepare(compare.parse_arguments())
    for name, n in (("data", 2), ("data-3", 3), ("data-20", 20)):
        rows = map(json.loads, (tmp_path / name / "train.jsonl").open())
        assert [*Counter(row["label"] for row in rows).values()] == [n] * 8


def test_refusals_and_missing_probabilities_are_read(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"text": "", "label": x} for x in ("b", None, "a")])
    predicted, probabilities = read_predictions(tmp_path / "p.jsonl", ["a", "b"], 3)
    assert predicted.tolist() == [1, -1, 0] and probabilities is None
    with pytest.raises(ValueError, match="3 predictions of 4 texts"):
        read_predictions(tmp_path / "p.jsonl", ["a", "b"], 4)


@pytest.mark.parametrize("low, p, wrong, said", [
    (0.01, 0.01, True, "significant by both"), (-0.01, 0.2, True, "not significant"),
    (0.01, 0.2, True, "Only the interval"), (-0.01, 0.01, True, "Only McNemar"),
    (0.01, 0.01, False, "Only the interval .* second is right more often"),
    (-0.01, 0.01, False, "not significant.* second is right more often"),
])  # fmt: skip
def test_the_verdict_needs_both_tests(low, p, wrong, said):
    """Macro-F1 may be highest where fewer texts are right; McNemar's test is about these."""
    second = {"to_best": [-0.02, -0.04, -low], "holm_p": p, "wrong_more_often": wrong}
    sentence = verdict({"best": {}, "second": second})
    assert f"0.020 (95% interval {low:.3f} to 0.040) above second" in sentence
    assert re.search(said, sentence)


def test_the_plot_and_the_curve(tmp_path):
    pytest.importorskip("matplotlib")
    row = dict.fromkeys(FIGURES, [0.5, 0.4, 0.6]) | {
        "confusion": [[3, 1, 0], [1, 2, 1]],
        "ece": 0.1,
    }
    rows = {
        "a": row | {"reliability": [[0, 4], [0, 0.8], [0, 0.7]]},
        "b": row | {"reliability": None},
    }
    curve = {"a": {0: [0.5, 0.4, 0.6], 8: [0.3, 0.2, 0.4]}, "b": {0: [0.4, 0.3, 0.5]}}
    lines = curve_table(curve, 1000).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[2:4]] == ["8", "1,000 in all"]
    assert "0.300 (0.200 to 0.400)" in lines[2] and lines[3].split("|")[2].strip() == "-"
    plot(path := tmp_path / "new" / "p.png", rows, curve, ["x", "y"])
    assert path.read_bytes().startswith(b"\x89PNG")

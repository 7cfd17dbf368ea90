"""benchmarks/speed.py: what it times of minislm is what a user gets."""

from dataclasses import asdict

import numpy as np
import pytest
import speed
import torch
from conftest import CHAT_TIED
from test_text import TASK

from minislm import Classifier
from minislm.decoder import DecoderConfig
from minislm.packing import common_prefix

TEXTS = ["glad and sunny", "dark", "they shout at me"]
SETTINGS = {
    "how": "minislm", "job": "inference", "model": str(CHAT_TIED), "task": asdict(TASK),
    "dtype": "float32", "quantize": "", "device": "cpu", "batch_size": 2, "texts": TEXTS,
    "targets": [2, 1, 0],
}  # fmt: skip


def test_useful_work_as_counted_by_hand():
    """Two blocks, a shared prefix of two tokens, and texts of one token and of two."""
    c = DecoderConfig(9, 4, 6, 2, num_attention_heads=2, num_key_value_heads=1, head_dim=3)
    prompts = [[1, 2, 3], [1, 2, 4, 5]]
    # weights: q, o, gate, up and down have 24, k and v 12: 144; k and v see 5 tokens in the last
    # block as well, the others 2. In the first, 13 pairs of query and key, in the last 3 + 4.
    inference = 5 * 144 + (5 * 24 + 2 * 120) + 2 * 6 * (13 + 7) + 2 * 3 * 4
    assert speed.useful_flops(c, prompts, classes=3) == 2 * inference
    # gradients of inputs, but not of the frozen embedding: none for the first q, k and v
    training = 5 * (48 + 2 * 96) + 2 * (5 * 24 + 2 * 120) + 3 * 2 * 6 * (13 + 7) + 2 * 2 * 3 * 4
    # adapters of rank 1: three products with A (in) and three with B (out), the first two with A
    training += 5 * ((8 + 18) + 2 * (8 + 9) + 4 * 3 * 10) + 5 * 2 * 3 * 7 + 2 * 5 * 3 * 10
    assert speed.useful_flops(c, prompts, classes=3, rank=1) == 2 * training


def test_a_table_of_speeds_leaves_the_round_of_warming_up_out():
    def rounds(*seconds: float) -> list[dict]:
        return [{"seconds": s, "peak": 1.25} for s in (99, *seconds)]

    answers = {
        "minislm-float32": rounds(2, 1, 4), "minislm-int8": rounds(1, 1, 1),
        "full-float32": rounds(8, 8, 8), "prefix-float32": rounds(4, 4, 4),
        "prefix-bfloat16": rounds(2, 2, 2),
        "roof": [{"rates": {"float32": rate, "int8": 100.0}} for rate in (1.0, 10.0, 10.0, 10.0)],
    }  # fmt: skip
    off = "off", dict.fromkeys(answers, "0")
    lines = speed.speed_table("texts/s", "full", 8, [0, 4e9, 4e9, 4e9], (answers, {}), off)
    rows = {x.split("|")[1].strip(): x.replace(" ", "").split("|")[2:] for x in lines.splitlines()
            if x.startswith("| ")}  # fmt: skip
    # 4, 8 and 2 texts/s; over 1 of full, 2 of the best peer in float32; of 10 GFLOP/s 2
    assert rows["minislm-float32"][:8] == ["4", "150%", "4.00", "2.00", "0", "1.25", "2", "20%"]
    assert rows["minislm-int8"][:8] == ["8", "0%", "8.00", "2.00", "0", "1.25", "4", "4%"]
    assert rows["prefix-bfloat16"][2:4] == ["-", "1.00"] and rows["prefix-bfloat16"][7] == "-"


def test_a_round_of_inference_is_a_whole_job(monkeypatch):
    clf, calls = Classifier.zero_shot(CHAT_TIED, TASK, "float32"), []
    monkeypatch.setattr(speed, "load_minislm", lambda settings: clf)
    extend = clf.backbone.extend
    monkeypatch.setattr(clf.backbone, "extend", lambda *given: calls.append(1) or extend(*given))
    job = speed.load_inference(SETTINGS)
    for rounds in (1, 2):
        assert job() == {"probabilities": clf.predict_proba(TEXTS).tolist()}
        assert len(calls) == rounds, "the shared prefix is computed in each round, and once"


@pytest.mark.parametrize("how", ["minislm", "minislm-compiled"])
@pytest.mark.parametrize("load", [speed.load_inference, speed.load_training])
def test_one_contender_is_compiled(load, how, monkeypatch):
    compiled = []
    monkeypatch.setattr(Classifier, "compile", lambda clf, training: compiled.append(training))
    load(SETTINGS | {"how": how})
    assert compiled == [load is speed.load_training] * (how == "minislm-compiled")


@pytest.mark.parametrize("how", ["full", "last", "sorted", "prefix"])
def test_peers_do_the_same_job(how, monkeypatch):
    """In the order that they are said to have, and with what is shared computed once or always."""
    pytest.importorskip("transformers", "5.21")
    clf = Classifier.zero_shot(CHAT_TIED, TASK, "float32")
    seen, class_logits = [], speed.class_logits
    prompts = [clf.prompt.branches(text)[0] for text in TEXTS]

    def spy(model, how, batch, label_ids, shared, cache):
        seen.extend((len(prompt), shared) for prompt in batch)
        return class_logits(model, how, batch, label_ids, shared, cache)

    monkeypatch.setattr(speed, "class_logits", spy)
    own = {"how": how, "prompts": prompts, "label_ids": clf.label_token_ids}
    found = speed.load_inference(SETTINGS | own)()["probabilities"]
    np.testing.assert_allclose(found, clf.predict_proba(TEXTS), atol=1e-5)
    lengths, shared = [len(prompt) for prompt in prompts], len(common_prefix(prompts))
    assert lengths != sorted(lengths, reverse=True) and shared > 10
    orders = {"full": lengths, "last": lengths}
    assert [n for n, _ in seen] == orders.get(how, sorted(lengths, reverse=True))
    assert {n for _, n in seen} == {shared if how == "prefix" else 0}


@pytest.mark.parametrize("how", ["minislm", "peft", "peft-last"])
def test_a_round_of_training_begins_at_the_loss_of_the_model(how, monkeypatch):
    how == "minislm" or pytest.importorskip("transformers", "5.21") and pytest.importorskip("peft")
    optimizers, adamw = [], speed.AdamW

    def made(*arguments, **settings):
        optimizers.append(adamw(*arguments, **settings))
        return optimizers[-1]

    monkeypatch.setattr(speed, "AdamW", made)
    clf = Classifier.zero_shot(CHAT_TIED, TASK, "float32")
    expected = -torch.tensor(clf.predict_proba(TEXTS)[range(3), SETTINGS["targets"]]).log().mean()
    prompts = [clf.prompt.branches(text)[0] for text in TEXTS]
    own = {"how": how, "prompts": prompts, "label_ids": clf.label_token_ids}
    trained = []
    for dropout in (speed.DROPOUT, 0.0):
        monkeypatch.setattr(speed, "DROPOUT", dropout)
        answer = speed.load_training(SETTINGS | own)(batches=[[0, 1, 2], [2, 0, 1]])
        assert abs(answer["first_loss"] - expected) < 1e-5  # dropout is the adapters', which are 0
        (group,) = optimizers[-1].param_groups
        trained.append(torch.cat([p.flatten() for p in group["params"]]))
    assert len(group["params"]) == 2 * 14 and all(p.grad is None for p in group["params"])
    assert all(optimizers[-1].state[p]["step"] == 2 for p in group["params"])
    assert not torch.equal(*trained), "with dropout it learns something else"


def test_growth_computes_the_prefix_apart_from_the_texts(monkeypatch):
    seen = []
    hidden = speed.last_hidden
    spy = lambda *given: seen.append(given) or hidden(*given)  # noqa: E731
    monkeypatch.setattr(speed, "last_hidden", spy)
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7, 10]]
    speed.load_growth(SETTINGS)(prompts=prompts, shared=3, classes=2)
    ((decoder, (own, *_), cache),) = seen
    assert own.tolist() == [[8, 9], [10, -1]]
    assert cache.real.shape == (1, 3)

"""benchmarks/speed.py: what it times of minislm is what a user gets."""

from dataclasses import asdict

import speed
import torch
from test_text import CHAT_TIED, TASK

from minislm import Classifier

TEXTS = ["glad and sunny", "dark", "they shout at me"]
SETTINGS = {
    "how": "minislm", "job": "inference", "model": str(CHAT_TIED), "task": asdict(TASK),
    "dtype": "float32", "quantize": "", "device": "cpu", "batch_size": 2, "texts": TEXTS,
    "targets": [2, 1, 0],
}  # fmt: skip


def test_a_round_of_inference_is_a_whole_job(monkeypatch):
    clf, calls = Classifier.zero_shot(CHAT_TIED, TASK), []
    monkeypatch.setattr(speed, "load_minislm", lambda settings: clf)
    extend = clf.backbone.extend
    monkeypatch.setattr(clf.backbone, "extend", lambda ids: calls.append(1) or extend(ids))
    job = speed.load_inference(SETTINGS)
    for rounds in (1, 2):
        assert job() == {"probabilities": clf.predict_proba(TEXTS).tolist()}
        assert len(calls) == rounds, "the shared prefix is computed in each round, and once"


def test_a_round_of_training_begins_at_the_loss_of_the_model():
    clf = Classifier.zero_shot(CHAT_TIED, TASK, SETTINGS["dtype"])
    expected = -torch.tensor(clf.predict_proba(TEXTS)[range(3), SETTINGS["targets"]]).log().mean()
    prompts = [clf.prompt.branches(text)[0] for text in TEXTS]
    answer = speed.load_training(SETTINGS | {"prompts": prompts})(batches=[[0, 1, 2], [2, 0, 1]])
    assert abs(answer["first_loss"] - expected) < 1e-5


def test_growth_computes_the_prefix_apart_from_the_texts(monkeypatch):
    seen = []
    hidden = speed.last_hidden
    spy = lambda *given: seen.append(given) or hidden(*given)  # noqa: E731
    monkeypatch.setattr(speed, "last_hidden", spy)
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7, 10]]
    speed.load_growth(SETTINGS)(prompts=prompts, shared=3, classes=2)
    ((decoder, groups, shared, cache),) = seen
    assert sorted(groups) == sorted([p] for p in prompts)
    assert shared == 3 and cache.real.shape == (1, 3)

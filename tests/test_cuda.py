"""On a GPU: what the CPU gives. Skipped where there is none."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CHAT_TIED
from test_text import TASK
from test_train import eval_script, run, train

from minislm import METHODS, Classifier, decoder, lora
from minislm.graphs import Replayed
from minislm.quant import NF4Linear

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
TEXTS = ["so glad", "alone in the dark, with a ghost", "they shout", ""]
TRAINED = [name for name, row in METHODS.items() if row.trains == "lora" and name != "encoder_mlp"]


def adapted(method: str, dtype: str, device: str, quantize: str = "none") -> Classifier:
    """With adapters and a head of the same random weights on every device."""
    clf = Classifier.zero_shot(CHAT_TIED, TASK, dtype, device, method, quantize=quantize)
    clf.head.to(torch.promote_types(getattr(torch, dtype), torch.float32))
    lora.inject(clf.backbone, 4, 8, 0.0)
    rng = torch.Generator().manual_seed(0)
    for p in clf.trained().values():
        p.data = (0.1 * torch.randn(p.shape, generator=rng, dtype=torch.float64)).to(p)
    clf.ready = True
    return clf


@pytest.mark.parametrize("method", TRAINED)
def test_scores_and_gradients_are_the_cpus(method, monkeypatch):
    """But for rotary angles, which are float32's on each device: here they are the CPU's."""
    angles, found = decoder.rope_at, []
    on_the_cpu = lambda at, c, dtype: angles(at.cpu(), c, dtype).to(at.device)  # noqa: E731
    monkeypatch.setattr(decoder, "rope_at", on_the_cpu)
    for device in ("cpu", DEVICE):
        clf = adapted(method, "float64", device)
        clf.modules.train()
        logits = clf.logits([clf.prompt.branches(text) for text in TEXTS])
        F.cross_entropy(logits, torch.tensor([0, 1, 2, 0], device=device)).backward()
        found.append({"logits": logits} | {n: p.grad for n, p in clf.trained().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name].cpu(), value, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("method", TRAINED)
def test_probabilities_are_the_cpus(method, quantize):
    ours, cpus = (adapted(method, "float32", device, quantize) for device in (DEVICE, "cpu"))
    rows = [torch.tensor([row.tolist() for _, row in clf.stream(TEXTS)]) for clf in (ours, cpus)]
    torch.testing.assert_close(*rows, atol=1e-5, rtol=0)
    if not METHODS[method].generates:
        in_16_bits = adapted(method, "bfloat16", DEVICE, quantize).predict_proba(TEXTS)
        assert abs(torch.from_numpy(in_16_bits) - rows[1]).max() < 0.1


@pytest.mark.parametrize("method", TRAINED)
def test_a_graph_repeats_a_pass_with_other_texts(method):
    """Batches of one shape: the first is computed, the second captured, it and others replayed."""
    clf, found = adapted(method, "float64", DEVICE), []
    clf.modules.train()

    def backward(inputs):
        loss = F.cross_entropy(clf.score(inputs[:-1]), *inputs[-1])
        loss.backward()
        return loss.detach()

    replayed = Replayed(backward, DEVICE)
    batches = [["so glad", "a ghost"], ["a ghost", "so glad"]] * 2
    for way in (replayed, lambda inputs: backward([[x.cuda() for x in part] for part in inputs])):
        for texts in batches:
            inputs = clf.arrange([clf.prompt.branches(text) for text in texts])
            loss = way([*inputs, [torch.tensor([0, 2])]]).clone()
            found.append([loss, *(p.grad.clone() for p in clf.trained().values())])
            clf.modules.zero_grad(set_to_none=False)
    assert len(replayed.graphs) == 1
    for ours, eager in zip(found, found[len(batches) :]):
        torch.testing.assert_close(ours, eager, atol=1e-9, rtol=1e-9)


def test_nf4_weights_are_the_cpus():
    linear = torch.nn.Linear(96, 64, device=DEVICE)
    ours, cpus = NF4Linear(linear.weight), NF4Linear(linear.weight.cpu())
    assert torch.equal(ours.codes.cpu(), cpus.codes)
    torch.testing.assert_close(
        ours.dequantized(torch.float32).cpu(), cpus.dequantized(torch.float32), atol=1e-7, rtol=1e-6
    )


def test_dropout_drops_its_share():
    dropped = lora.draw_dropped(10**6, 0.05, torch.device(DEVICE))
    assert dropped.is_cuda and dropped.shape == (10**6,)
    assert abs(dropped.sum() - 50_000) < 5 * math.sqrt(10**6 * 0.05 * 0.95)


@pytest.mark.parametrize("extra", [(), ("--dtype", "bfloat16"), ("--quantize", "nf4")])
def test_a_run_learns_there_and_is_read_on_the_cpu(extra, moods, tmp_path, monkeypatch):
    out, given = tmp_path / "run", ("--dtype", "float32", "--device", DEVICE, "--epochs", 6)
    train(monkeypatch, moods, out, *given, *extra)
    result = json.loads((out / "test.json").read_text())
    assert result["macro_f1"] > 0.8 > result["zero_shot"]["macro_f1"]
    run(eval_script, monkeypatch, out, "--json", tmp_path / "cpu.json")
    assert json.loads((tmp_path / "cpu.json").read_text())["macro_f1"] > 0.8

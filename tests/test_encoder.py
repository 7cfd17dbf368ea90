"""The encoder computes what transformers computes, whatever else is in the batch."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ENCODERS, FIXTURES, int8, reference
from safetensors.torch import load_file, save_file
from torch import nn

from minislm import decoder as decoder_module
from minislm import load_backbone, lora, quant
from minislm.packing import pad
from minislm.weights import load_adapter


def real_of(expected: dict) -> torch.Tensor:
    return torch.arange(expected["ids"].shape[1]) < expected["lengths"][:, None]


def padded(expected: dict) -> torch.Tensor:
    """The ids with -1 at padding."""
    return expected["ids"].masked_fill(~real_of(expected), -1)


def assert_parity(name: str, encoder: nn.Module | None = None) -> None:
    """The last hidden states of a padded batch equal transformers' to 1e-5, zeros at padding."""
    encoder, expected = encoder or load_backbone(FIXTURES / name), reference(name)
    real = real_of(expected)
    hidden = encoder(padded(expected))
    torch.testing.assert_close(hidden[real], expected["hidden"][real], atol=1e-5, rtol=0)
    assert not hidden[~real].any()


@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states_equal_transformers(name):
    assert_parity(name)


def test_norms_under_older_names(tmp_path):
    folder = Path(shutil.copytree(FIXTURES / "bert", tmp_path / "bert"))
    weights, older = load_file(folder / "model.safetensors"), {"weight": "gamma", "bias": "beta"}
    for name in [name for name in weights if "LayerNorm" in name]:
        norm, _, part = name.rpartition(".")
        weights[f"{norm}.{older[part]}"] = weights.pop(name)
    save_file(weights, folder / "model.safetensors")
    assert_parity("bert", load_backbone(folder))


def shift_positions(encoder, by: int) -> None:
    encoder.config = replace(encoder.config, first_position=encoder.config.first_position + by)


def drop_norm(encoder, parent: str) -> None:
    encoder.get_submodule(parent).LayerNorm = nn.Identity()


def drop_type(encoder) -> None:
    encoder.embeddings.token_type_embeddings.weight.zero_()


MUTATIONS = {
    "positions a place later": partial(shift_positions, by=1),
    "positions a place earlier": partial(shift_positions, by=-1),
    "no norm of the embeddings": partial(drop_norm, parent="embeddings"),
    "no norm after attention": partial(drop_norm, parent="encoder.layer.0.attention.output"),
    "no norm after the MLP": partial(drop_norm, parent="encoder.layer.1.output"),
    "no token type": drop_type,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_parity_notices(mutation):
    encoder = load_backbone(FIXTURES / "xlm-roberta")
    with torch.no_grad():
        MUTATIONS[mutation](encoder)
    with pytest.raises(AssertionError):
        assert_parity("xlm-roberta", encoder)


@pytest.mark.parametrize("function, change", [
    ("gelu", {"approximate": "tanh"}),
    ("scaled_dot_product_attention", {"attn_mask": None}),  # padding leaks
    ("scaled_dot_product_attention", {"scale": 1.0}),
    ("scaled_dot_product_attention", {"attn_mask": None, "is_causal": True}),
])  # fmt: skip
def test_parity_notices_another(function, change, monkeypatch):
    original = getattr(F, function)
    monkeypatch.setattr(F, function, lambda *x, **options: original(*x, **options | change))
    with pytest.raises(AssertionError):
        assert_parity("bert")


def random_texts(lengths: list[int]) -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(2, 96, (n,), generator=g).tolist() for n in lengths]


def loud_adapters(model: nn.Module, rank: int = 2) -> None:
    """Adapters that do something, with the same values at each call."""
    torch.manual_seed(0)
    lora.inject(model, rank, 2 * rank, dropout=0)
    for layer in lora.adapters(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)


@pytest.mark.parametrize("rows", [None, 32])  # 32: filled up, as in bfloat16
@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states_and_gradients_do_not_depend_on_the_batch(name, rows, monkeypatch):
    encoder, texts = load_backbone(FIXTURES / name, torch.float64), random_texts([4, 1, 24, 9, 9])
    loud_adapters(encoder)
    weights = torch.randn(24, 32, dtype=torch.float64)
    alone = [encoder(torch.tensor([text]))[0] for text in texts]  # (T, D) each
    sum((x * weights[: len(x)]).sum() for x in alone).backward()
    expected = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.requires_grad}
    encoder.zero_grad()
    if rows:
        monkeypatch.setitem(decoder_module.MULTIPLE_OF, torch.float64, rows)
    sizes = []
    encoder.layers[0].register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    hidden = encoder(pad(texts))
    assert sizes == [64 if rows else 47]
    for found, states in zip(hidden, alone):
        torch.testing.assert_close(found[: len(states)], states, atol=1e-9, rtol=0)
        assert not found[len(states) :].any()
    (hidden * weights).sum().backward()
    assert len(expected) == 2 * 6 * 2
    for n, p in encoder.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[n], atol=1e-9, rtol=1e-9, msg=n)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_text_longer_than_the_positions_is_refused(name):
    encoder = load_backbone(FIXTURES / name)
    assert encoder.config.max_position_embeddings == 24
    encoder(pad(random_texts([24, 3])))
    with pytest.raises(ValueError, match="25 tokens are more than the 24"):
        encoder(pad(random_texts([3, 25])))


def test_bfloat16_stays_near_float32():
    expected = reference("bert")
    hidden = load_backbone(FIXTURES / "bert", torch.bfloat16)(padded(expected))
    real = real_of(expected)
    assert hidden.dtype == torch.bfloat16
    assert (hidden[real].float() - expected["hidden"][real]).abs().mean() < 0.02


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=int8)])
def test_the_six_linear_layers_of_a_layer_are_quantised(kind):
    encoder, expected = load_backbone(FIXTURES / "bert", quantize=kind), reference("bert")
    layers = [m for m in encoder.modules() if isinstance(m, quant.KINDS[kind])]
    assert len(layers) == 6 * 2 and not any(isinstance(m, nn.Linear) for m in encoder.modules())
    later = load_backbone(FIXTURES / "bert")
    quant.quantize(later, kind)
    real = real_of(expected)
    with torch.no_grad():
        hidden = encoder(padded(expected))
        assert torch.equal(hidden, later(padded(expected)))
    error = (hidden - expected["hidden"])[real].square().mean() ** 0.5
    assert 0 < error < {"nf4": 0.3, "int8": 0.05}[kind]


# -------------------------------------------------------------------------------- adapters

ADAPTER = FIXTURES / "bert-adapter"


def test_pefts_adapter_is_read_and_written_under_its_names():
    encoder = load_backbone(FIXTURES / "bert")
    load_adapter(ADAPTER, encoder)
    assert_parity("bert-adapter", encoder)
    ours, theirs = lora.adapter_state(encoder), load_file(ADAPTER / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours = lora.adapter_config(encoder, "bert")
    theirs = json.loads((ADAPTER / "adapter_config.json").read_text())
    assert {key: theirs[key] for key in ours} == ours


def test_peft_loads_what_we_save(tmp_path, recwarn):
    peft = pytest.importorskip("peft", reason="the oracle is an optional extra")
    transformers = pytest.importorskip("transformers")
    encoder, expected = load_backbone(FIXTURES / "roberta"), reference("roberta")
    loud_adapters(encoder)
    save_file(lora.adapter_state(encoder), tmp_path / "adapter_model.safetensors")
    config = lora.adapter_config(encoder, "roberta")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = transformers.AutoModel.from_pretrained(FIXTURES / "roberta", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path)
    assert not any("adapter keys" in str(warning.message) for warning in recwarn)
    real = real_of(expected)
    theirs = model(expected["ids"], attention_mask=real.long()).last_hidden_state
    ours = encoder(padded(expected))
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=0)
    assert (ours - expected["hidden"])[real].abs().max() > 0.01  # the adapter does something

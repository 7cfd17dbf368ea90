"""Adapters: the same numbers and gradients as PEFT, and its files both ways."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES, int8, reference
from safetensors.torch import load_file, save_file
from torch import nn

from minislm import load_backbone, lora, quant
from minislm.decoder import project
from minislm.heads import SlicedHead
from minislm.weights import head_rows, load_adapter

BASE, ADAPTER = FIXTURES / "qwen3-tied", FIXTURES / "qwen3-tied-adapter"


def adapted():
    decoder = load_backbone(BASE)
    load_adapter(ADAPTER, decoder)
    return decoder


def class_logits(decoder, expected) -> torch.Tensor:
    head = SlicedHead(head_rows(BASE, decoder, expected["token_ids"].tolist()))
    keep = (expected["lengths"] - 1)[:, None]
    return head(decoder(expected["ids"], keep=keep)[:, 0])


def assert_peft_parity(decoder) -> None:
    """Logits, class logits, loss and every adapter gradient equal PEFT's to 1e-5."""
    expected = reference("qwen3-tied-adapter")
    real = torch.arange(expected["ids"].shape[1]) < expected["lengths"][:, None]
    close = dict(atol=1e-5, rtol=0)
    logits = decoder.logits(decoder(expected["ids"]))
    torch.testing.assert_close(logits[real], expected["logits"][real], **close)
    scores = class_logits(decoder, expected)
    torch.testing.assert_close(scores, expected["class_logits"], **close)
    loss = F.cross_entropy(scores, expected["labels"])
    torch.testing.assert_close(loss, expected["loss"], **close)
    loss.backward()
    for name, layer in lora.adapters(decoder).items():
        for part in ("lora_A", "lora_B"):
            key = f"{lora.PREFIX}{name}.{part}.weight"
            torch.testing.assert_close(getattr(layer, part).grad, expected[key], **close)


def test_logits_loss_and_gradients_equal_pefts():
    assert_peft_parity(adapted())


def test_parity_notices_alpha_without_r():
    decoder = adapted()
    for layer in lora.adapters(decoder).values():
        layer.scaling *= len(layer.lora_A)
    with pytest.raises(AssertionError):
        assert_peft_parity(decoder)


def test_the_last_token_is_not_the_last_column():
    """The fixture's second row is padded, and ends with the padding's own id."""
    decoder, expected = adapted(), reference("qwen3-tied-adapter")
    right = class_logits(decoder, expected)
    wrong = class_logits(decoder, expected | {"lengths": torch.tensor([11, 11])})
    torch.testing.assert_close(right, expected["class_logits"], atol=1e-5, rtol=0)
    assert (wrong[1] - expected["class_logits"][1]).abs().max() > 1e-2


def test_saved_state_has_pefts_names_shapes_and_values():
    ours, theirs = lora.adapter_state(adapted()), load_file(ADAPTER / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_saved_config_agrees_with_pefts():
    ours = lora.adapter_config(adapted(), "qwen3-tied")
    theirs = json.loads((ADAPTER / "adapter_config.json").read_text())
    assert {key: theirs[key] for key in ours} == ours


def test_alpha_is_saved_as_it_was_given():
    decoder = load_backbone(BASE)
    lora.inject(decoder, 49, 1, 0.0)  # 1 / 49 * 49 is below 1
    assert lora.adapter_config(decoder, "base")["lora_alpha"] == 1


def test_peft_loads_what_we_save(tmp_path):
    peft = pytest.importorskip("peft", reason="the oracle is an optional extra")
    transformers = pytest.importorskip("transformers")
    decoder, expected = load_backbone(BASE), reference("qwen3-tied-adapter")
    torch.manual_seed(0)
    lora.inject(decoder, 3, 5.0, 0.1)
    for layer in lora.adapters(decoder).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    decoder.eval()
    save_file(lora.adapter_state(decoder), tmp_path / "adapter_model.safetensors")
    config = lora.adapter_config(decoder, str(BASE))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path)
    theirs = model(expected["ids"][:1]).logits
    ours = decoder.logits(decoder(expected["ids"][:1]))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_merged_layers_compute_the_same():
    decoder, expected = adapted(), reference("qwen3-tied-adapter")
    lora.merge(decoder)
    assert not lora.adapters(decoder)
    scores = class_logits(decoder, expected)
    torch.testing.assert_close(scores, expected["class_logits"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_merging_would_round_away_is_measured():
    def lost(dtype: torch.dtype, size: float) -> float:
        decoder = load_backbone(BASE, dtype)
        lora.inject(decoder, 4, 8.0, 0.0)
        exact, error = [], []
        for layer in lora.adapters(decoder).values():
            layer.lora_B.normal_(0, size, generator=torch.Generator().manual_seed(0))
            exact.append(2.0 * (layer.lora_B @ layer.lora_A).flatten().double())
            merged = (layer.base.weight.double().flatten() + exact[-1]).to(dtype)
            error.append(merged.double() - layer.base.weight.double().flatten() - exact[-1])
        expected = torch.cat(error).norm() / torch.cat(exact).norm()
        assert lora.rounded_away(decoder) == pytest.approx(expected.item(), rel=0.02, abs=1e-6)
        return lora.rounded_away(decoder)

    assert lost(torch.float32, 1e-2) < 1e-4 < lost(torch.bfloat16, 1e-1) < 0.1
    assert 0.9 < lost(torch.bfloat16, 1e-5) < 1.1
    untrained, quantised = load_backbone(BASE), load_backbone(BASE, quantize="nf4")
    for decoder in (untrained, quantised):
        lora.inject(decoder, 4, 8.0, 0.0)
    assert lora.rounded_away(untrained) == 0 and lora.rounded_away(quantised) == 1
    assert lora.rounded_away(load_backbone(BASE)) == 0


@torch.no_grad()
def test_injection_adapts_seven_linears_a_block_and_freezes_the_rest():
    decoder = load_backbone(BASE)
    before = decoder(torch.tensor([[1, 2, 3]]))
    lora.inject(decoder, 4, 8.0, 0.0)
    names = [n for n, p in decoder.named_parameters() if p.requires_grad]
    assert len(lora.adapters(decoder)) == 7 * len(decoder.layers)
    assert len(names) == 2 * 7 * len(decoder.layers) and all(".lora_" in n for n in names)
    assert torch.equal(decoder(torch.tensor([[1, 2, 3]])), before)  # B is zero
    layer = decoder.layers[0].mlp.down_proj
    bound = 1 / math.sqrt(layer.base.in_features)  # kaiming uniform with a = sqrt(5)
    assert bound * 0.9 < layer.lora_A.abs().max() <= bound


@int8
def test_adapters_on_int8_layers_have_no_gradient():
    layer = lora.LoRALinear(quant.Int8Linear(torch.ones(64, 64)), r=2, alpha=4, dropout=0)
    y = layer(torch.ones(3, 64, requires_grad=True))
    with pytest.raises(ValueError, match="int8 layers have no gradient.*nf4"):
        y.sum().backward()


def test_a_bfloat16_model_has_float32_adapters():
    decoder = load_backbone(BASE, dtype=torch.bfloat16)
    lora.inject(decoder, 4, 8.0, 0.0)
    assert {p.dtype for p in decoder.parameters() if p.requires_grad} == {torch.float32}
    assert decoder(torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16


def test_a_model_is_adapted_once():
    with pytest.raises(ValueError, match="has adapters already"):
        lora.inject(adapted(), 4, 8.0, 0.0)


@pytest.mark.parametrize(
    "key, value",
    [("use_dora", True), ("use_rslora", True), ("bias", "all"), ("rank_pattern", {"q_proj": 2}),
     ("modules_to_save", ["lm_head"]), ("fan_in_fan_out", True), ("peft_type", "LOHA"),
     ("init_lora_weights", "pissa"), ("alora_invocation_tokens", [1, 2]),
     ("layer_replication", [[0, 2], [1, 2]])],
)  # fmt: skip
def test_other_kinds_of_lora_are_refused_by_name(key, value, tmp_path):
    shutil.copytree(ADAPTER, tmp_path / "a")
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=key):
        load_adapter(tmp_path / "a", load_backbone(BASE))


def test_an_adapter_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the weights have .*layers.2"):
        load_adapter(ADAPTER, load_backbone(FIXTURES / "llama-untied"))


def test_a_missing_or_damaged_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="adapter"):
        load_adapter(tmp_path, load_backbone(BASE))
    shutil.copytree(ADAPTER, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    whole = json.loads(path.read_text())
    for damaged, message in (
        ([], "holds a list"), (whole | {"peft_type": None}, "peft_type = None is not implemented"),
        ({"peft_type": "LORA"}, "r = None must be a whole number"), (whole | {"r": 0}, "not 0"),
        (whole | {"lora_alpha": "x"}, "lora_alpha = 'x' must be a number"),
        (whole | {"r": 8.0}, "r = 8.0 must be a whole number"),
    ):  # fmt: skip
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=message):
            load_adapter(tmp_path / "a", load_backbone(BASE))
    path.write_text(json.dumps(whole))
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match="adapter_model.safetensors: not a readable"):
        load_adapter(tmp_path / "a", load_backbone(BASE))


def test_dropout_acts_in_training_only():
    """A loaded model is in eval mode, and adapters take over the mode of what they adapt."""
    decoder = load_backbone(BASE)
    lora.inject(decoder, 4, 8.0, 0.5)
    for layer in lora.adapters(decoder).values():
        torch.nn.init.normal_(layer.lora_B)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(decoder(ids), decoder(ids))
    decoder.train()
    assert not torch.equal(decoder(ids), decoder(ids))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_places_are_dropped_independently_with_probability_p(p):
    """Over 20,000 draws: each of three places p, each pair p squared; then a long draw."""
    torch.manual_seed(0)
    n, draws, cpu = 3, 20_000, torch.device("cpu")
    hit = torch.zeros(draws, n + 1)
    for row in hit:
        row[lora.draw_dropped(n, p, cpu)] = 1
    hit = hit[:, :n]
    for events, expected in ((hit, p), (hit * hit.roll(1, 1), p * p), (hit.prod(1), p**3)):
        sigma = (expected * (1 - expected) / draws) ** 0.5
        assert (events.mean(0) - expected).abs().max() < 5 * sigma
    places = lora.draw_dropped(1_000_000, p, cpu)
    places = places[places < 1_000_000]
    assert len(places.unique()) == len(places)
    assert abs(len(places) - 1e6 * p) < 5 * (1e6 * p * (1 - p)) ** 0.5
    assert places.max() > 999_000  # enough were drawn to reach the end


@pytest.mark.parametrize("p", [1e-20, 5e-324])
def test_a_dropout_of_next_to_nothing_drops_nothing(p):
    for n in (1, 1000, 2**24 + 1):  # float32 has no such number as the last
        assert (lora.draw_dropped(n, p, torch.device("cpu")) == n).all()


@pytest.mark.parametrize("drawn", ["places", "mask"])  # the second on a GPU
@pytest.mark.parametrize("shared", [1, 3])
def test_dropout_and_its_gradients_equal_a_plain_mask(shared, drawn, monkeypatch):
    """With known places: base(x) + alpha / r (x * mask / (1 - p)) A^T B^T, by plain autograd;
    layers that read the same x have the same mask."""
    torch.manual_seed(0)
    layers = [
        lora.LoRALinear(nn.Linear(6, 5 + i).double(), r=2, alpha=3, dropout=0.25).train()
        for i in range(shared)
    ]
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([0, 7, 8, 23, 24, 24])  # the last two mean none
    mask = torch.ones(24, dtype=torch.float64)
    mask[[0, 7, 8, 23]] = 0
    dropped = places if drawn == "places" else mask == 0
    monkeypatch.setattr(lora, "draw_dropped", lambda n, p, device: dropped)
    expected, inputs = [], [x]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
        low = (x * mask.view(4, 6) / 0.75) @ layer.lora_A.T @ layer.lora_B.T
        expected.append(layer.base(x) + 3 / 2 * low)
        inputs += [layer.lora_A, layer.lora_B]
    found = torch.cat(project(x, *layers), 1)
    expected = torch.cat(expected, 1)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weights).sum(), inputs) for y in (found, expected)]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_layers_of_which_only_some_are_adapted_read_the_same_x():
    torch.manual_seed(0)
    x, plain = torch.randn(4, 6), nn.Linear(6, 5)
    layer = lora.LoRALinear(nn.Linear(6, 5), r=2, alpha=3, dropout=0.0)
    nn.init.normal_(layer.lora_B)
    for layers in ((plain, layer), (layer, plain)):
        assert all(torch.equal(y, m(x)) for y, m in zip(project(x, *layers), layers))


def test_recomputed_blocks_keep_little_and_give_the_same_gradients():
    kept, gradients = [], []
    for recompute in (False, True):
        decoder, sizes = adapted(), []
        for layer in lora.adapters(decoder).values():
            layer.dropout = 0.5
        decoder.train().recompute = recompute
        torch.manual_seed(0)
        ids = torch.arange(40).view(2, 20)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            loss = decoder(ids, keep=torch.tensor([[19], [19]])).pow(2).sum()
        kept.append(sum(sizes))
        loss.backward()
        gradients.append([p.grad for p in decoder.parameters() if p.requires_grad])
    assert kept[1] < kept[0] / 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients))

"""Quantised layers: NF4 as the paper and bitsandbytes have it, int8 within its rounding error."""

import subprocess
import sys
import weakref
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES, int8, int8_works
from torch import nn

from minislm import load_backbone, lora, quant
from minislm.quant import GROUP, LEVELS, Int8Linear, NF4Linear

BASE = FIXTURES / "qwen3-tied"
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


both = pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=int8)])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_levels_are_the_normal_quantiles_of_the_published_recipe():
    """bitsandbytes' create_normal_map: from 0.9677083 to 1/2, 8 values above zero and 7 below."""
    quantile = NormalDist().inv_cdf
    above = [quantile(0.9677083 + (0.5 - 0.9677083) * i / 8) for i in range(8)]
    below = [-quantile(0.9677083 + (0.5 - 0.9677083) * i / 7) for i in range(7)]
    levels = torch.tensor(below + [0.0] + above[::-1], dtype=torch.float64) / above[0]
    torch.testing.assert_close(LEVELS.double(), levels, atol=2e-7, rtol=0)
    theirs = (  # bitsandbytes' table, as float32's bits
        "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000"
        " 3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
    )
    bits = [f"{value & 0xFFFFFFFF:08x}" for value in LEVELS.view(torch.int32).tolist()]
    assert bits == theirs.split()


def test_another_default_dtype_changes_nothing():
    code = "import torch; torch.set_default_dtype(torch.float64); from minislm import quant\n"
    code += "assert quant.LEVELS.dtype == torch.float32\n"
    code += "layer = quant.NF4Linear(torch.eye(64, dtype=torch.float32))\n"
    code += "assert (layer.dequantized(torch.float32) - torch.eye(64)).abs().max() < 1e-6\n"
    code += "print(quant.neighbours())" * int8_works()
    subprocess.run([sys.executable, "-c", code], check=True)


def nearest(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and absmax (blocks, 1) by brute force: the level with the smallest distance."""
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    return ((blocks / absmax)[..., None] - LEVELS).abs().argmin(-1), absmax


def test_nf4_codes_are_the_nearest_levels_and_errors_are_those_of_normal_weights():
    weight = normal(192, 512) * 0.03
    layer = NF4Linear(weight)
    codes, absmax = nearest(weight)
    assert torch.equal(torch.stack([layer.codes >> 4, layer.codes & 15], -1).flatten(1), codes)
    exact = (LEVELS[codes] * absmax).view_as(weight)  # without double quantisation
    assert 0.0910 < relative(exact, weight) < 0.0930
    found = layer.dequantized(torch.float32)
    assert 0.0910 < relative(found, weight) < 0.0930
    assert 1e-4 < relative(found, exact) < 5e-3


def test_nf4_is_exact_for_levels_times_a_common_scale():
    """All 16 levels in every block: with equal scales the double quantisation has no error."""
    codes = torch.stack([torch.randperm(64) % 16 for _ in range(64)])
    weight = (LEVELS[codes] * 0.25).view(32, 128)
    assert torch.equal(NF4Linear(weight).dequantized(torch.float32), weight)


def test_double_quantisation_rounds_scales_to_the_nearest_step():
    weight = normal(300, 64 * 7) * normal(300, 1, seed=1).exp()  # 2100 blocks: no whole groups
    layer = NF4Linear(weight)
    codes, absmax = nearest(weight)
    block = layer.dequantized(torch.float64).view(-1, 64)
    top = codes.sub(7).abs().argmax(1, keepdim=True)  # a level that is not 0
    logs, scale = absmax.log(), block.gather(1, top) / LEVELS[codes.gather(1, top)]
    delta = F.pad((logs - logs.mean()).flatten(), (0, -2100 % GROUP)).view(-1, GROUP)
    steps = (delta.abs().amax(1) / 127).repeat_interleave(GROUP)[:2100, None]
    error = ((scale.log() - logs) / steps).abs()
    assert 0.45 < error.max() < 0.501
    assert 0.2 < error.mean() < 0.3  # uniform in 0 .. 1/2


def test_a_row_of_outliers_leaves_the_weights_beside_it_as_they_are():
    """Nor does one of zeros, whose scales have no logarithm."""
    weight = normal(256, 64) * 0.02
    weight[0] *= 500
    weight[1] = 0
    found = NF4Linear(weight).dequantized(torch.float32)
    assert relative(found[2:], weight[2:]) < 0.1
    assert not found[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_computes_with_its_weight_and_its_gradient(dtype):
    layer = NF4Linear(normal(96, 128), normal(96))
    x = normal(2, 5, 128, seed=1).to(dtype).requires_grad_()
    dy = normal(2, 5, 96, seed=2).to(dtype)
    weight = layer.dequantized(dtype)
    assert weight.dtype == dtype and weight.shape == (96, 128)
    assert torch.equal(weight, layer.dequantized(torch.float32).to(dtype))
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, F.linear(x, weight) + layer.bias.to(dtype))
    y.backward(dy)
    assert torch.equal(x.grad, dy @ weight)
    assert not list(layer.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_on_nf4_keep_no_weight_for_the_backward_pass(dropout, monkeypatch):
    made, dequantized = [], NF4Linear.dequantized

    def watched(self, dtype):
        weight = dequantized(self, dtype)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(NF4Linear, "dequantized", watched)
    layer = lora.LoRALinear(NF4Linear(normal(64, 64)), r=2, alpha=4, dropout=dropout).train()
    y = layer(normal(3, 64).requires_grad_())
    assert [ref() for ref in made] == [None]
    y.sum().backward()
    assert len(made) == 2


def test_nf4_takes_4_127_bits_a_weight():
    layer = NF4Linear(normal(1024, 1024))
    bits = sum(8 * buffer.nbytes for buffer in layer.state_dict().values()) / 1024**2
    assert bits == 4 + 8 / 64 + 32 / (64 * 256) + 32 / 1024**2  # the last is the offset


def test_nf4_dequantises_in_parts_what_it_quantised_whole(monkeypatch):
    layer = NF4Linear(normal(100, 192))
    whole = layer.dequantized(torch.bfloat16)
    monkeypatch.setattr(quant, "CPU_BLOCKS", 7)
    assert torch.equal(layer.dequantized(torch.bfloat16), whole)


def test_nf4_refuses_a_weight_of_no_whole_blocks():
    with pytest.raises(ValueError, match="30 -> 10.*bfloat16"):
        NF4Linear(normal(10, 30))


def test_nf4_survives_blocks_of_zeros_and_outliers():
    weight = normal(64, 64)
    weight[3] = 0
    weight[5, 7] = 1e4
    found = NF4Linear(weight).dequantized(torch.float32)
    assert torch.equal(found[3], weight[3])
    assert found[5].abs().max() == found[5, 7] == pytest.approx(1e4, rel=0.005)


def sums(weight: torch.Tensor, n: int) -> torch.Tensor:
    """(out,) The largest sum of a sign's weights over n neighbours."""
    groups = weight.unflatten(1, (-1, n))
    return torch.stack([groups.clamp(min=0).sum(2), -groups.clamp(max=0).sum(2)]).amax((0, 2))


@int8
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_exact_where_nothing_is_rounded(dtype, n, monkeypatch):
    """Integers with the largest sum in every row, and scales that are powers of two."""
    if n < quant.neighbours():
        pytest.skip("this CPU's sums would saturate")
    monkeypatch.setattr(quant, "neighbours", lambda: n)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randint(-127, 128, (700 + 96, 320), generator=generator).split([700, 96])
    if n == 2:  # what the first of two leaves to a second of its sign
        first, second = weight[:, ::2], weight[:, 1::2]
        room = torch.where(first.sign() == second.sign(), 127 - first.abs(), 127)
        weight = torch.stack([first, second.clamp(-room, room)], 2).flatten(1)
    x[:, 5], weight[:, 6], weight[:, 7] = 127, -127, 0
    # the largest sums; 4 times these are not float32's
    x[:9:2], weight[:9] = 127, torch.tensor([127] if n == 1 else [64, 63]).repeat(320 // n)
    assert (sums(weight, n) == 127).all()
    x = x.to(dtype) * torch.tensor([0.5, 4.0]).repeat(350)[:, None].to(dtype)
    weight, bias = weight * 2.0 ** -torch.arange(96)[:, None].fmod(5), torch.arange(96.0)
    expected = F.linear(x.double(), weight.double(), bias.double()).to(dtype)
    y = Int8Linear(weight, bias)(x)
    assert y.dtype == dtype and torch.equal(y, expected)


@int8
@pytest.mark.parametrize("inputs", [128, 127])
def test_int8_sums_do_not_saturate(inputs):
    """The worst case: every product positive, both of two neighbours large, rounded up or not."""
    weight = normal(64, inputs).abs()
    weight[1::2] = 63.5  # 64 + 64
    weight[1::2, :2] = torch.tensor([127.0, 0.0])
    x = torch.ones(3, inputs)
    for sign in (1, -1):
        y = Int8Linear(sign * weight)(x)
        assert relative(y, sign * F.linear(x, weight)) < 0.01


@int8
def test_int8_errors_are_those_of_rounding_to_the_nearest():
    weight, bias = normal(96, 320), normal(96, seed=1)
    x = normal(700, 320, seed=2) * normal(700, 1, seed=3).exp()
    sx = x.abs().amax(1, keepdim=True) / 127  # (N, 1)
    sw = sums(weight, quant.neighbours()) / 127  # (out,)
    wq = (weight / sw[:, None]).round() * sw[:, None]
    error = (Int8Linear(weight, bias)(x) - F.linear(x, weight, bias)).abs()
    # x w - xq wq = x (w - wq) + (x - xq) wq, where |w - wq| <= sw / 2 and |x - xq| <= sx / 2
    bound = sw * x.abs().sum(1, keepdim=True) / 2 + sx * wq.abs().sum(1) / 2
    assert (error <= bound + 1e-4).all()
    variance = sw**2 * x.square().sum(1, keepdim=True) / 12 + sx**2 * wq.square().sum(1) / 12
    assert 0.97 < (error**2 / variance).mean().sqrt() < 1.03  # independent and uniform


@int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_rows_do_not_depend_on_their_batch(dtype):
    layer, x = Int8Linear(normal(192, 576), normal(192)), normal(300, 576, seed=1).to(dtype)
    whole = layer(x)
    for rows in (slice(0, 1), slice(7, 8), slice(299, 300), slice(100, 117), slice(3, 260)):
        assert torch.equal(layer(x[rows].clone()), whole[rows])
    other = x.clone()
    other[1:] *= 1000
    assert torch.equal(layer(other)[:1], whole[:1])


@int8
@pytest.mark.parametrize("native", [True, False])
def test_int8_asks_for_bfloat16_only_where_that_is_fast(native, monkeypatch):
    """With AVX2 alone that took two seconds a layer."""
    asked, kernel = [], quant.int8_linear

    def spy(codes, packed, scale, dtype):
        asked.append(dtype)
        return kernel(codes, packed, scale, torch.float32)

    monkeypatch.setattr(quant, "TO_BFLOAT16", native)
    monkeypatch.setattr(quant, "int8_linear", spy)
    layer, x = Int8Linear(normal(64, 128)), normal(5, 128, seed=1).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert asked == [torch.bfloat16 if native else torch.float32]


@int8
def test_int8_takes_zeros_outliers_and_rows_of_any_size():
    layer, x = Int8Linear(normal(64, 128)), normal(5, 128, seed=1)
    x[1] = 0
    x[2, 9] = 1e4
    x[3] *= 1e-35
    x[4] *= 1e10
    y = layer(x)
    assert torch.equal(y[1], torch.zeros(64))
    assert relative(y[2], F.linear(x[2], normal(64, 128))) < 0.02
    assert relative(y[4], F.linear(x[4], normal(64, 128))) < 0.02
    assert y.isfinite().all() and y[3].abs().max() < 1e-28
    assert layer(torch.full((1, 128), torch.nan)).isnan().all()
    dead = normal(64, 128)
    dead[2] = 0
    assert torch.equal(Int8Linear(dead)(x)[:, 2], torch.zeros(5))


@both
def test_any_leading_shape_and_layout(kind):
    layer = quant.quantized(nn.Linear(64, 32), kind)
    x = normal(3, 4, 64)
    y = layer(x)
    assert y.shape == (3, 4, 32)
    assert (layer.in_features, layer.out_features) == (64, 32)
    close = dict(atol=0, rtol=0) if kind == "int8" else dict(atol=1e-6, rtol=1e-5)
    for same, found in [
        (y[1, 2], layer(x[1, 2].clone())),
        (y.transpose(0, 1), layer(x.transpose(0, 1))),
        (y[:, ::2], layer(x[:, ::2])),
        (y.flatten(0, 1), layer(x.flatten(0, 1))),
        (y[:0], layer(x[:0])),
    ]:
        torch.testing.assert_close(found, same, **close)


@int8
def test_int8_layers_that_read_the_same_input_quantise_it_once(monkeypatch):
    decoder, ids = load_backbone(BASE), torch.tensor([[1, 2, 3, 4, 5]])
    quant.quantize(decoder, "int8")
    calls, quantize_rows = [], quant.quantize_rows
    monkeypatch.setattr(quant, "quantize_rows", lambda x: calls.append(1) or quantize_rows(x))
    with torch.no_grad():
        shared = decoder(ids)
        assert len(calls) == 4 * len(decoder.layers)  # q, k and v; o; gate and up; down
        together = Int8Linear.together
        monkeypatch.setattr(
            Int8Linear, "together", lambda _, x, layers: [together(m, x, [m])[0] for m in layers]
        )
        assert torch.equal(decoder(ids), shared) and len(calls) == (4 + 7) * len(decoder.layers)


@int8
def test_int8_refuses_training_and_other_devices():
    layer, x = Int8Linear(normal(32, 64)), normal(4, 64).requires_grad_()
    with pytest.raises(ValueError, match="no gradient.*nf4"):
        layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.detach()))
    with pytest.raises(ValueError, match="cpu, not on meta"):
        layer(torch.empty(4, 64, device="meta"))


@pytest.mark.parametrize(
    "found, n",
    [
        ([127 * 127 * 64], 1),
        ([8160, 127 * 128 * 32], 2),  # what AVX2 and AVX-512 without VNNI give
        ([8160, 8160], None),
        ([], None),  # there is no such kernel
    ],
)
def test_int8_weights_are_as_large_as_the_kernel_has_room_for(found, n, monkeypatch):
    found = iter(found)

    def kernel(codes, packed, scale, dtype):
        if (value := next(found, None)) is None:
            raise NotImplementedError("onednn::qlinear_pointwise")
        return torch.full((len(codes), len(scale)), float(value))

    monkeypatch.setattr(quant, "int8_linear", kernel)
    if n is None:
        with pytest.raises(ValueError, match="AVX2.*bfloat16"):
            quant.neighbours.__wrapped__()
    else:
        assert quant.neighbours.__wrapped__() == n


@both
def test_a_quantised_decoder_computes_about_the_same(kind):
    decoder, ids = load_backbone(BASE), torch.tensor([[1, 2, 3, 4, 5]])
    before = decoder(ids)
    norms = {n: p for n, p in decoder.named_parameters() if "_proj" not in n}
    quant.quantize(decoder, kind)
    layers = [m for m in decoder.modules() if isinstance(m, quant.KINDS[kind])]
    assert len(layers) == 7 * len(decoder.layers)
    assert not any(layer.training for layer in layers)
    assert dict(decoder.named_parameters()) == norms  # the very same; no projection is left
    low, high = {"nf4": (0.02, 0.4), "int8": (0.001, 0.03)}[kind]
    if kind == "int8":
        high *= quant.neighbours()
    with torch.no_grad():
        assert low < relative(decoder(ids), before) < high


def uneven(dtype: torch.dtype):
    """A decoder of whose channels, as they are read, some are 30 times as large, and two are 0."""
    decoder = load_backbone(BASE, dtype)
    with torch.no_grad():
        for block in decoder.layers:
            mlp = block.mlp
            for made in (block.input_layernorm, block.post_attention_layernorm, mlp.up_proj):
                made.weight[::7] *= 30
                made.weight[1:3] = 0
            for layer in (block.self_attn.q_proj, mlp.gate_proj, mlp.down_proj):
                layer.weight[:, ::7] /= 10
    return decoder


def test_smoothing_changes_no_result():
    decoder, ids = uneven(torch.float64), torch.arange(80).view(2, 40)
    before, old = decoder(ids), {k: p.clone() for k, p in decoder.named_parameters()}
    quant.smooth(decoder.layers[:-1], lambda: decoder(ids))
    torch.testing.assert_close(decoder(ids), before, atol=1e-9, rtol=0)
    same = {k for k, p in decoder.named_parameters() if torch.equal(p, old[k])}
    last = f"layers.{len(decoder.layers) - 1}."
    inside = {k for k in old if k.startswith("layers.") and not k.startswith(last)}
    unread = ("o_proj.weight", "q_norm.weight", "k_norm.weight")
    assert same & inside == {k for k in inside if k.endswith(unread)}
    assert same >= old.keys() - inside


def test_no_hook_stays_where_smoothing_fails():
    decoder = load_backbone(BASE)
    with pytest.raises(ZeroDivisionError):
        quant.smooth(decoder.layers, lambda: 1 / 0)
    assert not any(m._forward_pre_hooks for m in decoder.modules())


@int8
def test_smoothing_leaves_int8_less_to_round_away():
    ids, errors = torch.randint(96, (4, 40), generator=torch.Generator().manual_seed(0)), {}
    exact = uneven(torch.float32)(ids)
    for smooth in (False, True):
        decoder = uneven(torch.float32)
        if smooth:
            quant.smooth(decoder.layers, lambda decoder=decoder: decoder(ids[:1]))
        quant.quantize(decoder, "int8")
        errors[smooth] = relative(decoder(ids), exact)
    assert errors[True] < 0.6 * errors[False], errors


def test_each_weight_is_freed_before_the_next_is_quantised(monkeypatch):
    model = nn.ModuleList(
        nn.ModuleDict({n: nn.Linear(64, 64) for n in quant.TARGETS}) for _ in "ab"
    )
    seen, quantized = [], quant.quantized

    def watched(linear, kind):
        assert not [ref for ref in seen if ref() is not None]
        seen.append(weakref.ref(linear.weight))
        return quantized(linear, kind)

    monkeypatch.setattr(quant, "quantized", watched)
    quant.quantize(model, "nf4")
    assert len(seen) == 2 * len(quant.TARGETS) and not list(model.parameters())


def test_unknown_kinds_and_models_without_the_layers_are_refused():
    with pytest.raises(ValueError, match="'int4' is not one of none, nf4, int8"):
        quant.quantized(nn.Linear(64, 64), "int4")
    with pytest.raises(ValueError, match="no linear layer.*q_proj"):
        quant.quantize(nn.Sequential(nn.Linear(64, 64)), "nf4")
    model = nn.ModuleDict({"dense": nn.Linear(64, 64), "lm_head": nn.Linear(64, 64)})
    quant.quantize(model, "nf4")
    assert isinstance(model["dense"], NF4Linear) and isinstance(model["lm_head"], nn.Linear)


@both
def test_a_quantised_model_never_stands_in_memory_unquantised(kind, monkeypatch):
    """Loading reads a layer, quantises it and lets go of it before it reads the next."""
    unquantised, quantized = weakref.WeakSet(), quant.quantized

    def watched(linear, kind):
        unquantised.add(linear)
        assert len(unquantised) == 1
        return quantized(linear, kind)

    monkeypatch.setattr(quant, "quantized", watched)
    decoder = load_backbone(BASE, torch.bfloat16, quantize=kind)
    found = {name: m for name, m in decoder.named_modules() if type(m) is quant.KINDS[kind]}
    assert len(found) == 7 * len(decoder.layers)
    afterwards = load_backbone(BASE, torch.float32)
    quant.quantize(afterwards, kind)  # from float32: the weights were not rounded to bfloat16
    for name, layer in found.items():
        for key, value in afterwards.get_submodule(name).named_buffers():
            torch.testing.assert_close(layer.get_buffer(key), value, atol=0, rtol=0)

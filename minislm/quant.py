"""Quantised linear layers: 4-bit NF4 to train adapters in little memory, int8 for CPU inference.

NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): a weight is one of 16 levels, quantiles of the
normal distribution, times the largest magnitude in its block of 64. These scales are quantised in
turn (double quantisation): their logarithms, less the mean, to int8, with a step size per 256.

    w = LEVELS[code] exp(offset + step q)           4 + 8/64 + 32/(64 * 256) = 4.127 bits per weight

The codes are bitsandbytes'; it takes q from a table. Nearly all of the error is the codes'.

int8 (after LLM.int8's vector-wise form, Dettmers et al. 2022, arXiv:2208.07339): a scale for every
output channel of the weight and for every row of x, so that a text's scores do not depend on the
rest of its batch. The sum is exact, in int32.

    y[n, o] = sx[n] sw[o] sum_i xq[n, i] wq[o, i]             xq, wq: -127 .. 127
"""

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj query key value dense".split()
NO_GRADIENT = "int8 layers have no gradient: train with nf4 or bfloat16, or use torch.no_grad()"
BLOCK, GROUP = 64, 256  # weights per scale, scales per step
TINY = 1e-30  # in the place of a scale of 0; 127 / TINY is finite

# The paper's appendix E: the quantiles of N(0, 1), 7 below 0 and 8 above, divided by the largest.
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=torch.float32)  # fmt: skip
MIDPOINTS = ((LEVELS[1:] + LEVELS[:-1]) / 2).tolist()
# A byte holds two codes, the first in its high bits: looking up both levels as one 8-byte word is
# five times as fast as looking up a row of two floats. (256,), one copy per device.
level_pairs = functools.cache(torch.cartesian_prod(LEVELS, LEVELS).view(torch.int64).flatten().to)
# with AVX2 alone oneDNN's int8 products have no fast kernel that gives bfloat16
TO_BFLOAT16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
CPU_BLOCKS = 8192  # so many are dequantised at a time


class NF4Linear(nn.Module):
    """A frozen linear layer in NF4, on any device; gradients flow through it to its input.

    weight: (out, in), bias: (out,). For the backward pass `lora.LowRank` dequantises it anew.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if weight.numel() % BLOCK:
            size, remedy = f"{self.in_features} -> {self.out_features}", "use bfloat16 or int8"
            raise ValueError(f"a linear layer of {size} has no whole number of {BLOCK}s: {remedy}")
        blocks = weight.detach().float().reshape(-1, BLOCK)
        absmax = blocks.abs().amax(1)  # (blocks,)
        blocks = blocks / absmax.clamp_min(TINY)[:, None]
        codes = sum((blocks > m).byte() for m in MIDPOINTS)  # 3 times as fast as torch.bucketize
        logs = absmax.clamp_min(1e-4 * absmax.max() + TINY).log()  # a block of zeros has none
        offset = logs.mean()
        delta = F.pad(logs - offset, (0, -len(logs) % GROUP)).view(-1, GROUP)
        steps = delta.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", codes[:, ::2] << 4 | codes[:, 1::2])  # (blocks, 32)
        self.register_buffer("scales", (delta / steps.clamp_min(TINY)).round().to(torch.int8))
        self.register_buffer("steps", steps)  # (groups, 1), of scales (groups, 256)
        self.register_buffer("offset", offset)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), computed in float32 and rounded once."""
        weight = nf4_weight([self.codes, self.scales, self.steps, self.offset], dtype)
        return weight.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), of x's dtype."""
        y = F.linear(x, self.dequantized(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)


def nf4_kernel(buffers: list[Tensor], dtype: torch.dtype) -> Tensor:
    """NF4Linear's codes, scales, steps, offset -> the weight's blocks, (blocks, 64)."""
    codes, scales, steps, offset = buffers
    weight = torch.empty(len(codes), BLOCK, dtype=dtype, device=codes.device)
    if codes.is_meta:  # torch.compile asks for the shape
        return weight
    absmax = (scales * steps + offset).exp().flatten()[: len(codes), None]  # (blocks, 1)
    pairs = level_pairs(codes.device)
    size = CPU_BLOCKS if weight.device.type == "cpu" else len(codes)
    for part, code, scale in zip(*(t.split(size) for t in (weight, codes, absmax))):
        levels = pairs.index_select(0, code.flatten().int()).view(torch.float32)
        part.copy_(levels.view(-1, BLOCK).mul_(scale))
    return weight


def int8_kernel(codes: Tensor, packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes (N, in): bytes, 128 for 0, as signed ones have no fast kernel -> (N, out)."""
    if codes.is_meta:  # torch.compile asks for the shape; len() is for one number
        return codes.new_empty(codes.shape[0], len(scale), dtype=dtype)
    codes, zeros = codes.view(torch.uint8), torch.zeros(len(scale), dtype=torch.int64)
    epilogue = (None, 1.0, 0, dtype, "none", [], "")  # no bias, no requantisation
    return torch.ops.onednn.qlinear_pointwise(codes, 1.0, 128, packed, scale, zeros, *epilogue)


# Operators of our own, which torch.compile leaves alone: of oneDNN's it wants the weight to be a
# constant, and over NF4's table it would sit for minutes.
library = torch.library.Library("minislm", "DEF")
library.define("nf4_weight(Tensor[] buffers, ScalarType dtype) -> Tensor")
library.define("int8_linear(Tensor codes, Tensor packed, Tensor scale, ScalarType dtype) -> Tensor")
library.impl("nf4_weight", nf4_kernel, "CompositeExplicitAutograd")
library.impl("int8_linear", int8_kernel, "CompositeExplicitAutograd")
nf4_weight = torch.ops.minislm.nf4_weight.default
int8_linear = torch.ops.minislm.int8_linear.default


@functools.cache
def neighbours() -> int:
    """How many adjacent weights of one sign may sum to 127 at most: 1 with VNNI, otherwise 2.

    Without VNNI the kernel adds two products in 16 bits, which saturate at 32,767: two weights may
    have 127 together (128 after rounding: 255 * 128 fits). Tried, as CPU flags do not tell.
    Raises ValueError where there is no such kernel for this CPU.
    """
    for n in (1, 2):
        weight = torch.tensor([127, 1], dtype=torch.int8)[:n].repeat(64, 64 // n)
        try:
            packed = torch.ops.onednn.qlinear_prepack(weight, None)
            codes = torch.full((64, 64), 255, dtype=torch.uint8)
            y = int8_linear(codes, packed, torch.ones(64).float(), torch.float32)
        except (AttributeError, RuntimeError):  # no such operator, or none for this CPU
            continue
        if torch.equal(y, torch.full_like(y, 127 * weight[0].sum())):
            return n
    need = "a CPU with 8-bit dot products (x86 with AVX2) and a PyTorch with oneDNN"
    raise ValueError(f"int8 needs {need}; use bfloat16 or float32 here")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, D) -> codes (N, D), the bytes 1 .. 255 around 128, and scales (N, 1)."""
    wide = x.float()  # bfloat16's own maximum is slow
    scales = (wide.abs().amax(1, keepdim=True) / 127).clamp_min_(TINY)
    # rounded before they divide, so that the rounding adds no error
    scales = scales.to(x.dtype) if x.dtype == torch.bfloat16 else scales
    # to multiply is faster than to divide, and int8 five times as fast as uint8
    codes = (wide * scales.float().reciprocal()).round_().to(torch.int8)
    return codes.bitwise_xor_(-128), scales  # flips the top bit: + 128, if read as uint8


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and activations, for inference on the CPU.

    weight: (out, in), bias: (out,). oneDNN's packed weight can be neither copied nor saved.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach().float()
        groups = F.pad(weight, (0, self.in_features % 2)).unflatten(1, (-1, neighbours()))
        # |a| + |b| + |a + b| is twice the sum if they are of one sign, or else twice the larger
        scale = (groups.abs().sum(2) + groups.sum(2).abs()).amax(1).div_(254).clamp_min_(TINY)
        codes = (weight / scale[:, None]).round_().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), of x's dtype."""
        return self.together(x, [self])[0]

    def together(self, x: Tensor, layers: list["Int8Linear"]) -> list[Tensor]:
        """What several layers make of the same x, which is quantised once."""
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(NO_GRADIENT)
        check("int8", x.device.type)
        codes, scales = quantize_rows(x.reshape(-1, x.shape[-1]))
        outputs = []
        for layer in layers:
            # straight to bfloat16: half the memory traffic; a bias is added before rounding
            dtype = scales.dtype if TO_BFLOAT16 and layer.bias is None else torch.float32
            y = int8_linear(codes, layer.packed, layer.scale, dtype).mul_(scales)  # (N, out)
            y = y if layer.bias is None else y.add_(layer.bias)
            outputs.append(y.to(x.dtype).view(*x.shape[:-1], layer.out_features))
        return outputs

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        raise ValueError(NO_GRADIENT)


KINDS = {"nf4": NF4Linear, "int8": Int8Linear}


def check(kind: str, device: str) -> None:
    """Raises ValueError unless there is this kind of quantisation for the device."""
    if kind not in ("none", *KINDS):
        raise ValueError(f"quantization {kind!r} is not one of none, {', '.join(KINDS)}")
    if kind == "int8" and device != "cpu":
        raise ValueError(f"int8 runs on the cpu, not on {device}; use nf4 or bfloat16 there")


def quantized(linear: nn.Linear, kind: str) -> NF4Linear | Int8Linear:
    """A linear layer's quantised form, "nf4" or "int8", that shares no memory with its weight."""
    check(kind, linear.weight.device.type)
    return KINDS[kind](linear.weight, linear.bias).train(linear.training)


@torch.no_grad()
def smooth(blocks: Iterable[nn.Module], run: Callable[[], object]) -> None:
    """Evens out what decoder blocks' linear layers read, so that int8 rounds less of it away.

    A channel is divided by s where it is made, and its weights are multiplied by it, so the model
    computes the same (SmoothQuant, Xiao et al. 2023, arXiv:2211.10438):

        s = sqrt(rms x / max |w|)              for each channel, over their median

    run: passes typical tokens through the blocks once, in float32 at least (bfloat16 has filler).
        The first is left out: as a sink of attention it is far larger than all others.
    """
    found = []
    with ExitStack() as hooks:
        for block in blocks:
            attn, mlp = block.self_attn, block.mlp
            for made, layers in (
                (block.input_layernorm.weight, [attn.q_proj, attn.k_proj, attn.v_proj]),
                (block.post_attention_layernorm.weight, [mlp.gate_proj, mlp.up_proj]),
                (mlp.up_proj.weight.T, [mlp.down_proj]),
            ):
                read = []  # x (N, in)
                hook = layers[0].register_forward_pre_hook(lambda _, x, read=read: read.extend(x))
                hooks.enter_context(hook)
                found.append((made, layers, read))
        run()
    for made, layers, (x,) in found:
        w = torch.cat([layer.weight for layer in layers])
        x, w = x[1:].square().mean(0).sqrt(), w.abs().amax(0)  # both (in,)
        s = (x.clamp_min(TINY) / w.clamp_min(TINY)).sqrt()
        s = (s / s.median()).clamp(1 / 8, 8)
        made /= s
        for layer in layers:
            layer.weight *= s


def quantize(model: nn.Module, kind: str) -> None:
    """Replaces the linear layers of all blocks, each weight freed before the next is touched."""
    linear = (path for path, module in model.named_modules() if isinstance(module, nn.Linear))
    paths = [path for path in linear if path.rpartition(".")[2] in TARGETS]
    if not paths:
        raise ValueError(f"no linear layer {', '.join(TARGETS)}: quantise once, before adapters")
    for path in paths:
        model.set_submodule(path, quantized(model.get_submodule(path), kind))

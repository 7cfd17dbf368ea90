"""LoRA: low-rank adapters on frozen linear layers (Hu et al. 2021, arXiv:2106.09685).

    y = x W^T + (alpha / r) dropout(x) A^T B^T      A (r, in), B (out, r); only A and B are trained

B starts at zero: an untrained adapter changes nothing. Layers that read the same x share a dropout
(PEFT draws one per layer) and one product with their A's. Adapters are in PEFT's format.

Axes: N tokens, r rank.
"""

import math
import re

import torch
from torch import Tensor, nn

from .quant import TARGETS

PREFIX = "base_model.model.model."  # PEFT's wrapper, then transformers' CausalLM around our Decoder

# PEFT's settings of which one value is implemented: plain LoRA.
PLAIN = dict(bias="none", use_dora=False, use_rslora=False, lora_bias=False, fan_in_fan_out=False)
PLAIN |= dict(rank_pattern={}, alpha_pattern={}, modules_to_save=None, layer_replication=None)


def draw_dropped(n: int, p: float, device: torch.device) -> Tensor:
    """Which of n places dropout zeroes: int64, where n means none; on a GPU a mask, (n,) bool.

    Gaps between independent rare events are geometric: one random number per zero, where a mask
    takes one per place. Those drawn fall short of n once in 10^8 calls.
    """
    if device.type == "cuda":  # two kernels, not nine
        return torch.rand(n, device=device) < p
    uniform = torch.rand(int(n * p + 6 * (n * p) ** 0.5) + 20, device=device)
    gaps = (torch.log1p(-uniform) / math.log1p(-p)).clamp_(max=2 * n)  # kept places before a zero
    return ((gaps.long() + 1).cumsum(0) - 1).clamp_(max=n)


def drop(x: Tensor, places: Tensor | None) -> Tensor:
    """A copy of x with zeros at what `draw_dropped` drew; x itself if that was None."""
    if places is None:
        return x
    if places.dtype == torch.bool:  # an index would copy its 0 to the GPU when compiled
        return x.masked_fill(places.view_as(x), 0)
    flat = torch.cat([x.flatten(), x.new_empty(1)])  # one more, for the places that mean none
    flat[places] = 0
    return flat[:-1].view_as(x)


def add_product(out: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """out + x @ y: out (N, m), x (N, n), y (n, m); in place, where it is not compiled.

    Compiled in place, PyTorch 2.11 loses the outputs' gradients, and to add into a view, as `drop`
    returns it, is a slow masked pass.
    """
    return torch.addmm(out, x, y) if torch.compiler.is_compiling() else out.addmm_(x, y)


class LowRank(torch.autograd.Function):
    """base(x) + dropped(x) A^T B^T for layers with the same x; all in x's dtype.

    The backward pass keeps the dropped x alone (frozen weights need no x) and the dropped places:
    0.4 bytes an element at dropout 0.05, a mask has 1. With the bases inside, their gradients of x
    are added to the adapters' in place.
    """

    @staticmethod
    def forward(ctx, x, places, bases, a, b):  # x (N, in), n A's (n r, in), B's (out + out .., r)
        outs = [base(x) for base in bases]
        x = drop(x, places)
        low = x @ a.T  # (N, n r)
        ctx.save_for_backward(x, places, a, b, low)
        ctx.bases, ctx.sizes = bases, [out.shape[1] for out in outs]
        parts = zip(outs, low.chunk(len(outs), 1), b.split(ctx.sizes))
        return tuple(add_product(out, part, B.T) for out, part, B in parts)

    @staticmethod
    def backward(ctx, *grads):  # each (N, out)
        x, places, a, b, low = ctx.saved_tensors
        grad_low = torch.cat([grad @ B for grad, B in zip(grads, b.split(ctx.sizes))], 1)
        grad_b = torch.cat([grad.T @ part for grad, part in zip(grads, low.chunk(len(grads), 1))])
        grad_a, grad_x = grad_low.T @ x, None  # grad_low (N, n r)
        if ctx.needs_input_grad[0]:
            grad_x = drop(grad_low @ a, places)
            for grad, base in zip(grads, ctx.bases):
                linear = isinstance(base, nn.Linear)
                weight = base.weight if linear else base.dequantized(x.dtype)
                grad_x = add_product(grad_x, grad, weight)
        return grad_x, None, None, grad_a, grad_b


class LoRALinear(nn.Module):
    """A frozen linear layer, quantised or not, and its adapter; A and B in float32 at least."""

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.alpha, self.scaling, self.dropout = alpha, alpha / r, dropout
        held = next(iter(base.state_dict().values()))  # a weight, or a quantised layer's buffer
        like = dict(device=held.device, dtype=torch.promote_types(held.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in) -> (N, out)."""
        return self.together(x, [self])[0]

    def together(self, x: Tensor, layers: list["LoRALinear"]) -> tuple[Tensor, ...]:
        """The outputs of `layers`, all injected with the same settings, for one x, dropped once."""
        p = self.dropout if self.training else 0.0
        places = draw_dropped(x.numel(), p, x.device) if p else None
        a = torch.cat([layer.lora_A for layer in layers]).to(x.dtype)
        b = (self.scaling / (1 - p) * torch.cat([layer.lora_B for layer in layers])).to(x.dtype)
        return LowRank.apply(x, places, [layer.base for layer in layers], a, b)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's adapted layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def inject(model: nn.Module, r: int, alpha: float, dropout: float, names=None) -> None:
    """Freezes the model and adapts its linear layers: all of every block, or `names`."""
    if r < 1:
        raise ValueError(f"the LoRA rank must be at least 1, not {r}")
    if adapters(model):
        raise ValueError("the model has adapters already: merge them first")
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        wanted = name.rpartition(".")[2] in TARGETS if names is None else name in names
        if wanted and hasattr(layer, "in_features"):  # nn.Linear, or a quantised one
            model.set_submodule(name, LoRALinear(layer, r, alpha, dropout).train(layer.training))


@torch.no_grad()
def rounded_away(model: nn.Module) -> float:
    """How much of the adapters `merge` would round away: the norm of the error over theirs.

    In float32 that is nothing; in bfloat16 a tenth, and nearly all of an adapter that was trained
    with very small steps. A quantised weight takes in none: 1.
    """
    error, size = 0.0, 1e-30
    for layer in adapters(model).values():
        if not isinstance(layer.base, nn.Linear):
            return 1.0
        weight, update = layer.base.weight, layer.scaling * layer.lora_B @ layer.lora_A
        merged = (weight + update).to(weight.dtype).to(update.dtype)
        error += (merged - weight - update).square().sum().item()
        size += update.square().sum().item()
    return (error / size) ** 0.5


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds every adapter to its layer's weight, which is not quantised, and removes it."""
    for name, layer in adapters(model).items():
        layer.base.weight += layer.scaling * layer.lora_B @ layer.lora_A  # (out, in)
        model.set_submodule(name, layer.base)


def prefix(model: nn.Module) -> str:
    """What PEFT's names begin with: around an encoder there is no CausalLM."""
    return PREFIX.removesuffix("model.") if hasattr(model, "embeddings") else PREFIX


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors under PEFT's names."""
    own = model.named_parameters()  # layer.lora_A and layer.lora_B among them
    return {f"{prefix(model)}{name}.weight": p.detach() for name, p in own if ".lora_" in name}


def adapter_config(model: nn.Module, base_model: str) -> dict:
    """The content of PEFT's adapter_config.json."""
    layers = adapters(model)
    first = next(iter(layers.values()))
    return PLAIN | {
        "peft_type": "LORA", "base_model_name_or_path": base_model, "inference_mode": True,
        "task_type": "CAUSAL_LM" if prefix(model) == PREFIX else "FEATURE_EXTRACTION",
        "r": len(first.lora_A), "lora_alpha": first.alpha, "lora_dropout": first.dropout,
        # PEFT adapts what ends so; "dense" alone would be the pooler's as well
        "target_modules": sorted({re.search(r"(\w+\.)?dense$|\w+$", n)[0] for n in layers}),
    }  # fmt: skip

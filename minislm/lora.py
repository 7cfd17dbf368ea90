"""LoRA: low-rank adapters on frozen linear layers (Hu et al. 2021, arXiv:2106.09685).

    y = x W^T + (alpha / r) dropout(x) A^T B^T      A (r, in), B (out, r); only A and B are trained

B starts at zero, so an untrained adapter changes nothing. The adapter is saved in PEFT's format
(adapter_config.json, adapter_model.safetensors), and PEFT's adapters are read.

Axes: N tokens, r rank.
"""

import json
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS += ("query", "key", "value", "dense")  # of an encoder
PREFIX = "base_model.model.model."  # PEFT's wrapper, then transformers' CausalLM around our Decoder

# What PEFT can write and we do not compute: the value that means "not used".
UNUSED = {"bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False}
UNUSED |= {"lora_bias": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}


def draw_dropped(n: int, p: float, device: torch.device) -> Tensor:
    """The places that dropout with probability p zeroes among n: int64, those >= n meaning none.

    The gaps between independent rare events are geometric, so that one random number a zero is
    enough, where a mask takes one a place. Enough gaps are drawn to pass n but once in 10^8.
    """
    expected = n * p
    uniform = torch.rand(int(expected + 6 * expected**0.5) + 20, device=device)
    gaps = (torch.log1p(-uniform) / math.log1p(-p)).long()  # kept places before each zero
    return ((gaps + 1).cumsum(0) - 1).clamp_(max=n)


def dropped(x: Tensor, places: Tensor | None) -> Tensor:
    """x with zeros at some places of its flattened self; a copy, unless there are none."""
    if places is None:
        return x
    y = torch.cat([x.flatten(), x.new_empty(1)])  # one more, for the places that mean none
    return y.index_fill_(0, places, 0)[:-1].view_as(x)


class LowRank(torch.autograd.Function):
    """base(x) + scale * dropped(x) A^T B^T; A and B are cast to x's dtype.

    Kept for the backward pass are x, which several layers share, and the dropped places: 0.4 bytes
    an element at dropout 0.05, where a mask has one, and the dropped copy of x two or four. That
    the base is inside saves a sum: its product adds to the adapter's gradient of x.
    """

    @staticmethod
    def forward(ctx, x, A, B, base, scale, places):  # x (N, in), A (r, in), B (out, r)
        a, b = A.to(x.dtype), (scale * B).to(x.dtype)
        low = dropped(x, places) @ a.T  # (N, r)
        ctx.save_for_backward(x, a, b, low, places)
        ctx.base, ctx.scale, ctx.dtype = base, scale, A.dtype
        return base(x).addmm_(low, b.T)

    @staticmethod
    def backward(ctx, grad):  # (N, out)
        (x, a, b, low, places), base = ctx.saved_tensors, ctx.base
        grad_low = grad @ b  # (N, r)
        grad_A = grad_low.T @ dropped(x, places)
        grad_B = (grad.T @ low).to(ctx.dtype) * ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight = base.weight if isinstance(base, nn.Linear) else base.dequantized(x.dtype)
            grad_x = dropped(grad_low @ a, places).addmm_(grad, weight)
        return grad_x, grad_A.to(ctx.dtype), grad_B, None, None, None


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapter; A and B are float32 whatever the layer's dtype.

    base: nn.Linear, or what stands for one (in_features, out_features): a quantised layer.
    """

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling, self.dropout = alpha / r, dropout
        held = next(iter(base.state_dict().values()))  # a weight, or a quantised layer's buffer
        like = dict(device=held.device, dtype=torch.promote_types(held.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @torch.compiler.disable  # its autograd function, which a graph would not make faster
    def forward(self, x: Tensor) -> Tensor:
        """x (N, in) -> (N, out)."""
        drops = self.training and self.dropout > 0
        places = draw_dropped(x.numel(), self.dropout, x.device) if drops else None
        scale = self.scaling / (1 - self.dropout if drops else 1)
        return LowRank.apply(x, self.lora_A, self.lora_B, self.base, scale, places)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's adapted layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def inject(model: nn.Module, r: int, alpha: float, dropout: float, names=None) -> None:
    """Freezes the model and adapts its linear layers: all of every block, or `names`."""
    if r < 1:
        raise ValueError(f"the LoRA rank must be at least 1, not {r}")
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        wanted = name.rpartition(".")[2] in TARGETS if names is None else name in names
        if wanted and hasattr(layer, "in_features"):  # nn.Linear, or a quantised one
            model.set_submodule(name, LoRALinear(layer, r, alpha, dropout).train(layer.training))


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds every adapter to its layer's weight, which is not quantised, and removes it."""
    for name, layer in adapters(model).items():
        weight = layer.base.weight
        weight += (layer.scaling * layer.lora_B @ layer.lora_A).to(weight.dtype)  # (out, in)
        model.set_submodule(name, layer.base)


def prefix(model: nn.Module) -> str:
    """What PEFT's names begin with: around an encoder there is no CausalLM."""
    return PREFIX.removesuffix("model.") if hasattr(model, "embeddings") else PREFIX


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors under PEFT's names."""
    return {
        f"{prefix(model)}{name}.{part}.weight": getattr(layer, part).detach()
        for name, layer in adapters(model).items() for part in ("lora_A", "lora_B")
    }  # fmt: skip


def adapter_config(model: nn.Module, base_model: str) -> dict:
    """The content of PEFT's adapter_config.json."""
    layers = adapters(model)
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA", "base_model_name_or_path": base_model, "inference_mode": True,
        "task_type": "CAUSAL_LM" if prefix(model) == PREFIX else "FEATURE_EXTRACTION",
        "r": len(first.lora_A), "lora_alpha": first.scaling * len(first.lora_A),
        "lora_dropout": first.dropout, "bias": "none", "fan_in_fan_out": False,
        # PEFT adapts what ends so; "dense" alone would be the pooler's as well
        "target_modules": sorted({re.search(r"(\w+\.)?dense$|\w+$", n)[0] for n in layers}),
    }  # fmt: skip


def load_adapter(folder: Path, model: nn.Module) -> None:
    """Reads a plain LoRA adapter that we or PEFT saved; where the model has none, injects it."""
    config_path = folder / "adapter_config.json"
    try:
        config = json.loads(config_path.read_text())
        state = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: no readable LoRA adapter there: {error}") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{config_path}: peft_type {config.get('peft_type')!r} is not LORA")
    for key, unused in UNUSED.items():
        if config.get(key) not in (unused, None, False):
            raise ValueError(f"{config_path}: {key} = {config[key]!r} is not implemented")
    if not adapters(model):
        names = {name.removeprefix(prefix(model)).partition(".lora_")[0] for name in state}
        inject(model, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), names)
    own = adapter_state(model)
    needed, found = ({k: tuple(t.shape) for k, t in tensors.items()} for tensors in (own, state))
    for name in sorted(needed.keys() | found.keys()):
        if found.get(name) != needed.get(name):
            shapes = f"{found.get(name)}, the model needs {needed.get(name)} (None: no such tensor)"
            raise ValueError(f"{folder}: {name} has shape {shapes}")
    for name, tensor in own.items():
        tensor.copy_(state[name])

"""What turns hidden states into class scores.

The sliced head is the LM head without the rows nobody asks for: C rows of V,

    logits = hidden @ W_unembed[label_token_ids].T

the same numbers as slicing the full logits, at C/V of the work. Every head takes the hidden states
(B, Q, D) of a text's Q prompts (mostly one) and gives scores (B, C), in float32 at least whatever
the model's dtype. Its state, where there is any, is what training adds to the run's folder.

Axes: B texts, Q prompts per text, C classes, D hidden, V vocab, M tokens of all class names.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SlicedHead(nn.Module):
    """The classes' rows of the LM head: frozen, unless every weight is trained (a copy of theirs).

    In float32 at least: bfloat16 would round logits near 30 to multiples of 1/8, and classes tie.
    """

    def __init__(self, rows: Tensor):
        """rows: (C, D), one per class; or (1, D), yes minus no, where each class has a prompt."""
        super().__init__()
        self.register_buffer("weight", rows, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.to(self.weight.dtype), self.weight).flatten(1)


class NamesHead(nn.Module):
    """The log-probability of each class's whole name, the sum of its tokens'.

    names: the C names' tokens. rows: (M, D), the LM head's row of each, in float32 at least.
    unembed: the whole head, (..., D) -> (..., V). The model is asked after each distinct beginning
    of a name (`nodes`; the first: the prompt alone), so names share work. greedy: a score of 0 for
    the name that greedy decoding restricted to names would give, -inf for the others.
    """

    def __init__(self, unembed: Callable, rows: Tensor, names: list[list[int]], greedy: bool):
        super().__init__()
        nodes = sorted(map(list, {tuple(n[:i]) for n in names for i in range(len(n))}), key=len)
        steps = [(nodes.index(n[:i]), c) for c, n in enumerate(names) for i in range(len(n))]
        self.register_buffer("steps", torch.tensor(steps).T.contiguous(), persistent=False)
        self.register_buffer("rows", rows, persistent=False)
        self.nodes, self.unembed, self.classes, self.greedy = nodes, unembed, len(names), greedy

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (B, Q, D), Q nodes."""
        node, of_class = self.steps  # each (M,)
        normalizer = self.unembed(hidden).to(self.rows.dtype).logsumexp(-1)  # (B, Q)
        steps = (hidden[:, node].to(self.rows.dtype) * self.rows).sum(-1) - normalizer[:, node]
        if self.greedy and not self.training:  # a step is taken if none from its node is better
            best = torch.full_like(normalizer, -torch.inf)
            best = best.scatter_reduce(1, node.expand(len(steps), -1), steps, "amax")
            steps = torch.where(steps >= best[:, node], 0.0, -torch.inf)
        return steps.new_zeros(len(steps), self.classes).index_add(1, of_class, steps)


class MLPHead(nn.Module):
    """Linear D-D, ReLU, Linear D-C: a new head, trained with the adapters."""

    def __init__(self, size: int, classes: int):
        super().__init__()
        self.dense, self.out = nn.Linear(size, size), nn.Linear(size, classes)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(self.dense(hidden[:, 0].to(self.out.weight.dtype)).relu())


class CosineHead(nn.Module):
    """The cosine of a text and each class's description, over a learned temperature."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes
        self.log_scale = nn.Parameter(torch.tensor(3.0))  # e^3 = 1 / 0.05, as is usual

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (B + C, 1, D), the descriptions last -> (B, C)."""
        unit = F.normalize(hidden[:, 0].to(self.log_scale.dtype), dim=-1)
        return self.log_scale.exp() * unit[: -self.classes] @ unit[-self.classes :].T


def fit_calibration(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Temperature scaling (Guo et al. 2017) with a bias per class (Alexandari et al. 2020).

    The scale () and bias (C,) with which logits (N, C) * scale + bias have the least cross-entropy
    on targets (N,) int64. Weak priors keep both finite if no target is missed, or a class has none.
    """
    x = logits.double() - logits.double().mean(-1, keepdim=True)
    unit = x.std(correction=0).clamp_min(1e-6)  # the search's unit: logits may hardly differ
    log_scale = torch.zeros_like(unit, requires_grad=True)
    bias = torch.zeros_like(x[0], requires_grad=True)
    lbfgs = torch.optim.LBFGS([log_scale, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        lbfgs.zero_grad()
        value = F.cross_entropy(x / unit * log_scale.exp() + bias, targets)
        value = value + (0.1 * bias.square().sum() + (log_scale - unit.log()) ** 2 / 2) / len(x)
        value.backward()
        return value

    lbfgs.step(loss)
    return {"scale": (log_scale.exp() / unit).detach().float(), "bias": bias.detach().float()}

"""What turns a hidden state into class scores.

The sliced head is the LM head without the rows nobody asks for: C rows of V,

    logits = hidden @ W_unembed[label_token_ids].T

the same numbers as slicing the full logits, at C/V of the work. Axes: D hidden, C classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class SlicedHead(nn.Module):
    """The classes' rows of the LM head, frozen: nothing to train, nothing to save."""

    def __init__(self, rows: Tensor):
        """rows: (C, D), the LM head's rows of the label tokens."""
        super().__init__()
        self.weight = nn.Parameter(rows.clone(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., C), float32 at least: a softmax follows."""
        logits = F.linear(hidden, self.weight)
        return logits if logits.itemsize >= 4 else logits.float()

"""What turns a hidden state into class scores.

The sliced head is the LM head without the rows nobody asks for: C rows of V,

    logits = hidden @ W_unembed[label_token_ids].T

the same numbers as slicing the full logits, at C/V of the work. Axes: D hidden, C classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class SlicedHead(nn.Module):
    """The classes' rows of the LM head, frozen: nothing to train, nothing to save.

    They are C rows only, so they are multiplied in float32 whatever the model's dtype: bfloat16
    would round logits around 30 to multiples of 1/8, and classes would tie.
    """

    def __init__(self, rows: Tensor):
        """rows: (C, D), the LM head's rows of the label tokens."""
        super().__init__()
        rows = rows.clone() if rows.itemsize >= 4 else rows.float()
        self.weight = nn.Parameter(rows, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., C), float32 or float64."""
        return F.linear(hidden.to(self.weight.dtype), self.weight)

"""Prompts to batches in which every distinct token is computed once.

The instruction and the class list are the same in every prompt, so the longest common token prefix
of a batch runs once, and its keys and values serve all texts. That is exact: the tokens are
compared, not the strings (a text can merge into the token before it), and gradients flow through
the shared part. LoRA's dropout then draws one mask for the prefix a batch instead of one a text.
"""

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from .decoder import Decoder, KeyValues
from .encoder import Encoder


def common_prefix(prompts: list[list[int]]) -> list[int]:
    """The tokens that all prompts begin with, short of any prompt's last token."""
    return os.path.commonprefix(prompts)[: min(map(len, prompts)) - 1]


def side_by_side(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids as (B, T) int64, zeros at padding, and which of them are real, (B, T) bool."""
    lengths = torch.tensor([len(text) for text in texts])
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.zeros(real.shape, dtype=torch.int64)
    ids[real] = torch.tensor([token for text in texts for token in text])
    return ids, real


def text_hidden(backbone: Decoder | Encoder, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """All tokens' hidden states (B, T, D), zeros at padding, and which are real, (B, T) bool."""
    device = next(backbone.parameters()).device
    ids, real = (x.to(device) for x in side_by_side(prompts))
    return backbone(ids, real), real


def last_hidden(
    decoder: Decoder, prompts: list[list[int]], shared: int, prefix: list[KeyValues] | None = None
) -> Tensor:
    """The last token's hidden state of each prompt, (B, D).

    prompts: token ids, of which the first `shared` are the same in all.
    prefix: the keys and values of these; None: they are computed with the texts.
    """
    tree = [side_by_side([prompt[shared:] for prompt in prompts])]
    lengths = tree[0][1].sum(1)
    if shared and prefix is None:
        first = torch.tensor([prompts[0][:shared]])
        tree.insert(0, (first, torch.ones_like(first, dtype=torch.bool)))
    device = decoder.embed_tokens.weight.device
    ids, real = zip(*((i.to(device), r.to(device)) for i, r in tree))
    return decoder(list(ids), real, prefix, (lengths - 1)[:, None].to(device))[:, 0]  # (B, D)


def length_batches(lengths: list[int], shared: int, budget: int) -> Iterator[list[int]]:
    """Indices of texts in batches, the longest texts first.

    lengths: tokens of each text without the `shared` ones of the prefix.
    budget: tokens a batch, padding included; with the prefix's keys at most sixteen times as many.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        longest = lengths[order[0]]
        size = max(1, min(budget // longest, 16 * budget // (shared + longest)))
        yield order[:size]
        order = order[size:]

"""Prompts to batches in which every distinct token is computed once.

The instruction and the class list are the same in every prompt, so the longest common token prefix
of a batch runs once, and its keys and values serve all texts. Where a text has several prompts (one
a class), what these have in common runs once a text; where a prompt may go on in several ways (the
names of the classes), it runs once, and each distinct beginning of a way once after it. That is
exact: the tokens are compared, not the strings (a text can merge into the token before it), and
gradients flow through the shared parts. LoRA's dropout then draws one mask for a shared part.

Axes: B texts, Q prompts (or beginnings of answers) a text, T tokens, D hidden.
"""

from collections.abc import Iterator
from itertools import accumulate, takewhile, zip_longest

import torch
from torch import Tensor

from .decoder import Cache, Decoder
from .encoder import Encoder

Group = list[list[int]]  # the Q prompts of one text, as token ids


def common_prefix(prompts: list[list[int]]) -> list[int]:
    """The tokens that all prompts begin with, short of any prompt's last token."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(min(prompts), max(prompts)))
    return [token for token, _ in same][: min(map(len, prompts)) - 1]


def pad(rows: list[list[int]], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids (B, T) int64, padded on the right, and which of them are real (B, T) bool."""
    ids = torch.tensor([*zip_longest(*rows, fillvalue=-1)], device=device).t()  # (B, T)
    return ids.clamp(0), ids >= 0


def fill_rows(lengths: list[int]) -> list[list[int]]:
    """Rows as long as the longest of these texts, by their indices: first-fit decreasing."""
    rows, longest = [[] for _ in lengths], max(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next(row for row in rows if sum(lengths[j] for j in row) + lengths[i] <= longest)
        row.append(i)
    return [row for row in rows if row]


def last_hidden(
    decoder: Decoder, groups: list[Group], shared: int, cache: Cache | None = None,
    nodes: Group | None = None,
) -> Tensor:  # fmt: skip
    """The last token's hidden state of each prompt, (B, Q, D); short ones share a row of a pass.

    groups: B texts' prompts, of which the first `shared` tokens are the same in all.
    cache: of these (`Decoder.extend`); None: they are computed with the texts.
    nodes: Q beginnings of an answer, the empty one first, each other after the one it continues
        by a token. The result is then the last hidden state after a text's only prompt and each.
    """
    several = nodes or len(groups[0]) > 1
    ends = [len(common_prefix(group)) if several else shared for group in groups]
    tree = [[groups[0][0][:shared]]] if shared and cache is None else []  # what all begin with
    if max(ends) > shared:  # what the prompts of a text do
        tree.append([group[0][shared:end] for group, end in zip(groups, ends)])
    after = [node[-1] for node in nodes[1:]] if nodes else []
    tails = [prompt[end:] + after for group, end in zip(groups, ends) for prompt in group]
    apart = several or not torch.is_grad_enabled()  # at inference lengths are alike
    rows = [[i] for i in range(len(tails))] if apart else fill_rows([*map(len, tails)])
    tree.append([[token for i in row for token in tails[i]] for row in rows])  # the rest, in rows
    device = decoder.embed_tokens.weight.device
    ids, real = zip(*(pad(level, device) for level in tree))
    if nodes:  # the last level is these, and each sees those that it continues
        looks = torch.tensor([[a[: len(b)] == b for b in nodes] for a in nodes], device=device)
        return decoder(list(ids), list(real), cache, looks=looks)
    owner = pad([[i for i in row for _ in tails[i]] for row in rows], device)[0]  # (rows, T)
    looks = owner[:, :, None] == owner[:, None]  # a text of a row sees itself
    stops, wanted = pad([[*accumulate(len(tails[i]) for i in row)] for row in rows], device)
    hidden = decoder(list(ids), list(real), cache, stops - 1, looks)[wanted]  # in the rows' order
    return hidden[torch.tensor(sum(rows, [])).argsort()].view(len(groups), -1, hidden.shape[-1])


def pooled_hidden(backbone: Decoder | Encoder, groups: list[Group], pooling: str) -> Tensor:
    """One vector of a text's only prompt, (B, 1, D): its tokens' mean, or the first's or last's."""
    ids, real = pad([prompt for (prompt,) in groups], next(backbone.parameters()).device)
    hidden = backbone(ids, real)  # (B, T, D), zeros at padding
    if pooling == "mean":
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return (hidden.sum(1, dtype=wide) / real.sum(1, keepdim=True))[:, None]
    at = real.sum(1) - 1 if pooling == "last" else 0
    return hidden[torch.arange(len(hidden)), at][:, None]


def length_batches(groups: list[Group], shared: int, budget: int, after: int = 0) -> Iterator[list]:
    """Indices of texts in batches, the longest texts first.

    shared, after: tokens of the prefix, which are not counted, and of answers after each text.
    budget: tokens per batch, padding counted; at most 16 times as many keys, with the prefix's.
    """
    spared = [(len(g) - 1) * len(common_prefix(g)) for g in groups]  # what they share runs once
    lengths = [sum(map(len, g)) - n - shared + after for g, n in zip(groups, spared)]
    order = sorted(range(len(groups)), key=lambda i: -lengths[i])
    while order:
        first = groups[order[0]]
        keys = len(first) * max(map(len, first))
        size = max(1, min(budget // max(1, lengths[order[0]]), 16 * budget // max(1, keys)))
        yield order[:size]
        order = order[size:]

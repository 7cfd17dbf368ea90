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
import torch.nn.functional as F
from torch import Tensor

from .decoder import Cache, Decoder
from .encoder import Encoder

Group = list[list[int]]  # the Q prompts of one text, as token ids


def common_prefix(prompts: list[list[int]]) -> list[int]:
    """The tokens that all prompts begin with, short of any prompt's last token."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(min(prompts), max(prompts)))
    return [token for token, _ in same][: min(map(len, prompts)) - 1]


def round_up(n: int, least: int, parts: int) -> int:
    """To one of few sizes: a multiple of `least`, or of the next power of two's `parts`-th part."""
    step = max(least, (1 << n.bit_length()) // parts)
    return -(-n // step) * step


def fill(rows: list[list[int]], rounded: bool = False) -> Tensor:
    """Rows of numbers as (B, T) int64, -1 at padding, on the right; rounded: T is rounded up."""
    x = torch.tensor([*zip_longest(*rows, fillvalue=-1)]).t()
    return F.pad(x, (0, round_up(x.shape[1], 8, 16) - x.shape[1]), value=-1) if rounded else x


def pad(rows: list[list[int]], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids (B, T) int64, padded on the right, and which of them are real (B, T) bool."""
    ids = fill(rows).to(device)
    return ids.clamp(0), ids >= 0


def fill_rows(lengths: list[int], longest: int) -> list[list[int]]:
    """Rows of texts of at most `longest` tokens, by their indices: first-fit decreasing."""
    rows, room = [[] for _ in lengths], [longest] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        first = next(row for row, free in enumerate(room) if free >= lengths[i])
        rows[first].append(i)
        room[first] -= lengths[i]
    return [row for row in rows if row]


def arrange(
    groups: list[Group], shared: int, cached: bool = False, nodes: Group = (), packed: bool = True
) -> list[Tensor]:
    """A batch as tensors on the CPU, for `last_hidden`; in training short texts share a row.

    groups: B texts' prompts, of which the first `shared` tokens are the same in all.
    cached: these are computed already. packed: see `Decoder.forward`; if not, few sizes come up.
    nodes: Q beginnings of an answer, the empty one first, each other after the one it continues
        by a token. They stand after a text's only prompt, and all are wanted.

    Returns the levels of a tree, each (B_i, T_i) int64, -1 at padding; of the last level whose each
    place is, (B_i, T), or empty if each row is of one text, or if nodes what it may see, (T, T)
    bool; the places of it that are wanted, (B_i, W), -1: none; and each text's of those, (B, Q).
    """
    several = nodes or len(groups[0]) > 1
    ends = [len(common_prefix(group)) if several else shared for group in groups]
    tree = [[groups[0][0][:shared]]] if shared and not cached else []  # what all begin with
    if max(ends) > shared:  # what the prompts of a text do
        tree.append([group[0][shared:end] for group, end in zip(groups, ends)])
    after = [node[-1] for node in nodes[1:]]
    tails = [prompt[end:] + after for group, end in zip(groups, ends) for prompt in group]
    lengths = [*map(len, tails)]
    longest = max(lengths) if packed else round_up(max(lengths), 8, 16)
    apart = several or not torch.is_grad_enabled()  # at inference lengths are alike
    rows = [[i] for i in range(len(tails))] if apart else fill_rows(lengths, longest)
    if not packed and not apart:
        rows += [[]] * (round_up(len(rows), 1, 8) - len(rows))
    above = [fill(level, not packed) for level in tree]
    if nodes:  # the last level is these, always as many; each sees those that it continues
        last, wanted = fill(tails), torch.arange(len(nodes)).expand(len(tails), -1)
        looks = torch.tensor([[a[: len(b)] == b for b in nodes] for a in nodes])
    else:
        last = fill([[token for i in row for token in tails[i]] for row in rows], not packed)
        owners = [[i for i in row for _ in tails[i]] for row in rows]
        looks = torch.empty(0) if apart else fill(owners, not packed)
        stops = [[end - 1 for end in accumulate(lengths[i] for i in row)] for row in rows]
        wanted = fill(stops, not packed and not apart)  # apart, each row has one
    places = (wanted >= 0).flatten().nonzero().view(len(tails), -1)  # in the rows' order
    order = places[torch.tensor(sum(rows, [])).argsort()].view(len(groups), -1)
    return [*above, last, looks, wanted, order]


def last_hidden(
    decoder: Decoder, batch: list[Tensor], cache: Cache | None = None, packed: bool = True
) -> Tensor:
    """The last token's hidden state of each prompt, or node, of a batch of `arrange`: (B, Q, D).

    cache: of the shared tokens (`Decoder.extend`); None: they are in the batch.
    """
    device = decoder.embed_tokens.weight.device
    *levels, looks, wanted, order = (x.to(device) for x in batch)
    if looks.dtype != torch.bool:  # a text of a row sees itself
        looks = looks[:, :, None] == looks[:, None] if len(looks) else None
    ids, real = [level.clamp(0) for level in levels], [level >= 0 for level in levels]
    return decoder(ids, real, cache, wanted, looks, packed=packed).flatten(0, 1)[order]


def pooled_hidden(backbone: Decoder | Encoder, groups: list[Group], pooling: str) -> Tensor:
    """One vector of a text's only prompt, (B, 1, D): its tokens' mean, or the first's or last's."""
    ids, real = pad([prompt for (prompt,) in groups], next(backbone.parameters()).device)
    hidden = backbone(ids, real)  # (B, T, D), zeros at padding
    if pooling == "mean":
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return (hidden.sum(1, dtype=wide) / real.sum(1, keepdim=True))[:, None]
    at = real.sum(1) - 1 if pooling == "last" else 0
    return hidden[torch.arange(len(hidden)), at][:, None]


def length_batches(
    groups: list[Group], shared: int, budget: int, after: int = 0, repeats: bool = True,
    keys: int = 16,
) -> Iterator[list[int]]:  # fmt: skip
    """Indices of texts in batches, the longest texts first.

    shared, after: tokens of the prefix, which are not counted, and of answers after each text.
    budget: tokens per batch, padding counted. keys: how many there may be for each of these, with
        the prefix's where it `repeats`: is copied for each text (see `Cache.serves_all`).
    """
    spared = [(len(g) - 1) * len(common_prefix(g)) for g in groups]  # what they share runs once
    lengths = [sum(map(len, g)) - n - shared + after for g, n in zip(groups, spared)]
    order = sorted(range(len(groups)), key=lambda i: -lengths[i])
    while order:
        first = groups[order[0]]
        seen = len(first) * (max(map(len, first)) - (0 if repeats else shared))
        size = max(1, min(budget // max(1, lengths[order[0]]), keys * budget // max(1, seen)))
        yield order[:size]
        order = order[size:]

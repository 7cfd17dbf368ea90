"""Prompts to batches in which every distinct token is computed once.

The instruction and the class list are the same in every prompt, so the longest common token prefix
of a batch runs once, and its keys and values serve all texts. Where a text has several prompts (one
a class), what these have in common runs once a text; where several answers may follow a prompt (the
names of the classes), it runs once, and so does each distinct beginning of an answer. That is
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
    # what the first and the last in order share, all share
    same = takewhile(lambda pair: pair[0] == pair[1], zip(min(prompts), max(prompts)))
    return [token for token, _ in same][: min(map(len, prompts)) - 1]


def round_up(n: int, least: int, parts: int) -> int:
    """n to one of few sizes: a multiple of `least`, or of a `parts`-th of the next power of two."""
    step = max(least, (1 << n.bit_length()) // parts)
    return -(-n // step) * step


def pad(rows: list[list[int]], rounded: bool = False) -> Tensor:
    """Rows of numbers as (B, T) int64, -1 at padding, on the right; rounded: T is rounded up."""
    x = torch.tensor([*zip_longest(*rows, fillvalue=-1)]).t()
    return F.pad(x, (0, round_up(x.shape[1], 8, 16) - x.shape[1]), value=-1) if rounded else x


def share_rows(lengths: list[int], longest: int) -> list[list[int]]:
    """Texts, by their indices, in rows of at most `longest` tokens: first-fit decreasing."""
    rows, room = [[] for _ in lengths], [longest] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        first = next(row for row, free in enumerate(room) if free >= lengths[i])
        rows[first].append(i)
        room[first] -= lengths[i]
    return [row for row in rows if row]


def arrange(
    groups: list[Group], shared: int, cached: bool = False, nodes: Group = (), rounded: bool = False
) -> list[Tensor]:
    """A batch as tensors on the CPU, for `last_hidden`; in training short texts share a row.

    groups: the prompts of B texts, which all begin with the same `shared` tokens.
    cached: these are in a cache, and left out. rounded: sizes are rounded up, so that few come up.
    nodes: Q beginnings of an answer, the empty one first, each after the one that it continues by
        a token. They follow a text's only prompt, and the hidden states of all are wanted.

    Returns the levels of the tree, each (B_i, T_i) int64, -1 at padding, and of the last one
    - looks: the text that each place belongs to, (B_i, T), empty if each row is of one text; or,
      with nodes, what each place sees, (T, T) bool;
    - wanted: the places that are wanted, (B_i, W), -1: none;
    - order: (B, Q), where each prompt, or node, stands among the wanted.
    """
    several = nodes or len(groups[0]) > 1
    ends = [len(common_prefix(group)) if several else shared for group in groups]
    tree = [[groups[0][0][:shared]]] if shared and not cached else []  # what all begin with
    if max(ends) > shared:  # what the prompts of a text do
        tree.append([group[0][shared:end] for group, end in zip(groups, ends)])
    above = [pad(level, rounded) for level in tree]
    tails = [prompt[end:] for group, end in zip(groups, ends) for prompt in group]
    if nodes:  # a row per text: its last token, the empty beginning, and the other beginnings
        last = pad([tail + [node[-1] for node in nodes[1:]] for tail in tails])
        looks = torch.tensor([[a[: len(b)] == b for b in nodes] for a in nodes])
        wanted = torch.arange(len(nodes)).expand(last.shape)
        return [*above, last, looks, wanted, torch.arange(last.numel()).view(last.shape)]
    sharing = not several and torch.is_grad_enabled()  # at inference lengths are alike
    rows, lengths = [[i] for i in range(len(tails))], [*map(len, tails)]
    if sharing:
        rows = share_rows(lengths, round_up(max(lengths), 8, 16) if rounded else max(lengths))
        rows += [[]] * (rounded * (round_up(len(rows), 1, 8) - len(rows)))
    last = pad([[token for i in row for token in tails[i]] for row in rows], rounded)
    owners = [[i for i in row for _ in tails[i]] for row in rows]
    looks = pad(owners, rounded) if sharing else torch.empty(0)
    stops = [[end - 1 for end in accumulate(lengths[i] for i in row)] for row in rows]
    wanted = pad(stops, rounded and sharing)
    places = (wanted >= 0).flatten().nonzero()[:, 0]  # one for each prompt, in the rows' order
    order = places[torch.tensor(sum(rows, [])).argsort()].view(len(groups), -1)
    return [*above, last, looks, wanted, order]


def last_hidden(
    decoder: Decoder, batch: list[Tensor], cache: Cache | None = None, packed: bool = True
) -> Tensor:
    """The last token's hidden state of each prompt, or node, of a batch of `arrange`: (B, Q, D).

    cache: of the shared tokens (`Decoder.extend`); None: they are in the batch.
    packed: see `Decoder.forward`; False for a batch of rounded sizes.
    """
    device = decoder.embed_tokens.weight.device
    *levels, looks, wanted, order = (x.to(device) for x in batch)
    if looks.dtype != torch.bool:  # each text of a row sees itself alone
        looks = looks[:, :, None] == looks[:, None] if len(looks) else None
    return decoder(levels, cache, wanted, looks, packed=packed).flatten(0, 1)[order]


def pooled_hidden(backbone: Decoder | Encoder, groups: list[Group], pooling: str) -> Tensor:
    """One vector of a text's only prompt, (B, 1, D): its tokens' mean, or the first's or last's."""
    ids = pad([prompt for (prompt,) in groups]).to(next(backbone.parameters()).device)
    hidden, lengths = backbone(ids), (ids >= 0).sum(1)  # (B, T, D), zeros at padding
    if pooling == "mean":
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return (hidden.sum(1, dtype=wide) / lengths[:, None])[:, None]
    at = lengths - 1 if pooling == "last" else 0
    return hidden[torch.arange(len(hidden)), at][:, None]


def length_batches(
    groups: list[Group], shared: int, copied: int, budget: int, after: int = 0, keys: int = 16
) -> Iterator[list[int]]:
    """Indices of texts in batches, the longest texts first.

    shared: tokens of the prefix, which runs once; copied: how many of these keys each text has a
        copy of (none where `Cache.serves_all`). after: tokens of answers, after each text.
    budget: tokens per batch, padding counted, each with at most so many `keys`.
    """
    spared = [(len(g) - 1) * len(common_prefix(g)) for g in groups]  # what they share runs once
    lengths = [sum(map(len, g)) - n - shared + after for g, n in zip(groups, spared)]
    order = sorted(range(len(groups)), key=lambda i: -lengths[i])
    while order:
        first = groups[order[0]]
        seen = len(first) * (max(map(len, first)) - shared + copied)
        size = max(1, min(budget // max(1, lengths[order[0]]), keys * budget // max(1, seen)))
        yield order[:size]
        order = order[size:]

"""A causal language model in one file: Qwen3, with Qwen2, Llama and Granite as config values.

    x = embed(ids)
    for each block:  x = x + Attention(RMSNorm(x));  x = x + MLP(RMSNorm(x))
    hidden = RMSNorm(x);  logits = hidden @ W_unembed.T

Attention is grouped-query (Ainslie et al. 2023) with rotary positions (Su et al. 2021) and, in
Qwen3, an RMSNorm (Zhang & Sennrich 2019) over each query and key head; the MLP is SwiGLU (Shazeer
2020). Reference, and parameter names: transformers' modeling_{qwen3,qwen2,llama,granite}.py.

Every distinct real token is computed once. The linear layers, where nearly all of the work is, see
the tokens of all texts packed end to end, (N, D); only attention unpacks them into padded rows.
Texts that begin alike form a tree. Its levels (an instruction, then the texts) run in one pass, and
each attends to the keys and values of those above it. `extend` keeps these in a Cache, so that what
all batches begin with runs once, and answers are generated token by token. To a long prefix all
texts attend at once, and to themselves separately (`Layout.apart`). In the last block only the
tokens asked for (`keep`) attend and go through o and the MLP. A CUDA graph is of fixed shapes, so
there padding is computed, too (`packed=False`).

Axes: B rows of a level, T tokens of the longest, N of all levels (and bfloat16's filler), P tokens
of a cache, S keys that a level sees, D hidden, H heads, K key-value heads, Dh head_dim.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FUSED_ABOVE = 256  # texts of more tokens go to the fused kernel: their scores would fill memory
APART_ABOVE = 128  # a cached prefix of more tokens is attended to apart, not copied per text (CPU)
GROUPED = torch.__version__ >= (2, 9)  # the fused kernel takes fewer heads of keys than of queries
MULTIPLE_OF = {torch.bfloat16: 32}  # tokens of a pass: oneDNN compiles kernels for each number


def add_filler(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (N,), tokens or positions, to the multiple: one more at least, as none is another graph."""
    return F.pad(x, (0, 1 + -(len(x) + 1) % MULTIPLE_OF[dtype])) if dtype in MULTIPLE_OF else x


@dataclass(frozen=True)
class DecoderConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # not always hidden_size / num_attention_heads: Qwen3-0.6B has 128, not 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    max_position_embeddings: int = 2048  # tokens
    tie_word_embeddings: bool = False
    qk_norm: bool = True  # Qwen3: True; Qwen2 and Llama: False
    qkv_bias: bool = False  # Qwen2: True; Qwen3 and Llama: False
    rope: bool = True  # False: no positions at all, only the causal mask's ("nope" in Granite 4)
    embedding_multiplier: float = 1.0  # Granite's four factors: of the embeddings,
    attention_multiplier: float | None = None  # of q k^T, in the place of 1 / sqrt(Dh),
    residual_multiplier: float = 1.0  # of what each attention and MLP adds,
    logits_scaling: float = 1.0  # and by which the logits are divided


def table(rows: int, size: int) -> nn.Embedding:
    """Zeros, for a file to fill: nn.init.normal_ on the meta device imports the compiler, 1 s."""
    return nn.Embedding.from_pretrained(torch.zeros(rows, size), freeze=False)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) in float32, cast to the weight's dtype, then scaled by the weight."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # one kernel, not eight; in 16 bits it rounds once, after the weight
            return super().forward(x)
        y = x if x.dtype == torch.float64 else x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(self.weight.dtype)


def rope_at(positions: Tensor, c: DecoderConfig, dtype: torch.dtype) -> Tensor:
    """Cosines and signed sines of the rotary angles of positions (N,) int64: (2, N, 1, Dh)."""
    exponents = torch.arange(0, c.head_dim, 2, device=positions.device).float() / c.head_dim
    # (N, 1, Dh/2), for all heads; without rope all are 0
    angles = positions[:, None, None].float() * (c.rope / c.rope_theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).to(dtype)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """x (N, heads, Dh); elements i and i + Dh/2 form a pair: halves, not neighbours."""
    cos, sin = rope
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class Pick(torch.autograd.Function):
    """x[places], all distinct: the gradient is copied back, not added up (compiled: by atomics)."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor) -> Tensor:  # (N, ..), (n,) -> (n, ..)
        ctx.save_for_backward(places)
        ctx.shape = x.shape
        return x[places]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.shape).index_copy(0, *ctx.saved_tensors, grad), None


class Level:
    """Rows of texts: which of the (B, T) places are computed, and what each of these sees.

    real: (B, T) bool, which places hold a token.
    seen: (B, T, S) bool, the keys that each place sees; (B, 1, S) if all see the same.
    packed: False: padding is computed, too, so that shapes alone decide the work (`graphs`).
    causal: each place sees just itself and those before it: kernels skip the other half.
    """

    def __init__(self, real: Tensor, seen: Tensor, packed: bool = True, causal: bool = False):
        self.shape, self.seen, self.causal = real.shape, seen, causal
        # finite, not -inf: padding, or a tile of a fused kernel, may see nothing
        self.bias = torch.where(seen, 0.0, -1e30)[:, None]  # (B, 1, T, S) float32
        self.places = real.flatten().nonzero()[:, 0] if packed else None  # of its tokens
        self.size = len(self.places) if packed else real.numel()

    def mask(self, dtype: torch.dtype) -> dict:
        """What PyTorch's kernels are told of what is seen."""
        return dict(is_causal=True) if self.causal else dict(attn_mask=self.bias.to(dtype))

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, *) -> the level's tokens (.., *), without padding if packed."""
        x = x.flatten(0, 1)
        return x if self.places is None else Pick.apply(x, self.places)

    def unpack(self, x: Tensor) -> Tensor:
        """The level's tokens (.., *) -> (B, T, *), zeros at padding if packed."""
        if self.places is not None:
            x = x.new_zeros(self.shape.numel(), *x.shape[1:]).index_copy(0, self.places, x)
        return x.unflatten(0, self.shape)


class Cache(NamedTuple):
    """What later tokens see of B texts: the keys and values of each block, padding included."""

    kv: list[tuple[Tensor, Tensor]]  # both (B, K, P, Dh)
    real: Tensor  # (B, P) bool, which are of tokens

    def first(self, n: int) -> "Cache":
        """That of the first n tokens."""
        return Cache([(k[:, :, :n], v[:, :, :n]) for k, v in self.kv], self.real[:, :n])

    def serves_all(self, longest: int = 0) -> bool:
        """Whether all texts attend to it in one call (`Layout.apart`): on a CPU, where this pays.
        longest: tokens of the longest text."""
        B, P = self.real.shape
        pays = P > APART_ABOVE or P > 0 and longest > 4 * FUSED_ABOVE
        able = not (self.real.is_cuda or torch.is_grad_enabled())
        return able and pays and B == 1 and bool(self.real.all())


class Layout(NamedTuple):
    """Where the N tokens of a pass belong: to one level after the other, then filler."""

    levels: list[Level]
    rope: Tensor | None = None  # (2, N, 1, Dh), the angles of all; encoders have none
    rows: Tensor | slice = slice(None)  # which of the tokens that enter a block these are
    apart: bool = False  # the cache is attended to separately, and no part of what levels see

    def split(self, x: Tensor) -> list[Tensor]:
        """x (N, heads, Dh) -> each level's tokens, (B, heads, T, Dh)."""
        sizes = [level.size for level in self.levels]
        parts = x[: sum(sizes)].split(sizes)
        return [level.unpack(part).transpose(1, 2) for level, part in zip(self.levels, parts)]

    def join(self, parts: list[Tensor], n: int) -> Tensor:
        """Each level's tokens (B, heads, T, Dh) -> (n, heads * Dh), packed; zeros for filler."""
        rows = (part.transpose(1, 2).flatten(2) for part in parts)  # (B, T, heads * Dh)
        packed = torch.cat([level.pack(x) for level, x in zip(self.levels, rows)])
        return F.pad(packed, (0, 0, 0, n - len(packed))) if n > len(packed) else packed


def attend(q: Tensor, k: Tensor, v: Tensor, level: Level, scale: float) -> Tensor:
    """softmax(scale q k^T + bias) v; q (B, H, T, Dh); k, v (B, K, S, Dh), for H/K heads of q."""
    H, T, K = q.shape[1], q.shape[2], k.shape[1]
    # fused: on a CPU seldom faster in training, and in bfloat16 up to 3.4 times as slow (backward)
    if q.is_cuda or T > FUSED_ABOVE or not (q.requires_grad or q.dtype == torch.bfloat16):
        if q.is_cuda and K < H:  # there it takes a mask or fewer heads of keys, not both
            k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
        more = dict(scale=scale, enable_gqa=k.shape[1] < H)
        return F.scaled_dot_product_attention(q, k, v, **more, **level.mask(q.dtype))
    dtype = q.dtype
    if q.requires_grad:  # few tokens, and ever new lengths: in bfloat16 oneDNN compiles for each
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    # reshaped a dimension at a time: compiled, else there is a division for each element
    q = q.unflatten(1, (K, -1)).flatten(2, 3) * scale  # (B, K, H/K * T, Dh)
    scores = (q @ k.transpose(2, 3)).unflatten(2, (-1, T)) + level.bias[:, None]
    weights = scores.softmax(-1).to(v.dtype)  # (B, K, H/K, T, S), in float32 as bias: the faster
    return (weights.flatten(2, 3) @ v).to(dtype).unflatten(2, (-1, T)).flatten(1, 2)


def fused(q: Tensor, k: Tensor, v: Tensor, mask: dict, scale: float) -> list[Tensor]:
    """`attend` by PyTorch's CPU kernel, and log sum exp of each query's scores, (B, H, T, 1).

    mask: of `Level.mask`; {}: all is seen.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    if not GROUPED:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    y, sums = kernel(q, k, v, scale=scale, **mask)
    return [y, sums[..., None]]


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """What each layer makes of the same x (N, D): adapters, and int8 layers, share the work."""
    share = hasattr(layers[0], "together") and len({*map(type, layers)}) == 1
    return layers[0].together(x, layers) if share else [layer(x) for layer in layers]


class Attention(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        D, Dh, H, K = c.hidden_size, c.head_dim, c.num_attention_heads, c.num_key_value_heads
        self.head_dim = Dh
        self.scale = Dh**-0.5 if c.attention_multiplier is None else c.attention_multiplier
        self.q_proj = nn.Linear(D, H * Dh, bias=c.qkv_bias)
        self.k_proj, self.v_proj = (nn.Linear(D, K * Dh, bias=c.qkv_bias) for _ in range(2))
        self.o_proj = nn.Linear(H * Dh, D, bias=False)
        self.q_norm = RMSNorm(Dh, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(Dh, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, layout: Layout, kept: Layout, cached, grown) -> Tensor:
        """See `Block.forward`."""
        qkv = project(x, self.q_proj, self.k_proj, self.v_proj)  # each (N, heads * Dh)
        q, k, v = (y.unflatten(1, (-1, self.head_dim)) for y in qkv)  # (N, heads, Dh)
        q, k = rotate(self.q_norm(q), layout.rope), rotate(self.k_norm(k), layout.rope)
        kv, above = [], None if layout.apart else cached
        for own in zip(layout.split(k), layout.split(v)):  # a level sees its ancestors and its own
            if above is not None:  # k and v, each (B, K, S, Dh)
                own = tuple(torch.cat([repeat(a, len(o)), o], 2) for a, o in zip(above, own))
            kv.append(above := own)
        if grown is not None:
            grown.append(kv[-1])
        q, kv = q[kept.rows], kv[-len(kept.levels) :]  # from here on only these matter
        parts = list(zip(kept.split(q), kv, kept.levels))
        if not layout.apart:
            y = [attend(part, k, v, level, self.scale) for part, (k, v), level in parts]
            return self.o_proj(kept.join(y, len(q)))
        # Two softmaxes are merged, exactly: each weighs as much as its sum of exponentials
        # (Hydragen, Juravsky et al. 2024, arXiv:2402.05099)
        y = [fused(part, k, v, level.mask(q.dtype), self.scale) for part, (k, v), level in parts]
        own, own_sum = (kept.join(x, len(q)).unflatten(1, (q.shape[1], -1)) for x in zip(*y))
        y = fused(q.transpose(0, 1)[None], *cached, {}, self.scale)  # of all tokens at once
        prefix, prefix_sum = (x[0].transpose(0, 1) for x in y)  # (N, H, Dh) and (N, H, 1)
        share = (prefix_sum - own_sum).sigmoid().to(q.dtype)
        return self.o_proj(own.lerp(prefix, share).flatten(1))


def repeat(x: Tensor, n: int) -> Tensor:
    """(B, ...) -> (n, ...): each row n / B times in turn, for its rows in the next level."""
    return x[:, None].expand(-1, n // len(x), *x.shape[1:]).flatten(0, 1)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)
        self.factor = c.residual_multiplier

    def forward(self, x: Tensor, layout: Layout, kept: Layout, cached=None, grown=None) -> Tensor:
        """x (N, D) -> kept's rows. cached: k, v (B, K, P, Dh); grown: list that takes the own."""
        y = self.self_attn(self.input_layernorm(x), layout, kept, cached, grown)
        x = torch.add(x[kept.rows], y.to(x.dtype), alpha=self.factor)
        y = self.mlp(self.post_attention_layernorm(x))
        return torch.add(x, y.to(x.dtype), alpha=self.factor)


class Decoder(nn.Module):
    """Embedding, blocks, final norm; `lm_head` is there where it is not tied to the embedding."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = table(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.recompute = False  # blocks anew in the backward pass: slower, far less memory
        self.causal = True  # False: tokens see all of their text, one level and no prefix (LLM2Vec)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(
        self, ids: Tensor | list[Tensor], cache: Cache | None = None, keep: Tensor | None = None,
        looks: Tensor | None = None, grown: list[list] | None = None, packed: bool = True,
    ) -> Tensor:  # fmt: skip
        """Hidden states of the (last level's) texts, after the final norm.

        ids: (B, T) int64, -1 at padding, on the right; or the levels of a tree, each (B_i, T_i),
            where every row of a level stands before B_(i+1) / B_i rows of the next.
        cache: what stands before everything, from `extend`: of one text, or of one per row.
        keep: (B, Q) int64, the places of the last level that are wanted, -1: none; default: all T.
        looks: (T, T) or (B, T, T) bool, which places of the last level each of its places may see,
            itself included (a tree, or several texts per row); none after it, if causal.
        grown: an empty list per block, to which it appends its keys and values (for one list of
            all, torch.compile would compile each block anew, as the list is longer).
        packed: False: padding is computed, too, so that shapes alone decide the work (`graphs`).

        Returns (B, T, D), or with keep (B, Q, D); zeros at padding, or if not packed anything.
        """
        ids = [ids] if isinstance(ids, Tensor) else ids
        apart = cache is not None and not grown and cache.serves_all(max(x.shape[1] for x in ids))
        layout, dtype = self.lay_out(ids, cache, looks, packed, apart), self.norm.weight.dtype
        tokens = torch.cat([level.pack(i) for level, i in zip(layout.levels, ids)]).clamp(0)
        x = self.embed_tokens(add_filler(tokens, dtype)) * self.config.embedding_multiplier
        if not x.is_cuda:  # what blocks add up is in float32 at least: closer, and as fast
            x = x.to(torch.promote_types(dtype, torch.float32))
        nothing = [None] * len(self.layers)
        kv, grown = cache.kv if cache else nothing, grown or nothing
        for block, cached, own in zip(self.layers[:-1], kv, grown):
            if self.recompute and torch.is_grad_enabled() and own is None:
                x = checkpoint(block, x, layout, layout, cached, use_reentrant=False)
            else:
                x = block(x, layout, layout, cached, own)
        kept = self.select(keep, layout)
        x = self.norm(self.layers[-1](x, layout, kept, kv[-1], grown[-1]))
        (last,) = kept.levels
        return last.unpack(x[: last.size])

    def extend(self, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Hidden states (B, T, D) of ids (B, T), as in `forward`, and a cache with them in it."""
        real, grown = ids >= 0, [[] for _ in self.layers]
        above = cache.real if cache else real[:, :0]
        hidden = self(ids, cache, grown=grown)
        return hidden, Cache(sum(grown, []), torch.cat([repeat(above, len(ids)), real], 1))

    def lay_out(
        self, ids: list[Tensor], cache: Cache | None, looks: Tensor | None, packed: bool,
        apart: bool,
    ) -> Layout:  # fmt: skip
        """The layout of a tree's tokens after a cache; apart: see `Layout`."""
        if not self.causal and (cache or len(ids) > 1):
            raise ValueError("a decoder that is not causal has no shared prefix: pass whole texts")
        above = cache.real if cache else ids[0][:, :0] >= 0  # real tokens above each row
        before = above.shape[1] if apart else 0
        above, levels, positions = above[:, before:], [], []
        for real, sight in zip([x >= 0 for x in ids], [None] * (len(ids) - 1) + [looks]):
            B, T = real.shape
            above = repeat(above, B)  # (B, S - T)
            causal = self.causal and sight is None and not above.shape[1]
            causal = causal and (apart or T > FUSED_ABOVE)  # shorter, it gains nothing
            sight = real.new_ones(T, T) if sight is None else sight
            past = sight.tril()  # (T, T) or (B, T, T)
            depth = before + above.sum(1, keepdim=True) + past.sum(-1) - 1  # (B, T)
            own = (past if self.causal else sight & real[:, None]).expand(B, T, T)
            seen = torch.cat([above[:, None].expand(-1, T, -1), own], 2)  # (B, T, S)
            levels.append(Level(real, seen, packed, causal))
            positions.append(levels[-1].pack(depth))
            above = torch.cat([above, real], 1)
        dtype = self.norm.weight.dtype
        positions = add_filler(torch.cat(positions), dtype)
        return Layout(levels, rope_at(positions, self.config, dtype), apart=apart)

    def select(self, keep: Tensor | None, layout: Layout) -> Layout:
        """What leaves the last block: the last level, or its places `keep` (B, Q)."""
        last, above = layout.levels[-1], sum(level.size for level in layout.levels[:-1])
        if keep is None:
            return Layout([last], rows=slice(above, None))
        wanted, keep = keep >= 0, keep.clamp(0)
        index = last.unpack(torch.arange(last.size, device=keep.device))  # (B, T)
        seen = last.seen.take_along_dim(keep[:, :, None], 1)  # (B, Q, S)
        kept = Level(wanted, seen, last.places is not None)
        return Layout([kept], rows=above + kept.pack(index.gather(1, keep)))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V) over the whole vocabulary."""
        unembed = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(hidden, unembed.weight).div_(self.config.logits_scaling)

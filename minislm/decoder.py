"""A causal language model in one file: Qwen3, with Qwen2 and Llama as config values.

    x = embed(ids)
    for each block:  x = x + Attention(RMSNorm(x));  x = x + MLP(RMSNorm(x))
    hidden = RMSNorm(x);  logits = hidden @ W_unembed.T

Attention is grouped-query (Ainslie et al. 2023) with rotary positions (Su et al. 2021) and, in
Qwen3, an RMSNorm (Zhang & Sennrich 2019) over each query and key head; the MLP is SwiGLU (Shazeer
2020). Reference: transformers' modeling_qwen3.py, modeling_qwen2.py and modeling_llama.py;
parameter names are the same, so checkpoints load without renaming.

A classifier asks for little: tokens that all texts share run once (`prefix`) and hand their keys
and values to every text, and of the last block only the last token of each text is computed
(`keep`).

Axes: B batch, T tokens of a text, Q queries (T, or the kept tokens in the last block), P tokens of
the prefix, S = P + T keys, D hidden, H heads, K key-value heads, Dh head_dim, V vocab.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValues = list[tuple[Tensor, Tensor]]  # a block each: keys and values, both (B or 1, K, P, Dh)


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
    max_position_embeddings: int = 32768  # tokens
    tie_word_embeddings: bool = True
    qk_norm: bool = True  # Qwen3: True; Qwen2 and Llama: False
    qkv_bias: bool = False  # Qwen2: True; Qwen3 and Llama: False


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then scaled by the weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x if x.dtype == torch.float64 else x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Rope:
    """Cosines and sines of the rotary angles of some positions, (Q,) or (B, Q) int64."""

    def __init__(self, positions: Tensor, c: DecoderConfig, dtype: torch.dtype):
        exponents = torch.arange(0, c.head_dim, 2, device=positions.device).float() / c.head_dim
        angles = positions[..., None].float() * (1 / c.rope_theta**exponents)  # (..., Q, Dh/2)
        angles = torch.cat([angles, angles], -1).unsqueeze(-3)  # (..., 1, Q, Dh): all heads alike
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def rotate(self, x: Tensor) -> Tensor:
        """x (B, heads, Q, Dh); elements i and i + Dh/2 form a pair: halves, not neighbours."""
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin


class Attention(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        D, Dh, H, K = c.hidden_size, c.head_dim, c.num_attention_heads, c.num_key_value_heads
        self.head_dim = Dh
        self.q_proj = nn.Linear(D, H * Dh, bias=c.qkv_bias)
        self.k_proj = nn.Linear(D, K * Dh, bias=c.qkv_bias)
        self.v_proj = nn.Linear(D, K * Dh, bias=c.qkv_bias)
        self.o_proj = nn.Linear(H * Dh, D, bias=False)
        self.q_norm = RMSNorm(Dh, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(Dh, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # (B, T, heads * Dh) -> (B, T, heads, Dh)

    def keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> rotated keys, and values: each (B, K, T, Dh)."""
        k = self.k_norm(self.heads(self.k_proj(x))).transpose(1, 2)  # (B, K, T, Dh)
        v = self.heads(self.v_proj(x)).transpose(1, 2)  # (B, K, T, Dh)
        return rope.rotate(k), v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        """x (B, Q, D) attends to k and v, (B, K, S, Dh), where mask (B or 1, 1, Q, S) is True."""
        q = rope.rotate(self.q_norm(self.heads(self.q_proj(x))).transpose(1, 2))  # (B, H, Q, Dh)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, H, Q, Dh) -> (B, Q, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, prefix=None, keep: "Keep | None" = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (B, T, D) -> its next value (B, Q, D), and its own keys and values (B, K, T, Dh)."""
        y = self.input_layernorm(x)
        k, v = own = self.self_attn.keys_values(y, rope)
        if prefix is not None:  # (B or 1, K, P, Dh) before (B, K, T, Dh) -> (B, K, S, Dh)
            k, v = (torch.cat([p.expand(len(x), -1, -1, -1), o], 2) for p, o in zip(prefix, own))
        if keep is not None:  # from here on only these tokens matter
            x, y, rope, mask = keep(x), keep(y), keep.rope, keep.mask
        x = x + self.self_attn(y, k, v, rope, mask)
        return x + self.mlp(self.post_attention_layernorm(x)), own


class Keep:
    """The tokens that leave the last block, (B, Q) indices into T; their angles and mask rows."""

    def __init__(self, indices: Tensor, positions: Tensor, mask: Tensor, c: DecoderConfig, dtype):
        B = len(indices)
        self.rows, self.columns = torch.arange(B, device=indices.device)[:, None], indices
        self.rope = Rope(self(positions.expand(B, -1)), c, dtype)
        self.mask = self(mask.squeeze(1).expand(B, -1, -1))[:, None]  # (B, 1, Q, S)

    def __call__(self, x: Tensor) -> Tensor:
        return x[self.rows, self.columns]  # (B, T, ...) -> (B, Q, ...)


class Decoder(nn.Module):
    """Embedding, blocks, final norm; `lm_head` is there where it is not tied to the embedding."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        prefix: KeyValues | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        ids: (B, T) int64; padding belongs on the right, where no real token looks.
        positions: (T,) or (B, T) int64; default: P, P + 1, ...
        mask: (B or 1, 1, T, S) bool, True where a token may look; default: causal.
        prefix: keys and values of P tokens that stand before each text, from `prefix`.
        keep: (B, Q) int64, the tokens whose hidden states are wanted; default: all T.

        Returns (B, T, D), or (B, Q, D) with keep.
        """
        P, T = prefix[0][0].shape[2] if prefix else 0, ids.shape[1]
        if positions is None:
            positions = P + torch.arange(T, device=ids.device)
        if mask is None and (prefix or keep is not None):
            mask = torch.ones(1, 1, T, P + T, dtype=torch.bool, device=ids.device).tril(P)
        x = self.embed_tokens(ids)  # (B, T, D)
        rope = Rope(positions, self.config, x.dtype)
        if keep is not None:
            keep = Keep(keep, positions, mask, self.config, x.dtype)
        prefixes = prefix or [None] * len(self.layers)
        for block, before in zip(self.layers[:-1], prefixes):
            x, _ = block(x, rope, mask, before)
        x, _ = self.layers[-1](x, rope, mask, prefixes[-1], keep)
        return self.norm(x)

    def prefix(self, ids: Tensor) -> KeyValues:
        """Keys and values of a prefix, ids (P,) int64, that `forward` takes; differentiable."""
        x = self.embed_tokens(ids[None])  # (1, P, D)
        rope = Rope(torch.arange(len(ids), device=ids.device), self.config, x.dtype)
        keys_values = []
        for block in self.layers[:-1]:
            x, own = block(x, rope, None)
            keys_values.append(own)
        last = self.layers[-1]
        keys_values.append(last.self_attn.keys_values(last.input_layernorm(x), rope))
        return keys_values

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V) over the whole vocabulary."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(hidden, head.weight)

"""A bidirectional encoder in one file: BERT, with RoBERTa and XLM-R as config values.

    x = LayerNorm(word(ids) + position(t) + type(0))
    for each layer:  x = LayerNorm(x + Attention(x));  x = LayerNorm(x + W2 gelu(W1 x))

Every token sees every token of its text (Devlin et al. 2018, arXiv:1810.04805). RoBERTa (Liu et al.
2019) and XLM-R (Conneau et al. 2020) count positions from pad_token_id + 1. Reference:
transformers' modeling_bert.py and modeling_xlm_roberta.py; parameter names are the same, but for a
prefix. Poolers, heads and dropout are left out. Packing and attention are decoder.py's.

Axes: B texts, T tokens of the longest, N of all (and filler), D hidden, H heads, Dh = D / H.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .decoder import Layout, Level, add_filler, attend, project, table


@dataclass(frozen=True)
class EncoderConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512  # tokens of a text; XLM-R's table of 514 has room for 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    first_position: int = 0  # RoBERTa and XLM-R: pad_token_id + 1; earlier rows are unused


class Layer(nn.Module):
    """Modules nested as BERT's, which gives the parameters its names."""

    def __init__(self, c: EncoderConfig):
        super().__init__()
        self.heads, D, M = c.num_attention_heads, c.hidden_size, c.intermediate_size

        def output(size: int) -> nn.ModuleDict:
            norm = nn.LayerNorm(D, c.layer_norm_eps)
            return nn.ModuleDict({"dense": nn.Linear(size, D), "LayerNorm": norm})

        qkv = nn.ModuleDict({name: nn.Linear(D, D) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": qkv, "output": output(D)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, M)})
        self.output = output(M)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x (N, D) -> (N, D)."""
        own, output = self.attention.self, self.attention.output
        qkv = project(x, own.query, own.key, own.value)  # each (N, D)
        (q,), (k,), (v,) = (layout.split(y.unflatten(1, (self.heads, -1))) for y in qkv)
        y = attend(q, k, v, layout.levels[0], q.shape[-1] ** -0.5)  # (B, H, T, Dh)
        x = output.LayerNorm(output.dense(layout.join([y], len(x))) + x)
        y = F.gelu(self.intermediate.dense(x))
        return self.output.LayerNorm(self.output.dense(y) + x)


class Encoder(nn.Module):
    def __init__(self, c: EncoderConfig):
        super().__init__()
        self.config, D = c, c.hidden_size
        self.embeddings = nn.ModuleDict({
            "word_embeddings": table(c.vocab_size, D),
            "position_embeddings": table(c.first_position + c.max_position_embeddings, D),
            "token_type_embeddings": table(c.type_vocab_size, D),
            "LayerNorm": nn.LayerNorm(D, c.layer_norm_eps),
        })  # fmt: skip
        layers = [Layer(c) for _ in range(c.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states of the last layer, (B, T, D), zeros at padding.

        ids: (B, T) int64, -1 at padding, on the right.
        Raises ValueError where a text has more tokens than there are positions.
        """
        real = ids >= 0
        t = real.nonzero()[:, 1]  # (N,) each token's place in its text
        if t.max() >= (limit := self.config.max_position_embeddings):
            raise ValueError(f"{t.max() + 1} tokens are more than the {limit} of this encoder")
        e, layout = self.embeddings, Layout([Level(real, real[:, None])])
        dtype = e.word_embeddings.weight.dtype
        tokens = add_filler(ids[real], dtype)
        positions = add_filler(t + self.config.first_position, dtype)
        x = e.word_embeddings(tokens) + e.token_type_embeddings.weight[0]
        x = e.LayerNorm(x + e.position_embeddings(positions))  # (N, D)
        for layer in self.layers:
            x = layer(x, layout)
        return layout.levels[0].unpack(x[: len(t)])

    layers = property(lambda self: self.encoder.layer)  # as a decoder's

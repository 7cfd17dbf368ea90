"""The decoder computes what transformers computes, with a shared prefix or without one."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import DECODERS, FIXTURES, GRANITES, reference

from minislm import decoder as decoder_module
from minislm import load_backbone, lora, packing, weights
from minislm.decoder import FUSED_ABOVE, Decoder, DecoderConfig, RMSNorm, attend, rope_at, rotate
from minislm.heads import SlicedHead
from minislm.packing import common_prefix, pad, share_rows


def assert_parity(name: str) -> None:
    """Every block's output, the final hidden states and the logits equal transformers' to 1e-5."""
    decoder, expected = load_backbone(FIXTURES / name), reference(name)
    hidden = {}
    for i, block in enumerate(decoder.layers, 1):
        block.register_forward_hook(lambda _, __, out, i=i: hidden.update({f"hidden.{i}": out}))
    hidden["hidden.0"] = decoder.embed_tokens(expected["ids"])
    hidden["final"] = decoder(expected["ids"])
    hidden["logits"] = decoder.logits(hidden["final"])
    real = torch.arange(expected["ids"].shape[1]) < expected["lengths"][:, None]
    assert hidden.keys() == expected.keys() - {"ids", "lengths"}
    for key, value in hidden.items():  # the blocks' are packed: (B * T, D)
        value = value.view(*real.shape, -1)
        torch.testing.assert_close(value[real], expected[key][real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [*DECODERS, *GRANITES, "chat-tied"])
def test_every_layer_equals_transformers(name):
    assert_parity(name)


def interleaved(x, rope):
    """The other convention of RoPE: neighbours form a pair."""
    (cos, sin), a, b = rope, x[..., ::2], x[..., 1::2]
    return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin


def normed_after_the_weight(self, x):
    y = x * self.weight
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)


MUTATIONS = {
    "rope pairs neighbours": (decoder_module, "rotate", interleaved),
    "rms norm scales first": (RMSNorm, "forward", normed_after_the_weight),
    "no rope": (decoder_module, "rotate", lambda x, rope: x),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_parity_notices(mutation, monkeypatch):
    monkeypatch.setattr(*MUTATIONS[mutation])
    with pytest.raises(AssertionError):
        assert_parity("qwen3-tied")


def test_parity_notices_a_missing_q_norm(monkeypatch):
    load = load_backbone

    def without_q_norm(path):
        decoder = load(path)
        for block in decoder.layers:
            block.self_attn.q_norm = torch.nn.Identity()
        return decoder

    monkeypatch.setitem(globals(), "load_backbone", without_q_norm)
    with pytest.raises(AssertionError):
        assert_parity("qwen3-tied")


@pytest.mark.parametrize("name, change", [
    ("granite-tied", {"embedding_multiplier": 1.0}),
    ("granite-tied", {"attention_multiplier": None}),
    ("granite-tied", {"residual_multiplier": 1.0}),
    ("granite-tied", {"logits_scaling": 1.0}),
    ("granite-untied", {"logits_scaling": 1.0}),
    ("granite4-tied", {"rope": False}),
    ("granite4-untied", {"rope": True}),
])  # fmt: skip
def test_parity_notices_another_setting(name, change, monkeypatch):
    config = weights.read_config(FIXTURES / name)
    assert replace(config, **change) != config
    monkeypatch.setattr(weights, "read_config", lambda _: replace(config, **change))
    with pytest.raises(AssertionError):
        assert_parity(name)


def test_parity_notices_gate_and_up_swapped(monkeypatch):
    unstacked = weights.unstacked

    def swapped(name, stored):
        parts = unstacked(name, stored)
        return dict(zip(parts, reversed(parts.values())))

    monkeypatch.setattr(weights, "unstacked", swapped)
    with pytest.raises(AssertionError):
        assert_parity("granite4-tied")


@pytest.mark.parametrize("name", GRANITES)
def test_sliced_logits_are_divided_as_the_full_ones(name):
    decoder, expected = load_backbone(FIXTURES / name, head=False), reference(name)
    head = SlicedHead(weights.head_rows(FIXTURES / name, decoder, [5, 17, 40]))
    keep = (expected["lengths"] - 1)[:, None]
    full = expected["logits"][torch.arange(2), keep[:, 0]][:, [5, 17, 40]]
    torch.testing.assert_close(head(decoder(expected["ids"], keep=keep)[:, 0]), full)


def random_prompts(lengths, shared: int, seed: int = 0) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(96, (shared,), generator=g).tolist()
    return [start + torch.randint(96, (n,), generator=g).tolist() for n in lengths]


def alone(decoder, prompt: list[int]) -> torch.Tensor:
    """The last hidden state of one prompt, by the plain path: no prefix, no padding."""
    return decoder(torch.tensor([prompt]))[0, -1]


def last_hidden(decoder, groups, shared, cache=None, nodes=(), packed=True) -> torch.Tensor:
    """Of groups of prompts, or of nodes after them: (B, Q, D)."""
    batch = packing.arrange(groups, shared, cache is not None, nodes, not packed)
    return packing.last_hidden(decoder, batch, cache, packed)


def double(name: str, rank: int = 0):
    """A fixture in float64, with adapters of that rank that do something."""
    decoder = load_backbone(FIXTURES / name, dtype=torch.float64)
    if rank:
        torch.manual_seed(0)
        lora.inject(decoder, rank, 2 * rank, dropout=0)
        for layer in lora.adapters(decoder).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    return decoder


def seen_apart(function):
    """What it returns where a prefix of any length is attended to apart from the texts."""
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_module, "APART_ABOVE", 0)
        fused, seen = decoder_module.fused, []
        patch.setattr(decoder_module, "fused", lambda *given: seen.append(given) or fused(*given))
        found = function()
        assert seen
        return found


def hidden_and_gradients(decoder, hidden):
    """Hidden states (B, D), and what a loss on them tells each adapter."""
    decoder.zero_grad()
    (hidden * torch.arange(1, hidden.numel() + 1).view_as(hidden)).sum().backward()
    return {"hidden": hidden} | {
        n: p.grad for n, p in decoder.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("shared", [0, 1, 5, 40])
@pytest.mark.parametrize("lengths", [[1], [7], [3, 9, 1, 4], [2, 2], "random", "very long"])
def test_packed_texts_equal_one_at_a_time(shared, lengths, name="qwen3-untied"):
    """Logits and LoRA gradients, with the shared prefix in the pass; logits with it cached."""
    if lengths == "random":
        lengths = torch.randint(
            1, 30, (8,), generator=torch.Generator().manual_seed(shared)
        ).tolist()
    elif lengths == "very long":
        lengths = [FUSED_ABOVE + 40, 150, 120, 3]  # the last three share a row
    decoder = double(name, rank=4)
    prompts = random_prompts(lengths, shared)
    prompts[0][-1:] = prompts[0][:1]  # a text that repeats the prefix's first token
    prompts[-1][-1:] = prompts[-1][shared - 1 : shared] or [0]  # and one that repeats its last
    n = len(common_prefix(prompts))
    one_by_one = torch.stack([alone(decoder, prompt) for prompt in prompts])
    expected = hidden_and_gradients(decoder, one_by_one)
    expected = {k: v.clone() for k, v in expected.items()}
    assert len(expected) == 1 + 2 * 7 * len(decoder.layers)
    for packed in (True, False):
        hidden = last_hidden(decoder, [[p] for p in prompts], n, packed=packed)[:, 0]
        found = hidden_and_gradients(decoder, hidden)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-9, rtol=1e-9, msg=name)
    if n:
        prefix = decoder.extend(pad([prompts[0][:n]]))[1]
        cached = last_hidden(decoder, [[p] for p in prompts], n, prefix)[:, 0]
        torch.testing.assert_close(cached, one_by_one, atol=1e-9, rtol=0)
        apart = seen_apart(lambda: last_hidden(decoder, [[p] for p in prompts], n, prefix)[:, 0])
        torch.testing.assert_close(apart, one_by_one, atol=1e-9, rtol=0)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("lengths", [[1, 1], [3, 9, 1, 4], [FUSED_ABOVE + 40, 3]])
def test_answers_that_begin_alike_equal_one_at_a_time(lengths, cached):
    """A tree after each text: hidden states of all its nodes, and LoRA gradients."""
    decoder = double("qwen3-untied", rank=4)
    answers = [[], [5], [9], [5, 5], [5, 7], [9, 5], [5, 7, 9]]
    prompts = random_prompts(lengths, 5)
    alone_ = [alone(decoder, p + answer) for p in prompts for answer in answers]
    expected = hidden_and_gradients(decoder, torch.stack(alone_).unflatten(0, (-1, len(answers))))
    expected = {k: v.clone() for k, v in expected.items()}
    n = len(common_prefix(prompts))
    for packed in (True, False):
        prefix = decoder.extend(pad([prompts[0][:n]]))[1] if cached else None
        found = last_hidden(decoder, [[p] for p in prompts], n, prefix, answers, packed)
        found = hidden_and_gradients(decoder, found)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-9, rtol=1e-9, msg=name)
        if cached and packed:
            batch = [[p] for p in prompts], n, prefix, answers
            apart = seen_apart(lambda: last_hidden(decoder, *batch))
            torch.testing.assert_close(apart, expected["hidden"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", GRANITES)
def test_granites_factors_hold_in_a_prefix_and_in_long_texts(name):
    test_packed_texts_equal_one_at_a_time(5, [3, 9, 1, 4], name)
    test_packed_texts_equal_one_at_a_time(5, "very long", name)


def test_a_mask_off_by_one_is_noticed(monkeypatch):
    tril = torch.Tensor.tril
    monkeypatch.setattr(torch.Tensor, "tril", lambda x, diagonal=0: tril(x, diagonal - 1))
    with pytest.raises(AssertionError):
        test_packed_texts_equal_one_at_a_time(5, [3, 9, 1, 4])


def test_common_prefix_leaves_every_prompt_a_token():
    assert common_prefix([[1, 2, 3], [1, 2, 3]]) == [1, 2]
    assert common_prefix([[1, 2], [1, 2, 3, 4]]) == [1]
    assert common_prefix([[5]]) == []
    assert common_prefix([[1, 2], [3, 2]]) == []


@pytest.mark.parametrize("cached", [False, True])
def test_a_tree_of_three_levels_equals_its_branches(cached):
    """An instruction, then two texts of unequal lengths, then three questions about each."""
    decoder = double("llama-tied")
    (start, *texts), questions = random_prompts([5, 3, 7], 0), random_prompts([2, 4, 1] * 2, 0, 1)
    ids = [pad([start]), pad(texts), pad(questions)]
    keep = (ids[-1] >= 0).sum(1, keepdim=True) - 1
    if cached:
        prefix = decoder.extend(pad([start]))[1]
        found = decoder(ids[1:], prefix, keep)
        apart = seen_apart(lambda: decoder(ids[1:], prefix, keep))
        torch.testing.assert_close(apart, found, atol=1e-9, rtol=0)
    else:
        found = decoder(ids, keep=keep)
    branches = [start + texts[i // 3] + question for i, question in enumerate(questions)]
    expected = torch.stack([alone(decoder, branch) for branch in branches])
    torch.testing.assert_close(found[:, 0], expected, atol=1e-9, rtol=0)


def test_a_prefix_with_padding_or_one_that_grows_is_not_seen_apart(monkeypatch):
    monkeypatch.setattr(decoder_module, "APART_ABOVE", 0)
    monkeypatch.setattr(decoder_module, "fused", None)
    decoder, (start, *texts) = double("llama-tied"), random_prompts([5, 3, 7], 0)
    ids = pad([start, start + [0, 0]])  # the first has padding
    with torch.no_grad():
        padded = decoder.extend(ids[:1])[1]
        expected = torch.stack([alone(decoder, start + text) for text in texts])
        found = last_hidden(decoder, [[text] for text in texts], 0, padded)[:, 0]
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
        ids = pad(texts)
        hidden, grown = decoder.extend(ids, decoder.extend(pad([start]))[1])
        hidden = hidden[torch.arange(2), (ids >= 0).sum(1) - 1]
        torch.testing.assert_close(hidden, expected, atol=1e-9, rtol=0)
        assert grown.kv[0][0].shape[2] == grown.real.shape[1] == 12


def test_very_long_texts_see_a_short_prefix_apart():
    decoder, prompts = double("llama-tied"), random_prompts([4 * FUSED_ABOVE + 1, 3], 5)
    expected = torch.stack([alone(decoder, prompt) for prompt in prompts])
    prefix = decoder.extend(pad([prompts[0][:5]]))[1]
    assert not prefix.serves_all(4 * FUSED_ABOVE + 1)  # its gradient is not implemented
    with torch.no_grad():
        assert prefix.serves_all(4 * FUSED_ABOVE + 1) and not prefix.serves_all(4 * FUSED_ABOVE)
        assert not prefix.first(0).serves_all(4 * FUSED_ABOVE + 1)
        found = last_hidden(decoder, [[p] for p in prompts], 5, prefix)[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("rows", [4, 32])
def test_rows_that_fill_up_change_nothing(rows, monkeypatch):
    """What is done in bfloat16: the packed tokens of a pass come to a multiple of `rows`."""
    decoder, prompts = double("qwen3-untied", rank=4), random_prompts([3, 9, 1, 4], 5)

    def everything() -> dict[str, torch.Tensor]:
        last = last_hidden(decoder, [[p] for p in prompts], 5)[:, 0]
        found = hidden_and_gradients(decoder, last) | {"all": decoder(pad(prompts))}
        return {name: value.clone() for name, value in found.items()}

    expected = everything()
    sizes = []
    decoder.layers[0].register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    monkeypatch.setitem(decoder_module.MULTIPLE_OF, torch.float64, rows)
    for name, value in everything().items():
        torch.testing.assert_close(value, expected[name], atol=1e-9, rtol=1e-9, msg=name)
    assert sizes == [-(-n // rows) * rows for n in (22, 37)]
    test_answers_that_begin_alike_equal_one_at_a_time([3, 9, 1, 4], cached=True)
    test_a_tree_of_three_levels_equals_its_branches(cached=True)
    test_without_the_causal_mask_every_token_sees_its_whole_text([3, 9, 1, 4])


def test_padding_is_zeros_and_changes_nothing():
    decoder = double("qwen2-untied")
    rows = random_prompts([4, 9, 2], 0)
    hidden = decoder(pad(rows))
    for row, found in zip(rows, hidden):
        torch.testing.assert_close(found[: len(row)], decoder(torch.tensor([row]))[0])
        assert not found[len(row) :].any()


def test_kept_tokens_are_the_ones_asked_for():
    decoder = double("qwen2-tied")
    ids, keep = torch.tensor(random_prompts([8, 8], 0)), torch.tensor([[7, 2], [0, 5]])
    everything = decoder(ids)
    expected = torch.stack([everything[0, [7, 2]], everything[1, [0, 5]]])
    torch.testing.assert_close(decoder(ids, keep=keep), expected, atol=1e-9, rtol=0)


# -------------------------------------------------------------- without the causal mask


def full_attention(decoder, text: list[int]) -> torch.Tensor:
    """The hidden states (T, D) of one text whose tokens all see each other, written out."""
    c, x = decoder.config, decoder.embed_tokens(torch.tensor(text))
    rope, shape = rope_at(torch.arange(len(text)), c, x.dtype), (len(text), -1, c.head_dim)
    for block in decoder.layers:
        a, y = block.self_attn, block.input_layernorm(x)
        q, k, v = (p(y).view(shape) for p in (a.q_proj, a.k_proj, a.v_proj))
        q, k = rotate(a.q_norm(q), rope), rotate(a.k_norm(k), rope)
        k, v = (z.repeat_interleave(q.shape[1] // k.shape[1], 1) for z in (k, v))  # (T, H, Dh)
        weights = (torch.einsum("thd,shd->hts", q, k) * c.head_dim**-0.5).softmax(-1)
        x = x + a.o_proj(torch.einsum("hts,shd->thd", weights, v).flatten(1))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return decoder.norm(x)


def assert_bidirectional(decoder, lengths: list[int]) -> None:
    prompts = random_prompts(lengths, 0)
    ids = pad(prompts)
    hidden, real = decoder(ids), ids >= 0
    last = last_hidden(decoder, [[p] for p in prompts], 0)[:, 0]
    for i, prompt in enumerate(prompts):
        expected = full_attention(decoder, prompt)
        torch.testing.assert_close(hidden[i, : len(prompt)], expected, atol=1e-9, rtol=0)
        torch.testing.assert_close(last[i], expected[-1], atol=1e-9, rtol=0)
    assert torch.equal(real.sum(1), torch.tensor(lengths)) and not hidden[~real].any()


@pytest.mark.parametrize("lengths", [[7], [3, 9, 1, 4], [FUSED_ABOVE + 40, 3]])
def test_without_the_causal_mask_every_token_sees_its_whole_text(lengths):
    decoder = double("qwen3-untied")
    decoder.causal = False
    assert_bidirectional(decoder, lengths)
    decoder.causal = True
    with pytest.raises(AssertionError):
        assert_bidirectional(decoder, lengths)


def test_without_the_causal_mask_gradients_equal_those_of_one_text_at_a_time():
    decoder, prompts = double("qwen3-untied", rank=4), random_prompts([3, 9, 7, 1], 0)
    decoder.causal = False
    one_by_one = torch.stack([alone(decoder, prompt) for prompt in prompts])
    expected = hidden_and_gradients(decoder, one_by_one)
    expected = {k: v.clone() for k, v in expected.items()}
    found = hidden_and_gradients(decoder, last_hidden(decoder, [[p] for p in prompts], 0)[:, 0])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-9, rtol=1e-9, msg=name)


def test_texts_share_rows_that_the_longest_fills():
    assert share_rows([3, 9, 1, 4, 4], 9) == [[1], [3, 4, 2], [0]]
    assert share_rows([2, 2], 2) == [[0], [1]]
    assert share_rows([5], 5) == [[0]]
    decoder, prompts, shapes = double("llama-tied", rank=4), random_prompts([3, 9, 1, 4, 4], 0), []
    decoder.register_forward_pre_hook(lambda _, given: shapes.append(given[0][-1].shape))
    hidden = last_hidden(decoder, [[p] for p in prompts], 0)
    with torch.no_grad():  # at inference they do not
        torch.testing.assert_close(last_hidden(decoder, [[p] for p in prompts], 0), hidden)
    assert shapes == [(3, 9), (5, 9)]


@pytest.mark.parametrize(
    "copied, keys, sizes",
    [(400, 16, [11, 11, 11, 7]), (400, 20, [14, 14, 12]), (0, 16, [30, 10])],
)
def test_a_batch_has_so_many_keys_at_most(copied, keys, sizes):
    batches = packing.length_batches([[[0] * 410]] * 40, 400, copied, 300, keys=keys)
    assert [len(batch) for batch in batches] == sizes


def test_padding_that_leaks_into_full_attention_is_noticed(monkeypatch):
    lay_out = Decoder.lay_out

    def leaking(self, *given):
        layout = lay_out(self, *given)
        layout.levels[0].bias = torch.zeros_like(layout.levels[0].bias)
        return layout

    monkeypatch.setattr(Decoder, "lay_out", leaking)
    decoder = double("qwen3-untied")
    decoder.causal = False
    with pytest.raises(AssertionError):
        assert_bidirectional(decoder, [3, 9])


def test_a_shared_prefix_without_the_causal_mask_is_refused():
    decoder, prompts = double("llama-tied"), random_prompts([2, 3], 4)
    prefix = decoder.extend(pad([prompts[0][:4]]))[1]
    decoder.causal = False
    for cached in (None, prefix):
        with pytest.raises(ValueError, match="not causal.*pass whole texts"):
            last_hidden(decoder, [[p] for p in prompts], 4, cached)


def test_blocks_that_are_extended_compile_alike(graphs):
    """Else PyTorch's limit of recompilations, 8, leaves a deeper model as it was."""
    decoder = Decoder(DecoderConfig(16, 8, 16, 5, 2, 1, 4)).eval()
    for block in decoder.layers:
        block.compile()
    with torch.no_grad():
        decoder.extend(pad([[1, 2, 3]]))
    assert len(graphs) == 2  # the last block's, and that of all others


# -------------------------------------------------------------- in bfloat16


def test_rms_norm_rounds_where_transformers_does():
    """To bfloat16 twice: x / rms(x), which is computed in float32, and that times the weight."""
    torch.manual_seed(0)
    x, norm = torch.randn(8, 32).bfloat16(), RMSNorm(32, 1e-6).bfloat16()
    torch.nn.init.normal_(norm.weight)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = (exact.bfloat16().double() * norm.weight.double()).bfloat16()
    assert torch.equal(norm(x), expected)


def test_rotary_angles_are_float32_until_their_cosines_are_taken():
    """Positions have more bits: 257 would be 256, and the powers of theta would be other ones."""
    c, at = DecoderConfig(9, 8, 8, 1, 1, 1, head_dim=128, rope_theta=1e6), torch.arange(2000)
    angles = at[:, None] * 1e6 ** (torch.arange(64, dtype=torch.float64) / -64)
    cos, sin = rope_at(at, c, torch.bfloat16)[:, :, 0].double()
    rounding = {"atol": 2**-9 + 1e-3, "rtol": 0}  # of numbers up to 1, and float32's of angles
    torch.testing.assert_close(cos, torch.cat([angles.cos()] * 2, -1), **rounding)
    torch.testing.assert_close(sin, torch.cat([-angles.sin(), angles.sin()], -1), **rounding)


def test_attention_is_trained_in_float32():
    """One rounding at its end; with those of scores and weights, half of the numbers differ."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 16).bfloat16() for heads in (6, 2, 2))
    seen = torch.ones(2, 9, 9, dtype=torch.bool).tril()
    level = decoder_module.Level(seen[:, 0] | True, seen)
    ours = attend(q.requires_grad_(), k, v, level, 0.25)
    exact = attend(q.double(), k.double(), v.double(), level, 0.25).bfloat16()
    assert ours.dtype == torch.bfloat16 and (ours != exact).float().mean() < 0.01


@pytest.mark.parametrize("name", ["qwen3-untied", "llama-tied", "qwen2-untied"])
def test_long_texts_in_bfloat16_are_those_of_float64_but_for_its_rounding(name):
    """A block rounds some 20 times, off by 2**-9 on average: errors add up as random ones do."""
    rounded, prompts = load_backbone(FIXTURES / name, torch.bfloat16), random_prompts([20, 9], 300)
    found, rounding = [], 2**-9 * 40**0.5  # of two blocks; rounded angles: over 5 times it
    for decoder in (deepcopy(rounded).double(), rounded):
        prefix = decoder.extend(pad([prompts[0][:300]]))[1]
        together, cached = (
            last_hidden(decoder, [[p] for p in prompts], 300, c) for c in (None, prefix)
        )
        apart = seen_apart(lambda: last_hidden(decoder, [[p] for p in prompts], 300, prefix))
        found.append([together, cached, apart, decoder(torch.tensor(prompts[:1]))[:, 257:]])
    for exact, ours in zip(*found):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - exact).norm() < 2 * rounding * exact.norm()

"""The decoder computes what transformers computes, with a shared prefix or without one."""

import pytest
import torch
from conftest import DECODERS, FIXTURES, reference

from minislm import load_backbone, lora
from minislm.decoder import LONG, RMSNorm, Rope
from minislm.packing import common_prefix, last_hidden


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


@pytest.mark.parametrize("name", [*DECODERS, "chat-tied"])
def test_every_layer_equals_transformers(name):
    assert_parity(name)


def interleaved(self, x):
    """The other convention of RoPE: neighbours form a pair."""
    a, b = x[..., ::2], x[..., 1::2]
    return x * self.cos + torch.stack([-b, a], -1).flatten(-2) * self.sin


def normed_after_the_weight(self, x):
    y = x * self.weight
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)


MUTATIONS = {
    "rope pairs neighbours": (Rope, "rotate", interleaved),
    "rms norm scales first": (RMSNorm, "forward", normed_after_the_weight),
    "no rope": (Rope, "rotate", lambda self, x: x),
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


def random_prompts(lengths, shared: int, seed: int = 0) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(96, (shared,), generator=g).tolist()
    return [start + torch.randint(96, (n,), generator=g).tolist() for n in lengths]


def alone(decoder, prompt: list[int]) -> torch.Tensor:
    """The last hidden state of one prompt, by the plain path: no prefix, no padding."""
    return decoder(torch.tensor([prompt]))[0, -1]


def double(name: str, rank: int = 0):
    """A fixture in float64, with adapters of that rank that do something."""
    decoder = load_backbone(FIXTURES / name, dtype=torch.float64)
    if rank:
        torch.manual_seed(0)
        lora.inject(decoder, rank, 2 * rank, dropout=0)
        for layer in lora.adapters(decoder).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    return decoder


def hidden_and_gradients(decoder, hidden):
    """Hidden states (B, D), and what a loss on them tells each adapter."""
    decoder.zero_grad()
    (hidden * torch.arange(1, hidden.numel() + 1).view_as(hidden)).sum().backward()
    return {"hidden": hidden} | {
        n: p.grad for n, p in decoder.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("shared", [0, 1, 5, 40])
@pytest.mark.parametrize("lengths", [[1], [7], [3, 9, 1, 4], [2, 2], "random", "longer than LONG"])
def test_packed_texts_equal_one_at_a_time(shared, lengths):
    """Logits and LoRA gradients, with the shared prefix in the pass; logits with it cached."""
    if lengths == "random":
        lengths = torch.randint(
            1, 30, (8,), generator=torch.Generator().manual_seed(shared)
        ).tolist()
    elif lengths == "longer than LONG":
        lengths = [LONG + 40, 3]
    decoder = double("qwen3-untied", rank=4)
    prompts = random_prompts(lengths, shared)
    prompts[0][-1:] = prompts[0][:1]  # a text that repeats the prefix's first token
    prompts[-1][-1:] = prompts[-1][shared - 1 : shared] or [0]  # and one that repeats its last
    n = len(common_prefix(prompts))
    one_by_one = torch.stack([alone(decoder, prompt) for prompt in prompts])
    expected = hidden_and_gradients(decoder, one_by_one)
    expected = {k: v.clone() for k, v in expected.items()}
    found = hidden_and_gradients(decoder, last_hidden(decoder, prompts, n))
    assert len(expected) == 1 + 2 * 7 * len(decoder.layers)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-9, rtol=1e-9, msg=name)
    if n:
        prefix = decoder.prefix(torch.tensor(prompts[0][:n]))
        cached = last_hidden(decoder, prompts, n, prefix)
        torch.testing.assert_close(cached, one_by_one, atol=1e-9, rtol=0)


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


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and real, (B, T)."""
    T = max(map(len, rows))
    ids = torch.tensor([row + [0] * (T - len(row)) for row in rows])
    return ids, torch.arange(T) < torch.tensor([[len(row)] for row in rows])


@pytest.mark.parametrize("cached", [False, True])
def test_a_tree_of_three_levels_equals_its_branches(cached):
    """An instruction, then two texts of unequal lengths, then three questions about each."""
    decoder = double("llama-tied")
    (start, *texts), questions = random_prompts([5, 3, 7], 0), random_prompts([2, 4, 1] * 2, 0, 1)
    ids, real = zip(padded([start]), padded(texts), padded(questions))
    keep = real[-1].sum(1, keepdim=True) - 1
    if cached:
        found = decoder(list(ids[1:]), real[1:], decoder.prefix(torch.tensor(start)), keep)
    else:
        found = decoder(list(ids), real, keep=keep)
    branches = [start + texts[i // 3] + question for i, question in enumerate(questions)]
    expected = torch.stack([alone(decoder, branch) for branch in branches])
    torch.testing.assert_close(found[:, 0], expected, atol=1e-9, rtol=0)


def test_padding_is_zeros_and_changes_nothing():
    decoder = double("qwen2-untied")
    rows = random_prompts([4, 9, 2], 0)
    hidden = decoder(*([x] if x.dtype == torch.bool else x for x in padded(rows)))
    for row, found in zip(rows, hidden):
        torch.testing.assert_close(found[: len(row)], decoder(torch.tensor([row]))[0])
        assert not found[len(row) :].any()


def test_kept_tokens_are_the_ones_asked_for():
    decoder = double("qwen2-tied")
    ids, keep = torch.tensor(random_prompts([8, 8], 0)), torch.tensor([[7, 2], [0, 5]])
    everything = decoder(ids)
    expected = torch.stack([everything[0, [7, 2]], everything[1, [0, 5]]])
    torch.testing.assert_close(decoder(ids, keep=keep), expected, atol=1e-9, rtol=0)


def test_the_norms_gradient_is_that_of_its_formula():
    norm = RMSNorm(6, 1e-2).double()
    norm.weight.data = torch.linspace(-1, 2, 6, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0, 1] = 0
    plain = norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)
    torch.testing.assert_close(norm(x), plain, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(norm, x.requires_grad_())

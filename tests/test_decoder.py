"""The decoder computes what transformers computes, with a shared prefix or without one."""

import pytest
import torch
from conftest import DECODERS, FIXTURES, reference

from minislm import load_backbone
from minislm.decoder import RMSNorm, Rope
from minislm.packing import common_prefix, last_hidden


def assert_parity(name: str) -> None:
    """Every block's output, the final hidden states and the logits equal transformers' to 1e-5."""
    decoder, expected = load_backbone(FIXTURES / name), reference(name)
    hidden = {}
    for i, block in enumerate(decoder.layers, 1):
        block.register_forward_hook(lambda _, __, out, i=i: hidden.update({f"hidden.{i}": out[0]}))
    hidden["hidden.0"] = decoder.embed_tokens(expected["ids"])
    hidden["final"] = decoder(expected["ids"])
    hidden["logits"] = decoder.logits(hidden["final"])
    real = torch.arange(expected["ids"].shape[1]) < expected["lengths"][:, None]
    assert hidden.keys() == expected.keys() - {"ids", "lengths"}
    for key, value in hidden.items():
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


@pytest.mark.parametrize("shared", [0, 1, 5, 40])
@pytest.mark.parametrize("lengths", [[1], [7], [3, 9, 1, 4], [2, 2]])
def test_shared_prefix_is_exact(shared, lengths):
    decoder = load_backbone(FIXTURES / "qwen3-untied", dtype=torch.float64)
    prompts = random_prompts(lengths, shared)
    prompts[0][-1:] = prompts[0][:1]  # a text that repeats the prefix's first token
    n = len(common_prefix(prompts))
    prefix = decoder.prefix(torch.tensor(prompts[0][:n])) if n else None
    batch = last_hidden(decoder, prompts, n, prefix)
    for row, prompt in zip(batch, prompts):
        torch.testing.assert_close(row, alone(decoder, prompt), atol=1e-9, rtol=0)


def test_a_mask_off_by_one_is_noticed(monkeypatch):
    tril = torch.Tensor.tril
    monkeypatch.setattr(torch.Tensor, "tril", lambda x, diagonal=0: tril(x, diagonal - 1))
    with pytest.raises(AssertionError):
        test_shared_prefix_is_exact(5, [3, 9, 1, 4])


def test_common_prefix_leaves_every_prompt_a_token():
    assert common_prefix([[1, 2, 3], [1, 2, 3]]) == [1, 2]
    assert common_prefix([[1, 2], [1, 2, 3, 4]]) == [1]
    assert common_prefix([[5]]) == []
    assert common_prefix([[1, 2], [3, 2]]) == []


def test_positions_and_mask_are_honoured():
    """Two texts in one row, kept apart by mask and positions, equal the two alone."""
    decoder = load_backbone(FIXTURES / "llama-tied", dtype=torch.float64)
    a, b = random_prompts([4, 6], 0)
    positions = torch.tensor([*range(4), *range(6)])
    text = torch.tensor([0] * 4 + [1] * 6)
    mask = (text[:, None] == text) & torch.ones(10, 10, dtype=torch.bool).tril()
    hidden = decoder(torch.tensor([a + b]), positions=positions, mask=mask[None, None])[0]
    torch.testing.assert_close(hidden[3], alone(decoder, a), atol=1e-9, rtol=0)
    torch.testing.assert_close(hidden[9], alone(decoder, b), atol=1e-9, rtol=0)


def test_kept_tokens_are_the_ones_asked_for():
    decoder = load_backbone(FIXTURES / "qwen2-tied", dtype=torch.float64)
    ids, keep = torch.tensor(random_prompts([8, 8], 0)), torch.tensor([[7, 2], [0, 5]])
    everything = decoder(ids)
    expected = torch.stack([everything[0, [7, 2]], everything[1, [0, 5]]])
    torch.testing.assert_close(decoder(ids, keep=keep), expected, atol=1e-9, rtol=0)


def test_gradients_flow_through_the_shared_prefix():
    decoder = load_backbone(FIXTURES / "qwen3-tied", dtype=torch.float64).requires_grad_(True)
    prompts = random_prompts([3, 6], 5)

    def gradients(hidden):
        decoder.zero_grad()
        hidden.pow(2).sum().backward()
        return {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}

    plain = gradients(torch.stack([alone(decoder, p) for p in prompts]))
    prefix = decoder.prefix(torch.tensor(prompts[0][:5]))
    packed = gradients(last_hidden(decoder, prompts, 5, prefix))
    assert plain.keys() == packed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(packed[name], gradient, atol=1e-9, rtol=1e-9, msg=name)

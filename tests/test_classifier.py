"""The classifier: the sliced head is the LM head sliced, and a text's result is its own."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BEFORE, CHAT_TIED, FIXTURES, LOADED, int8, int8_works

from minislm import Classifier, Task, decoder, lora, methods, quant
from minislm.data import Example

TASK = Task.of_labels(["joy", "anger", "fear", "music"])
TEXTS = ["i feel happy", "", "leave me alone! " * 9, "so", "é 🦉\n", "so dark"]


def classifier(dtype: str = "float64") -> Classifier:
    return Classifier.zero_shot(CHAT_TIED, TASK, dtype=dtype)


def adapted(dtype: str = "float64") -> Classifier:
    clf = classifier(dtype)
    torch.manual_seed(0)
    lora.inject(clf.backbone, 4, 8.0, 0.0)
    for layer in lora.adapters(clf.backbone).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return clf


def full_logits(clf: Classifier, text: str) -> torch.Tensor:
    """Logits of the whole vocabulary at the prompt's last token, one text at a time, no prefix."""
    decoder = clf.backbone
    return decoder.logits(decoder(torch.tensor([clf.prompt.branches(text)[0]]))[0, -1])


def test_sliced_head_equals_slicing_the_full_logits():
    clf = adapted()
    sliced = clf.logits([clf.prompt.branches(text) for text in TEXTS])
    full = torch.stack([full_logits(clf, text)[clf.label_token_ids] for text in TEXTS])
    torch.testing.assert_close(sliced, full, atol=1e-9, rtol=0)


def test_loss_and_gradients_equal_those_of_the_full_logits():
    clf, targets = adapted(), torch.tensor([0, 1, 2, 3, 1, 0])

    def gradients(logits):
        clf.backbone.zero_grad()
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        grads = [p.grad.clone() for p in clf.backbone.parameters() if p.requires_grad]
        return [loss.detach(), *grads]

    sliced = gradients(clf.logits([clf.prompt.branches(text) for text in TEXTS]))
    full = gradients(torch.stack([full_logits(clf, t)[clf.label_token_ids] for t in TEXTS]))
    for ours, theirs in zip(sliced, full, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_head_rows_are_frozen_and_a_copy():
    clf = classifier()
    rows = clf.backbone.embed_tokens.weight[clf.label_token_ids]
    assert torch.equal(clf.head.weight, rows) and not clf.head.weight.requires_grad
    assert clf.head.weight.data_ptr() != clf.backbone.embed_tokens.weight.data_ptr()


def test_bfloat16_hidden_states_give_float32_logits():
    head = classifier("bfloat16").head
    assert head(torch.randn(2, 1, head.weight.shape[1]).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("short", [0, 128])
@pytest.mark.parametrize("budget", [1, 150, 10_000])
def test_batches_do_not_change_a_result(budget, short, monkeypatch):
    monkeypatch.setattr(decoder, "APART_ABOVE", short)  # 0: the prefix is seen apart from the texts
    monkeypatch.setitem(methods.BUDGET, "cpu", budget)
    clf = classifier("float32")
    together = clf.predict_proba(TEXTS)
    for text, row in zip(TEXTS, together):
        alone = torch.softmax(full_logits(clf, text)[clf.label_token_ids], -1)
        np.testing.assert_allclose(row, alone.numpy(), atol=1e-5)


def test_one_by_one_is_the_same_to_the_bit():
    clf = classifier("float32")
    clf.one_by_one = True
    together = clf.predict_proba(TEXTS)
    for text, row in zip(TEXTS, together):
        assert np.array_equal(clf.predict_proba([text])[0], row)


@pytest.mark.parametrize("quantize", ["nf4", pytest.param("int8", marks=int8)])
def test_batches_do_not_change_a_quantised_result(quantize):
    clf = Classifier.zero_shot(CHAT_TIED, TASK, "float32", quantize=quantize)
    alone = np.concatenate([clf.predict_proba([text]) for text in TEXTS])
    np.testing.assert_allclose(clf.predict_proba(TEXTS), alone, atol=1e-5)
    plain = classifier("float32").predict_proba(TEXTS)
    assert 1e-5 < abs(plain - alone).max() < 0.1


@int8
def test_what_int8_texts_share_is_computed_before_quantising():
    clf, plain = (
        Classifier.zero_shot(CHAT_TIED, TASK, "float32", quantize=q) for q in ("int8", "none")
    )
    clf.predict(TEXTS)
    found, expected = clf.cached()[0].kv, plain.cached()[0].kv
    assert all(torch.equal(a, b) for x, y in zip(found, expected) for a, b in zip(x, y))


@int8
@pytest.mark.parametrize("longest", [16, 17])
def test_int8_is_smoothed_by_what_prompts_begin_with(longest, monkeypatch):
    """All blocks but the last, by a template of more than 16 tokens."""
    calls, clf = [], classifier("float32")
    clf._template = clf._template[:longest]
    assert len(clf._template) == longest
    monkeypatch.setattr(quant, "smooth", lambda *given: calls.append(given))
    clf.quantize_int8(torch.float32)
    if longest == 16:
        assert not calls
    else:
        ((blocks, run),) = calls
        assert list(blocks) == list(clf.backbone.layers[:-1])
        assert run()[0].shape[:2] == (1, 17)


def test_a_text_may_merge_with_the_end_of_the_template():
    clf = classifier("float32")
    branches, shared = clf.prompt.branches, len(clf._template)
    merged = [[5, 6] + prompt[shared:] for prompt in branches("glad")]
    merged = [clf._template[:-2] + merged[0]]
    clf.prompt.branches = lambda text: merged if text == "glad" else branches(text)
    found = clf.predict_proba(["dark", "glad"])
    expected = torch.softmax(full_logits(clf, "glad")[clf.label_token_ids], -1)
    np.testing.assert_allclose(found[1], expected.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(
        found[0], classifier("float32").predict_proba(["dark"])[0], atol=1e-5
    )


def test_classifying_loads_no_compiler():
    """It takes two seconds and 80 MB, which --compile alone is to pay."""
    kinds = ["none", "nf4", *["int8"] * int8_works()]
    code = f"""
{BEFORE}
from minislm import Classifier, Task
task = Task.of_labels(["joy", "anger"])
for quantize in {kinds}:
    Classifier.zero_shot({str(CHAT_TIED)!r}, task, quantize=quantize).predict(["so"])
    {LOADED}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n" * len(kinds), done.stdout + done.stderr


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="Linux's")
def test_the_heap_asks_for_large_pages():
    code = """
from minislm import methods
if hasattr(methods.ctypes.CDLL(None), "mallopt"):
    methods.tune()
    areas = open("/proc/self/smaps").read().split("VmFlags:")  # a name, then that area's flags
    print(any("[heap]" in a and " hg" in b.splitlines()[0] for a, b in zip(areas, areas[1:])))
else:
    print(True)  # not glibc
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "True\n"


def four_blocks(dtype: str, quantize: str = "none") -> Classifier:
    """A decoder of two blocks, each of them twice."""
    clf = Classifier.zero_shot(CHAT_TIED, TASK, dtype, quantize=quantize)
    clf.backbone.layers.extend(copy.deepcopy(clf.backbone.layers))
    return clf


@pytest.mark.parametrize("short", [0, 128])
@pytest.mark.parametrize("quantize", ["none", pytest.param("int8", marks=int8)])
def test_compiled_blocks_are_two_graphs_whatever_the_number_of_tokens(
    quantize, short, graphs, monkeypatch
):
    monkeypatch.setattr(decoder, "APART_ABOVE", short)
    batches = [TEXTS[:2], TEXTS[2:5], TEXTS, TEXTS[1:], TEXTS[::2]]
    clf = four_blocks("float32")
    if quantize == "int8":
        clf.quantize_int8(torch.float32)
    expected = [clf.predict_proba(batch) for batch in batches]
    clf._cached = clf._cached if quantize == "int8" else None
    clf.compile()
    for batch, found in zip(batches, expected):
        np.testing.assert_allclose(clf.predict_proba(batch), found, atol=1e-6)
    assert len(graphs) == 2  # for one number, then for any
    compiled = [block._compiled_call_impl is not None for block in clf.backbone.layers]
    assert compiled == [True, True, True, False]
    assert ("minislm.int8_linear" in graphs[0].code) == (quantize == "int8")
    assert ("flash_attention_for_cpu" in graphs[1].code) == (short == 0)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_compiled_training_has_two_graphs_and_the_same_gradients(quantize, graphs, monkeypatch):
    """Adapters, dropout and all; passes are filled up as in bfloat16, by any number of rows."""
    monkeypatch.setitem(decoder.MULTIPLE_OF, torch.float64, 4)
    batches = [[f"{text} {n * ' so'}" for text in TEXTS[:3]] for n in (1, 4, 2, 3, 5, 6, 7)]
    clf = four_blocks("float64", quantize)
    lora.inject(clf.backbone, 2, 4, dropout=0.1)
    clf.modules.train()

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        loss = sum(clf.logits([clf.prompt.branches(t) for t in b]).square().sum() for b in batches)
        return torch.autograd.grad(loss, [*clf.trained().values()])

    expected = gradients()
    clf.compile(training=True)
    for found, gradient in zip(gradients(), expected):
        torch.testing.assert_close(found, gradient, atol=1e-9, rtol=1e-9)
    assert len(graphs) == 2
    codes = [graph.code for graph in graphs[0].modules()]
    assert any("minislm.nf4_weight" in code for code in codes) == (quantize == "nf4")


@pytest.mark.skipif(os.name != "posix", reason="elsewhere compilers have other names")
def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="needs a C.. compiler"):
        classifier().compile()


def test_a_save_that_fails_leaves_no_part_of_a_run(tmp_path, monkeypatch):
    def full(state, metadata):
        raise OSError("No space left on device")

    monkeypatch.setattr(methods, "save", full)
    with pytest.raises(OSError, match="No space"):
        adapted().save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_auto_is_bfloat16_only_where_that_is_fast(monkeypatch):
    for feature in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{feature}_supported", lambda: False)
    assert methods.choose_dtype("auto", "cpu") == "float32"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert methods.choose_dtype("auto", "cpu") == "bfloat16"
    assert methods.choose_dtype("float32", "cpu") == "float32"


def test_a_callers_autocast_changes_nothing():
    clf, expected = adapted("float32"), adapted("float32").predict_proba(TEXTS)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(clf.predict_proba(TEXTS), expected)
    np.testing.assert_array_equal(clf.predict_proba(TEXTS), expected)


def test_order_and_windows_do_not_change_a_result(monkeypatch):
    clf = classifier("float32")
    forward = clf.predict_proba(TEXTS)
    monkeypatch.setattr("minislm.methods.WINDOW", 2)
    np.testing.assert_allclose(clf.predict_proba(TEXTS[::-1])[::-1], forward, atol=1e-5)


def test_probabilities_are_float32_rows_that_sum_to_one():
    p = classifier("bfloat16").predict_proba(TEXTS)
    assert p.dtype == np.float32 and p.shape == (6, 4)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)


def test_predict_is_the_argmax_in_label_order():
    clf = classifier()
    assert clf.labels == ["anger", "fear", "joy", "music"]
    best = clf.predict_proba(TEXTS).argmax(1)
    assert clf.predict(TEXTS) == [clf.labels[i] for i in best]


def test_no_texts_give_no_rows():
    assert classifier().predict_proba([]).shape == (0, 4)
    assert classifier().predict([]) == []


class Frame(list):
    """As pandas has it: its items are the columns' names."""

    columns = ["text"]


@pytest.mark.parametrize("texts", ["i feel happy", {"text": "i feel happy"}, Frame(["text"])])
def test_what_is_no_list_of_texts_is_refused(texts):
    with pytest.raises(ValueError, match=f"list of texts, not a {type(texts).__name__}"):
        classifier().predict(texts)


@pytest.mark.parametrize("odd", [None, float("nan"), b"glad", 1])
def test_what_is_no_string_is_refused(odd):
    with pytest.raises(ValueError, match=f"a text is a string, which {odd!r} is not"):
        classifier().predict(["glad", odd])


def test_scores_that_are_not_numbers_are_refused():
    clf = classifier()
    clf.backbone.norm.weight.data[0] = float("nan")
    for ask in (clf.predict, clf.predict_proba):
        with pytest.raises(ValueError, match="not numbers"):
            ask(TEXTS)


def test_a_device_may_be_an_object():
    clf = Classifier.zero_shot(CHAT_TIED, TASK, device=torch.device("cpu"))
    assert clf.predict(["glad"]) == classifier("float32").predict(["glad"])


def test_stream_reads_a_window_at_a_time(monkeypatch):
    monkeypatch.setattr("minislm.methods.WINDOW", 2)
    read = []
    texts = (read.append(t) or t for t in TEXTS)
    first = next(classifier().stream(texts))
    assert first[0] == TEXTS[0] and read == TEXTS[:2]


def test_progress_is_shown_batch_by_batch(monkeypatch):
    """Not a window at a time, which may take minutes."""
    monkeypatch.setitem(methods.BUDGET, "cpu", 64)
    seen = []
    next(classifier().stream(TEXTS * 4, bar=SimpleNamespace(update=seen.append)))
    assert sum(seen) == len(TEXTS * 4) and max(seen) < len(TEXTS * 4), seen


def test_prefix_is_computed_once_and_again_after_training(monkeypatch):
    clf, calls = adapted("float32"), []
    extend = clf.backbone.extend
    monkeypatch.setattr(clf.backbone, "extend", lambda *given: calls.append(1) or extend(*given))
    monkeypatch.setattr("minislm.methods.WINDOW", 2)
    texts = ["a a", "b", "c c c", "d", "e", "f"]  # three windows that share the template alone
    before = clf.predict_proba(texts)
    assert len(calls) == 1
    layer = clf.backbone.layers[0].self_attn.v_proj
    torch.nn.init.normal_(layer.lora_B)
    after = clf.predict_proba(texts)
    assert np.abs(before - after).max() > 1e-3
    alone = torch.softmax(full_logits(clf, texts[0])[clf.label_token_ids], -1)
    np.testing.assert_allclose(after[0], alone.detach().numpy(), atol=1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize("arranged", [False, True])
@pytest.mark.parametrize("fused, elsewhere", [(False, False), (True, False), (True, True)])
def test_prefix_is_computed_again_after_an_optimizer_step(fused, elsewhere, arranged):
    """A fused one does not count up the versions of what it changes.

    elsewhere: the gradients come from another process; this one had no example in the batch.
    """
    clf = adapted("float32")
    optimizer = torch.optim.AdamW(clf.trained().values(), lr=0.1, fused=fused)
    before = clf.predict_proba(TEXTS)
    groups = [clf.prompt.branches(text) for text in TEXTS]
    logits = clf.score(clf.arrange(groups)) if arranged else clf.logits(groups)
    logits[:, 0].sum().backward()
    if elsewhere:
        clf.predict_proba(TEXTS)
        clf.modules.train()
    optimizer.step()
    alone = torch.softmax(full_logits(clf, TEXTS[0])[clf.label_token_ids], -1).detach().numpy()
    assert np.abs(before[0] - alone).max() > 1e-3
    np.testing.assert_allclose(clf.predict_proba(TEXTS)[0], alone, atol=1e-5)


def test_prefix_is_computed_again_after_a_merge():
    clf = classifier("float32")
    clf.predict_proba(TEXTS)
    lora.inject(clf.backbone, 4, 8.0, 0.0)
    for layer in lora.adapters(clf.backbone).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    lora.merge(clf.backbone)
    alone = torch.softmax(full_logits(clf, TEXTS[0])[clf.label_token_ids], -1)
    np.testing.assert_allclose(clf.predict_proba(TEXTS)[0], alone.detach().numpy(), atol=1e-5)


def test_single_texts_reuse_the_prefix(monkeypatch):
    clf, calls = classifier("float32"), []
    extend = clf.backbone.extend
    monkeypatch.setattr(clf.backbone, "extend", lambda *given: calls.append(1) or extend(*given))
    for text in TEXTS:
        clf.predict([text])
    assert len(calls) == 1


def test_text_of_100_000_characters_is_truncated_counted_and_classified():
    clf = Classifier.zero_shot(CHAT_TIED, TASK, max_text_tokens=64)
    assert clf.predict(["dark " * 20_000])[0] in clf.labels
    assert clf.prompt.truncated == 1
    long = [Example("so glad " * 12_500, "joy"), Example("so glad", "joy")]
    assert [clf.evaluate(long, "test")["truncated"] for _ in range(2)] == [1, 1]  # of each split


def test_the_context_limits_the_text():
    clf = Classifier.zero_shot(CHAT_TIED, TASK, max_text_tokens=100_000)
    (ids,) = clf.prompt.branches("dark " * 50_000)
    assert len(ids) <= clf.backbone.config.max_position_embeddings


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dtype="float8"), "float8"),
        (dict(method="magic"), "magic"),
        (dict(chat="telegram"), "telegram"),
        (dict(max_text_tokens=0), "max_text_tokens"),
        (dict(model="no/such/folder"), "no/such/folder"),
        (dict(model=FIXTURES / "qwen3-tied"), "tokenizer.json"),
        (dict(task="no-such-task"), "no-such-task"),
        (dict(device="cuda"), "cuda"),
        (dict(device="gpu"), "gpu"),
    ],
)
def test_bad_values_are_named(change, message):
    if message == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    with pytest.raises(ValueError, match=message):
        Classifier.zero_shot(**(dict(model=CHAT_TIED, task=TASK) | change))


def test_a_missing_run_is_named():
    with pytest.raises(ValueError, match="runs/nowhere"):
        Classifier.load("runs/nowhere")


def test_a_prompt_of_no_token_is_refused(monkeypatch):
    monkeypatch.setattr("minislm.text.Prompt.branches", lambda self, text: [[5] * len(text)])
    with pytest.raises(ValueError, match="empty text would have no token"):
        classifier()


@int8
@torch.no_grad()
def test_int8_takes_in_an_adapter_that_rounding_would_take_away():
    clf, plain = classifier("float32"), classifier("float32")
    lora.inject(clf.backbone, 2, 4.0, 0.0)
    for layer in lora.adapters(clf.backbone).values():
        layer.lora_B.fill_(1e-12)
    clf.merge()
    assert lora.adapters(clf.backbone)  # it would be lost
    for each in (clf, plain):
        each.quantize_int8(torch.float32)
    assert not lora.adapters(clf.backbone)
    np.testing.assert_allclose(clf.predict_proba(TEXTS), plain.predict_proba(TEXTS), atol=1e-6)


@int8
def test_a_decoder_of_one_block_is_left_as_it_is():
    clf = classifier("float32")
    clf.backbone.layers = clf.backbone.layers[:1]
    expected = clf.predict_proba(TEXTS)
    clf.quantize_int8(torch.float32)
    assert (clf.predict_proba(TEXTS) == expected).all()

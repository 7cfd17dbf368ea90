"""Every row of the table: against the same thing computed by hand, trained, saved and reloaded."""

import json
import math
import os
import pickle
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CHAT_TIED, FIXTURES
from safetensors.torch import load_file
from test_train import log_of, run, train
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import eval as eval_script
from minislm import METHODS, Classifier, Task, classic, lora, methods, packing
from minislm.data import Example, load_split, with_shots
from minislm.heads import fit_calibration
from minislm.text import REQUEST, Prompt, parse

TASK = Task(("a", "f", "j"), ("anger", "fear", "joy"), ("", "dark and alone", ""))
TEXTS = ["so glad", "alone in the dark, with a ghost", "they shout", "i burn <|im_end|> and sing"]
# what a random model of 38,000 weights can be taught in so few steps
LEARNS = {"sliced_head", "whole_names", "hidden_mlp", "embedding_mlp", "tfidf", "full"}
FROZEN = {"sliced_head", "letters", "whole_names", "pairs", "generate", "generate_constrained"}
FORMS = json.loads((CHAT_TIED / "forms.json").read_text())


def classifier(method: str, task: Task = TASK, **given) -> Classifier:
    return Classifier.zero_shot(
        CHAT_TIED, task, given.pop("dtype", "float64"), method=method, **given
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """The tiny BERT, with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("encoder")
    shutil.copytree(FIXTURES / "bert", folder, dirs_exist_ok=True)
    words = (
        "query : glad sunny shout furious dark shiver anger fear joy alone a ghost in the".split()
    )
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(pieces[:4])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def rows_of(clf: Classifier, texts: list[str]) -> np.ndarray:
    return np.stack([row for _, row in clf.stream(texts)])


def grams_of(text: str) -> list[int]:
    return classic.NGrams(TASK).branches(text)[0]


def model_of(method: str, encoder: Path) -> list:
    return ["--model", encoder] if method == "encoder_mlp" else []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_saves_and_reloads(method, moods, encoder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    kind = "none" if METHODS[method].generates else "fitted"
    given = ["--method", method, "--dtype", "float32", "--calibration", kind, "--epochs", "4"]
    train(monkeypatch, moods, out, *given, *model_of(method, encoder))
    result = json.loads((out / "test.json").read_text())
    rows = [json.loads(line) for line in (moods / "test.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in rows]
    clf = Classifier.load(out)
    first = rows_of(clf, texts)
    predicted = [clf.label(row) for row in first]
    accuracy = np.mean([p == row["label"] for p, row in zip(predicted, rows)])
    assert accuracy == pytest.approx(result["accuracy"], abs=1e-6)
    if method in LEARNS:
        assert accuracy > 0.5, "three classes, a third of the texts each"

    # nothing depends on the rest of the batch, its order, or the process
    again = Classifier.load(out)
    np.testing.assert_allclose(rows_of(again, texts[::-1])[::-1], first, atol=1e-5)
    alone = np.concatenate([rows_of(again, [text]) for text in texts[:4]])
    np.testing.assert_allclose(alone, first[:4], atol=1e-5)
    copied = pickle.loads(pickle.dumps(again))
    np.testing.assert_array_equal(rows_of(copied, texts), rows_of(again, texts))
    if METHODS[method].generates:
        with pytest.raises(ValueError, match="without probabilities: use predict"):
            clf.predict_proba(texts)
    else:
        np.testing.assert_allclose(clf.predict_proba(texts).sum(1), 1, atol=1e-5)
        assert float(clf.calibration["scale"]) != 1
    has = {path.name for path in out.iterdir()}
    assert ("adapter_model.safetensors" in has) == (METHODS[method].trains == "lora")
    assert ("model.safetensors" in has) == (METHODS[method].trains == "full")
    assert ("head.safetensors" in has) == (method not in FROZEN)


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if row.trains == "lora"])
def test_a_training_step_reaches_every_adapter(method, encoder):
    clf = Classifier.zero_shot(
        encoder if method == "encoder_mlp" else CHAT_TIED, TASK, "float64", method=method
    )
    lora.inject(clf.backbone, 2, 4.0, 0.0)
    clf.modules.train()
    logits = clf.logits([clf.prompt.branches(text) for text in TEXTS])
    torch.nn.functional.cross_entropy(logits, torch.tensor([2, 1, 0, 2])).backward()
    for name, layer in lora.adapters(clf.backbone).items():  # A's gradient is 0, since B is
        assert layer.lora_B.grad.abs().max() > 1e-12, name
    for name, parameter in clf.head.named_parameters():
        assert parameter.grad.abs().max() > 1e-12, name


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if row.trains == "lora"])
def test_a_batch_gives_the_logits_and_gradients_of_its_texts_one_by_one(method, encoder):
    model = encoder if method == "encoder_mlp" else CHAT_TIED
    clf = Classifier.zero_shot(model, TASK, "float64", method=method)
    lora.inject(clf.backbone, 2, 4.0, 0.0)
    rng = torch.Generator().manual_seed(0)
    for layer in lora.adapters(clf.backbone).values():  # B is 0, so A has no gradient yet
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=rng, dtype=torch.float64)
    clf.modules.train()
    groups, targets = [clf.prompt.branches(text) for text in TEXTS], torch.tensor([2, 1, 0, 2])
    one_by_one = [([g], t[None]) for g, t in zip(groups, targets)]
    ways = [(clf.logits, [(groups, targets)]), (clf.logits, one_by_one)]
    if clf.shares:  # as for a graph, which takes padding for tokens
        ways.append((lambda batch: clf.score(clf.arrange(batch)), [(groups, targets)]))
    found = []
    for score, way in ways:
        logits = [score(batch) for batch, _ in way]
        for scores, (_, truth) in zip(logits, way):
            torch.nn.functional.cross_entropy(scores, truth, reduction="sum").backward()
        found.append([torch.cat(logits).detach(), *(p.grad for p in clf.trained().values())])
        clf.modules.zero_grad()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-9, rtol=1e-9)


def full_logits(clf: Classifier, ids: list[int]) -> torch.Tensor:
    """Of the vocabulary, after the last of some tokens."""
    return clf.backbone.logits(clf.backbone(torch.tensor([ids]))[0, -1])


def test_letters_stand_before_the_classes_and_are_read():
    clf = classifier("letters")
    assert "Classes:\nA. anger\nB. fear: dark and alone\nC. joy\n\nText: so glad" in clf.render(
        "so glad"
    )
    assert [clf.prompt.tokenizer.decode([i]) for i in clf.label_token_ids] == ["A", "B", "C"]
    for text, row in zip(TEXTS, clf.predict_proba(TEXTS)):
        logits = full_logits(clf, clf.prompt.branches(text)[0])[clf.label_token_ids]
        np.testing.assert_allclose(row, logits.softmax(-1).detach(), atol=1e-6)


def test_letters_that_are_too_few_are_refused():
    many = Task.of_labels([f"class {i}" for i in range(700)])
    with pytest.raises(ValueError, match="700 classes, but the tokenizer has only"):
        classifier("letters", many)


def test_pairs_are_qwen3_rerankers():
    """The margin of yes over no, as its model card computes the probability of yes."""
    task = Task(("j", "f", "a"), ("joy", "fear", "anger"), ("good", "", ""))
    clf = classifier("pairs", task, instruction="Name the mood", dtype="float32")
    for text, scores in zip(FORMS["texts"], FORMS["scores"]):
        margins = torch.tensor(scores).logit()
        found = clf.window([text], "logits")[0]
        torch.testing.assert_close(found, margins, atol=2e-5, rtol=1e-5)
    assert clf.render("x").count("<Document>: joy: good<|im_end|>") == 1
    assert len(clf.render("x").split("\n\n<|im_start|>system\nJudge")) == 3


def test_embeddings_are_qwen3_embeddings():
    task = Task(("j", "f", "a"), ("joy", "fear", "anger"), ("good", "", ""))
    clf = classifier("similarity", task, instruction="Name the mood", dtype="float32")
    vectors = torch.tensor(FORMS["vectors"])
    found = F.normalize(clf.window(FORMS["texts"], "hidden")[:, 0], dim=-1)
    torch.testing.assert_close(found, vectors[: len(found)], atol=1e-5, rtol=0)
    logits = math.exp(3) * vectors[: len(found)] @ vectors[len(found) :].T
    torch.testing.assert_close(clf.window(FORMS["texts"], "logits"), logits, atol=1e-4, rtol=0)


def test_class_vectors_are_computed_once_and_again_after_a_change(monkeypatch):
    clf, calls = classifier("similarity"), []
    hidden = packing.last_hidden

    def spy(backbone, batch, *rest):
        calls.append(len(batch[-1]))
        return hidden(backbone, batch, *rest)

    monkeypatch.setattr("minislm.methods.last_hidden", spy)
    before = clf.predict_proba(TEXTS[:2])
    clf.predict_proba(TEXTS[:2])
    assert calls == [3, 2, 2]
    with torch.no_grad():
        clf.backbone.layers[0].mlp.down_proj.weight.mul_(3)
    after = clf.predict_proba(TEXTS[:2])
    assert calls == [3, 2, 2, 3, 2] and np.abs(after - before).max() > 1e-3


def name_log_probability(clf: Classifier, text: str, name: list[int]) -> torch.Tensor:
    ids, total = clf.prompt.branches(text)[0], 0
    for token in name:
        total = total + full_logits(clf, ids).log_softmax(-1)[token]
        ids = [*ids, token]
    return total


NAMES = Task(("1", "2", "3", "4"), ("dark", "dark alone", "fear", "glad dark"), ("",) * 4)


def test_whole_names_sum_the_log_probabilities_of_their_tokens():
    clf = classifier("whole_names", NAMES)
    names = clf.prompt.name_ids()
    assert max(map(len, names)) > 3 and clf.nodes[0] == []
    for text, found in zip(TEXTS, clf.window(TEXTS, "logits")):
        by_hand = torch.stack([name_log_probability(clf, text, name) for name in names])
        torch.testing.assert_close(found, by_hand.detach(), atol=1e-9, rtol=0)


def test_names_are_scored_in_float32_beside_a_model_in_bfloat16():
    """Of logits around 30 bfloat16 has multiples of 1/8: names would tie."""
    clf = classifier("whole_names", NAMES, dtype="bfloat16")
    hidden = 9 * torch.randn(2, len(clf.nodes), clf.backbone.config.hidden_size).bfloat16()
    clf.head.unembed = lambda x: torch.zeros(*x.shape[:2], 8)
    rows, names = clf.backbone.embed_tokens.weight.double(), clf.prompt.name_ids()
    for x, found in zip(hidden.double(), clf.head(hidden)):
        at = [[x[clf.nodes.index(n[:i])] @ rows[n[i]] for i in range(len(n))] for n in names]
        expected = torch.stack([sum(steps) - len(steps) * math.log(8) for steps in at])
        torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize("method", ["whole_names", "generate", "generate_constrained"])
def test_what_generates_learns_the_name_and_whole_names_which_of_them(
    method, moods, tmp_path, monkeypatch
):
    """The likelihood of the right name among all that could be said, or among the names alone."""
    given = ("--method", method, "--epochs", 1, "--batch-size", 48, "--eval-limit", 1)
    train(monkeypatch, moods, tmp_path, *given, "--lora-dropout", 0, "--dtype", "float64")
    (loss,) = (entry["loss"] for entry in log_of(tmp_path) if "loss" in entry)
    clf = Classifier.zero_shot(CHAT_TIED, moods, "float64", method="whole_names")
    texts, labels = zip(*load_split(moods, "train"))
    log_probabilities = clf.window(texts, "logits")
    loss_of = F.cross_entropy if method == "whole_names" else F.nll_loss
    by_hand = loss_of(log_probabilities, torch.tensor([*map(clf.labels.index, labels)]))
    assert loss == pytest.approx(by_hand.item(), abs=1e-6)


def test_constrained_decoding_takes_the_best_step_each_time():
    clf = classifier("generate_constrained", NAMES)
    names, said = clf.prompt.name_ids(), []
    for text in TEXTS:
        answer: list[int] = []
        while answer not in names:
            after = {n[len(answer)] for n in names if n[: len(answer)] == answer}
            logits = full_logits(clf, clf.prompt.branches(text)[0] + answer)
            answer = [*answer, max(after, key=lambda token: logits[token].item())]
        said.append(str(names.index(answer) + 1))
    assert clf.predict(TEXTS) == said


def test_generating_decodes_greedily_and_counts_what_names_no_class(monkeypatch):
    clf = classifier("generate")
    with torch.no_grad():  # untrained, the tiny model says one token for ever: say "fear" after it
        answers = []
        for text in TEXTS:
            ids, answer = clf.prompt.branches(text)[0], []
            while len(answer) < max(map(len, clf.prompt.name_ids())) + 4:
                answer.append(int(full_logits(clf, ids + answer).argmax()))
                if answer[-1] == clf.prompt.name_ids()[0][-1]:
                    break
            answers.append(clf.prompt.tokenizer.decode(answer).strip())
    assert clf.predict(TEXTS) == [None] * 4 and clf.unparsed == Counter(answers)
    examples = [Example(text, "j") for text in TEXTS]
    result = clf.evaluate(examples, "test")
    assert result["invented"] + result["empty_answers"] == 4 and result["accuracy"] == 0
    named = result["most_frequent_inventions"]
    assert "" not in named and sum(named.values()) == result["invented"]
    assert np.shape(result["confusion"]) == (3, 4) and result["confusion"][2] == [0, 0, 0, 4]
    monkeypatch.setattr("minislm.methods.parse", lambda answer, words: 1)
    assert clf.predict(TEXTS) == ["f"] * 4


def test_an_answer_of_the_most_tokens_fits_behind_the_longest_text(monkeypatch):
    clf, steps = classifier("generate", max_text_tokens=1000), []
    logits = clf.backbone.logits
    monkeypatch.setattr(clf.backbone, "logits", lambda hidden: steps.append(1) or logits(hidden))
    text = "dark " * 1000
    clf.predict([text])
    assert len(steps) == max(map(len, clf.prompt.name_ids())) + methods.ROOM
    places = len(clf.prompt.branches(text)[0]) + len(steps) - 1  # no token follows the last one
    assert places <= clf.backbone.config.max_position_embeddings


def test_inventions_have_an_order_whatever_was_said_before(monkeypatch):
    """A resumed run has said less, and its test.json is to have the same bytes."""
    clf = classifier("generate")

    def stream(texts, *_):
        for text in texts:
            clf.unparsed[text] += 1
            yield text, np.zeros(3)

    monkeypatch.setattr(clf, "stream", stream)
    clf.unparsed = Counter({"b": 1, "a": 1})
    examples = [Example(text, "j") for text in ("a", "b", "c", "c")]
    found = clf.evaluate(examples, "test")["most_frequent_inventions"]
    assert [*found.items()] == [("c", 2), ("a", 1), ("b", 1)]


def test_an_answer_ends_where_the_model_ends_it(monkeypatch):
    """A base model may end the document instead of the line, and go on with another one."""
    clf = classifier("generate", chat="none")
    end = clf.prompt.tokenizer.token_to_id("<|im_end|>")
    said = [*clf.prompt.answer_ids("joy"), end, *clf.prompt.answer_ids("fear")]
    monkeypatch.setattr(clf.backbone, "logits", lambda hidden: F.one_hot(
        torch.tensor([said.pop(0)] * len(hidden)), clf.backbone.config.vocab_size))  # fmt: skip
    assert clf.predict(["glad"]) == ["j"] and not clf.unparsed
    assert len(said) == len(clf.prompt.answer_ids("fear")), "nothing is generated after it"


def test_whole_vocabularies_are_asked_for_in_parts(monkeypatch):
    """A GPU's batch has so many tokens that they would not fit into its memory."""
    clf, sizes = classifier("whole_names"), []
    expected, unembed = clf.predict_proba(TEXTS * 200), clf.head.unembed
    monkeypatch.setitem(methods.BUDGET, "cpu", 10**6)
    clf.head.unembed = lambda hidden: sizes.append(hidden.shape[:2].numel()) or unembed(hidden)
    np.testing.assert_allclose(clf.predict_proba(TEXTS * 200), expected, atol=1e-6)
    assert sum(sizes) == 800 * len(clf.nodes) and max(sizes) <= 2048 < sum(sizes)


@pytest.mark.parametrize("answer, index", [
    ("fear", 1), (" Fear.\n", 1), ("The class is joy!", 2), ("joy or fear", None), ("", None),
    ("fearful", None), ("glad", None), ("anger, of course", 0), ("fear\nText: joy", 1),
])  # fmt: skip
def test_answers_are_parsed(answer, index):
    assert parse(answer, TASK.words) == index


@pytest.mark.parametrize("answer, words, index", [
    ("类别是愤怒。", ("愤怒", "快乐"), 0), ("これは喜びです", ("怒り", "喜び"), 1),
    ("分类：joy。", ("joy", "fear"), 0), ("是joy", ("joy", "fear"), 0),
    ("enjoy 愤怒", ("joy", "愤怒"), 1), ("радость", ("рад", "страх"), None),
])  # fmt: skip
def test_answers_in_scripts_without_spaces_are_parsed(answer, words, index):
    assert parse(answer, words) == index


def test_the_longest_name_of_an_answer_counts():
    words = ("card not working", "virtual card not working", "Card", "card")
    assert parse("Answer: virtual card not working", words) == 1
    assert parse("card not working", words) == 0
    assert [parse(answer, words) for answer in ("Card", "card")] == [2, 3]
    assert parse("male or female", ("male", "female")) is None  # not a part of the word
    assert parse("Yahoo!", ("Google", "Yahoo!")) == parse("It is Yahoo!!", ("Google", "Yahoo")) == 1


def test_an_encoder_is_pooled_as_sentence_transformers_does(encoder, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "bge")
    (folder / "1_Pooling").mkdir()
    for mode, pooling in (("cls_token", "first"), ("mean_tokens", "mean"), ("lasttoken", "last")):
        modes = {f"pooling_mode_{m}": m == mode for m in ("cls_token", "mean_tokens", "lasttoken")}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"a": True} | modes))
        assert Classifier.zero_shot(folder, TASK, method="similarity").pooling == pooling
    for mode, pooling in (("cls", "first"), ("mean", "mean"), (["lasttoken"], "last")):  # newer
        modes = {"pooling_mode": mode, "include_prompt": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
        assert Classifier.zero_shot(folder, TASK, method="similarity").pooling == pooling
    kinds = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Pooling", "Dense")]
    (folder / "modules.json").write_text(json.dumps(kinds))
    with pytest.raises(ValueError, match="modules.json: .*Dense is not implemented"):
        Classifier.zero_shot(folder, TASK, "float64", method="similarity")
    for text, problem in (
        ("[", "not readable as JSON"),
        ("{}", "holds a dict, not a list"),
        ("[1]", "1 is not implemented"),
        ("[{}]", "None is not implemented"),
    ):
        (folder / "modules.json").write_text(text)
        with pytest.raises(ValueError, match=f"modules.json: {problem}"):
            Classifier.zero_shot(folder, TASK, "float64", method="similarity")
    (folder / "modules.json").unlink()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ValueError, match="1_Pooling.*'max'.* not implemented; choose"):
        Classifier.zero_shot(folder, TASK, method="similarity")
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": ["cls", "mean"]}')
    with pytest.raises(ValueError, match="'cls', 'mean'.* not implemented; choose"):
        Classifier.zero_shot(folder, TASK, method="similarity")
    assert Classifier.zero_shot(folder, TASK, method="similarity", pooling="first")


def test_pooling_takes_the_mean_or_the_first_token_of_the_text():
    prompts = [classifier("similarity").prompt.branches(text)[0] for text in TEXTS]
    for pooling, pool in (("mean", lambda h: h.mean(0)), ("first", lambda h: h[0])):
        for bidirectional in (False, True) if pooling == "mean" else (True,):
            clf = classifier("similarity", pooling=pooling, bidirectional=bidirectional)
            by_hand = [pool(clf.backbone(torch.tensor([p]))[0]) for p in prompts]
            found = clf.window(TEXTS, "hidden")[:, 0]
            torch.testing.assert_close(found, torch.stack(by_hand), atol=1e-9, rtol=0)
    last = classifier("similarity", bidirectional=True)
    by_hand = [last.backbone(torch.tensor([p]))[0, -1] for p in prompts]
    found = last.window(TEXTS, "hidden")[:, 0]
    torch.testing.assert_close(found, torch.stack(by_hand), atol=1e-9, rtol=0)
    causal = classifier("similarity").window(TEXTS, "hidden")[:, 0]
    assert (causal - found).abs().max() > 1e-3


def test_the_mean_of_a_long_text_in_bfloat16_is_float32s():
    clf = classifier("similarity", pooling="mean", dtype="bfloat16")
    (prompt,) = clf.prompt.branches("so dark " * 150)
    hidden, found = clf.backbone(torch.tensor([prompt])), clf.hidden([[prompt]], 0, None)[0]
    assert len(prompt) > 256 and hidden.dtype == torch.bfloat16
    torch.testing.assert_close(found, hidden.float().mean(1), atol=1e-5, rtol=0)


def test_an_encoder_reads_queries_between_its_own_tokens(encoder):
    clf = Classifier.zero_shot(encoder, TASK, "float64", method="similarity")
    assert clf.pooling == "mean" and clf.render("glad") == "query: glad"
    (ids,) = clf.prompt.branches("glad [SEP] dark")
    pieces = [clf.prompt.tokenizer.id_to_token(i) for i in ids]
    assert pieces[:4] == ["[CLS]", "query", ":", "glad"] and pieces[-1] == "[SEP]"
    assert pieces.count("[SEP]") == 1, "the text's own is plain text"
    described = [clf.prompt.tokenizer.id_to_token(i) for i in clf.prompt.class_ids[1]]
    assert described == "[CLS] query : fear : dark [UNK] alone [SEP]".split()


def test_synonyms_share_a_class_and_are_averaged():
    both = replace(TASK, synonyms=((), ("dark",), ()))
    found = classifier("sliced_head", both)
    rows = found.backbone.embed_tokens.weight[found.label_token_ids]  # anger, fear, dark, joy
    assert len(found.label_token_ids) == 4
    torch.testing.assert_close(found.head.weight[1], rows[1:3].mean(0))
    with pytest.raises(ValueError, match="same token: .*joy"):
        classifier("sliced_head", replace(TASK, synonyms=((), ("joy",), ())))


def test_shots_are_balanced_seeded_and_stand_before_the_text():
    examples = [Example(f"text {i}", "afj"[i % 3]) for i in range(30)]
    task = Task.of_labels("afj")
    shots = with_shots(task, examples, 2, 0).shots
    labels = [e.label for e in shots]
    assert Counter(labels) == {"a": 2, "f": 2, "j": 2} and labels != sorted(labels)
    again, other = (with_shots(task, examples, 2, seed).shots for seed in (0, 1))
    assert shots == again != other
    clf = classifier("letters", replace(TASK, shots=shots))
    answer = "ABC"["afj".index(shots[-1].label)]
    assert f"\n\nText: {shots[-1].text}\nLetter: {answer}\n\nText: so glad" in clf.render("so glad")
    with pytest.raises(ValueError, match="fewer than 11"):
        with_shots(task, examples, 11, 0)
    with pytest.raises(ValueError, match="'k' has fewer than 1"):  # none at all
        with_shots(Task.of_labels("afjk"), examples, 1, 0)


def test_calibration_evens_out_a_text_without_content_or_fits_validation():
    clf = classifier("sliced_head")
    clf.calibrate("contextual", [])
    np.testing.assert_allclose(clf.predict_proba(["N/A"]), 1 / 3, atol=1e-6)
    rng = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(300, 3, generator=rng), torch.randint(3, (300,), generator=rng)
    logits[range(300), targets] += 1  # right more often than not, and 7 times too sure of it
    sure = 7 * logits + torch.tensor([2.0, 0, 0])
    found = fit_calibration(sure, targets)
    fitted = F.cross_entropy(sure * found["scale"] + found["bias"], targets)
    best = min(F.cross_entropy(t * logits, targets) for t in torch.linspace(0.1, 3, 100))
    assert fitted <= best + 1e-4
    with pytest.raises(ValueError, match="'temperature' is neither contextual nor fitted"):
        clf.calibrate("temperature", [Example("so glad", "a")])
    with pytest.raises(ValueError, match="there are no examples"):
        clf.calibrate("fitted", [])


@pytest.mark.parametrize("n", [18, 60, 200])
def test_calibration_is_no_surer_than_the_texts_allow(n):
    """Where validation has no mistake, the next text may be one, in n + 2 or so (Laplace)."""
    rng = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(n, 3, generator=rng) / 2, torch.randint(3, (n,), generator=rng)
    logits[range(n), targets] = logits.amax(1) + 0.3
    found = fit_calibration(logits, targets)
    p = (logits * found["scale"] + found["bias"]).softmax(-1)
    assert 0.2 / n < (1 - p[range(n), targets]).mean() < 5 / n


def test_calibration_does_not_rule_out_a_class_that_validation_lacks():
    rng = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(200, 3, generator=rng), torch.randint(2, (200,), generator=rng)
    logits[range(200), targets] += 2
    found = fit_calibration(logits, targets)
    p = (logits * found["scale"] + found["bias"]).softmax(-1)
    assert 1e-4 < p[:, 2].mean() < logits.softmax(-1)[:, 2].mean() / 5


@pytest.mark.parametrize("seed", range(156, 163))
def test_calibration_of_logits_that_hardly_differ(seed):
    rng = torch.Generator().manual_seed(seed)
    targets, logits = torch.randint(3, (30,), generator=rng), torch.randn(30, 3, generator=rng)
    logits = 100 + 1e-3 * logits
    found = fit_calibration(logits, targets)
    fitted = F.cross_entropy(logits * found["scale"] + found["bias"], targets)
    shares = targets.bincount() / 30
    assert found["scale"] > 0 and fitted <= -(shares * shares.log()).sum() + 1e-3


def clusters(seed: int, n: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return (torch.randn(n, 1, 5, generator=rng) + 3 * torch.eye(3, 5)[y][:, None]), y


@pytest.mark.parametrize("head", [classic.Nearest, classic.Prototypes, classic.Logistic])
def test_fitted_heads_separate_clusters(head):
    model = head(3)
    model.fit(*clusters(0), *clusters(1))
    x, y = clusters(2)
    assert (model(x).argmax(-1) == y).float().mean() > 0.9


@pytest.mark.parametrize("head", [classic.Nearest, classic.Logistic])
def test_the_setting_is_chosen_on_validation(head):
    """A fifth of the labels is wrong, and most features say nothing: what fits best is not best."""
    rng = torch.Generator().manual_seed(5)
    training, validation = (
        (torch.cat([x, torch.randn(60, 1, 20, generator=rng)], -1), y)
        for x, y in (clusters(0), clusters(1))
    )
    training[1][::5] = (training[1][::5] + 1) % 3
    found = []
    for chosen_on in (validation, training):
        model = head(3)
        model.fit(*training, *chosen_on)
        found.append(classic.macro_f1(model(validation[0]), validation[1]))
    assert found[0] > found[1]


def test_prototypes_compare_with_the_directions_of_the_means():
    model, (x, y) = classic.Prototypes(3), clusters(0)
    x[y == 0] += 2 * torch.randn(20, 1, 5, generator=torch.Generator().manual_seed(2))
    model.fit(x, y, *clusters(1))
    unit = F.normalize(x[:, 0], dim=-1)
    means = torch.stack([unit[y == c].mean(0) for c in range(3)])
    assert means.norm(dim=-1).max() > 1.1 * means.norm(dim=-1).min()
    cosines = F.cosine_similarity(unit[:, None], means, dim=-1)
    torch.testing.assert_close(model(x), model.scale * cosines)


def test_nearest_votes_by_similarity():
    model, (x, y), (x_validation, y_validation) = classic.Nearest(3), clusters(0), clusters(1)
    common = torch.tensor([9.0, 5.0, 0.0, -7.0, 20.0])  # as most of an embedding is
    model.fit(x + common, y, x_validation + common, y_validation)
    mean = x[:, 0].mean(0)
    model.k, between = torch.tensor(40), torch.tensor([[[1.0, 0.8, 0.5, 0.0, 0.0]]])
    cosines = F.normalize(x[:, 0] - mean, dim=-1) @ F.normalize(between[0, 0] - mean, dim=0)
    votes = torch.zeros(3)
    for i in cosines.argsort(descending=True)[:40]:
        votes[y[i]] += torch.exp(cosines[i] / 0.05)
    votes /= votes.sum()
    assert votes.sort().values[1] > 0.1, "one class alone would tell nothing of the weights"
    found = model(between + common).softmax(-1)[0]
    torch.testing.assert_close(found, votes, atol=1e-5, rtol=0)


def test_logistic_regression_does_not_see_a_features_unit():
    (x, y), (x_validation, _) = clusters(0), clusters(1)
    unit, found = torch.tensor([1000.0, 0.01, 1.0, 30.0, 1.0]), []
    for factor, shift in ((1, 0), (unit, 100 * unit)):
        model = classic.Logistic(3)
        model.fit(x * factor + shift, y, x_validation * factor + shift, y)
        found.append(model(x_validation * factor + shift).softmax(-1))
    torch.testing.assert_close(*found, atol=0.01, rtol=0)


@pytest.mark.parametrize("head", [classic.Logistic, classic.Tfidf])
def test_linear_classifiers_are_at_their_optimum(head):
    """The gradient of loss and ridge is zero, for the ridge that was chosen."""
    model = head(3)
    if head is classic.Tfidf:
        texts = [f"{'abc'[i % 3] * 2} {'xyz'[i % 2] * 2} {'pqrstu'[i % 5] * 2}" for i in range(60)]
        x, y = [grams_of(text) for text in texts], torch.arange(60) % 3
        y[::7] = 0  # not separable
        model.fit(x, y, x, y)
    else:
        x, y = (clusters(0)[0] / 2).double(), clusters(0)[1]
        model.fit(x, y, x, y)
    weight, bias = model.weight.clone().requires_grad_(), model.bias.clone().requires_grad_()
    model.loss(model.features(x) @ weight + bias, y).backward()
    with torch.no_grad():
        ridge = -(weight.grad * weight).sum() / (2 * weight.square().sum())
        chosen = min(classic.RIDGES, key=lambda r: abs(math.log(r / ridge.item())))
        assert ridge.item() == pytest.approx(chosen, rel=0.02)
        residual = weight.grad + 2 * chosen * weight
        assert residual.norm() < 0.05 * weight.grad.norm()


def test_the_svm_has_the_squared_hinge_of_each_class_against_the_rest():
    scores = torch.tensor([[3.0, -0.5], [0.25, 0.5]])
    loss = classic.Tfidf(2).loss(scores, torch.tensor([0, 1]))  # margins 3, .5; -.25, .5
    assert loss.item() == pytest.approx((0 + 0.5**2 + 1.25**2 + 0.5**2) / 2)


def test_tfidf_needs_a_word():
    x = [grams_of(text) for text in ("a", "b", "")]
    with pytest.raises(ValueError, match="no training text has a word"):
        classic.Tfidf(2).fit(x, torch.tensor([0, 1, 0]), x, torch.tensor([0, 1, 0]))


def test_the_setting_is_chosen_by_macro_f1(monkeypatch):
    """Always the larger class is right more often, and is no answer."""
    fair = torch.tensor([0] * 70 + [1] * 30)  # accuracy .8, macro-F1 .69; the others' .9 and .47
    said = lambda head, x: F.one_hot(fair if head.k == 1 else 0 * fair, 2)  # noqa: E731
    monkeypatch.setattr(classic.Nearest, "forward", said)
    model, x = classic.Nearest(2), torch.zeros(100, 1, 2)
    model.fit(x, fair, x, torch.tensor([0] * 90 + [1] * 10))
    assert model.k == 1


def test_tfidf_by_hand():
    model = classic.Tfidf(2)
    texts = ["dark dark night", "sunny day", "dark day"]
    x = [grams_of(text) for text in texts]
    model.fit(x, torch.tensor([0, 1, 0]), x, torch.tensor([0, 1, 0]))
    dense = model.features([grams_of("dark dark day, unseen")]).to_dense()[0]
    once, twice = 1 + math.log(4 / 2), 1 + math.log(4 / 3)  # texts that have it, of three
    rarity = {"dark": twice, "day": twice, "dark dark": once, "dark day": once}
    weights = {
        gram: value * (1 + math.log(2)) if gram == "dark" else value
        for gram, value in rarity.items()
    }
    length = math.sqrt(sum(v * v for v in weights.values()))
    grams = model.grams.tolist()
    for gram, value in weights.items():
        at = grams.index(classic.zlib.crc32(gram.encode()))
        assert dense[at].item() == pytest.approx(value / length, abs=1e-6)
    assert (dense > 0).sum() == 4
    unknown = model([grams_of("zzzz"), []])  # a text that training says nothing about
    torch.testing.assert_close(unknown, model.bias.expand(2, -1))


def test_methods_refuse_what_they_cannot_do(encoder, moods, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="sliced_head needs .* kind decoder; .*: encoder"):
        Classifier.zero_shot(encoder, TASK)
    with pytest.raises(ValueError, match="encoder_mlp needs .* kind encoder"):
        classifier("encoder_mlp")
    with pytest.raises(ValueError, match="method 'bert' is not one of sliced_head, letters"):
        classifier("bert")
    with pytest.raises(ValueError, match="pooling 'max' is not one of auto, last, mean, first"):
        classifier("similarity", pooling="max")
    for method, pooling in (("sliced_head", "mean"), ("generate", "last")):
        with pytest.raises(ValueError, match="pooling is for methods that embed"):
            classifier(method, pooling=pooling)
    for method in ("pairs", "whole_names", "tfidf"):
        with pytest.raises(ValueError, match="bidirectional: .* or needs a causal one"):
            classifier(method, bidirectional=True)
    with pytest.raises(ValueError, match="first token has seen no text"):
        classifier("similarity", pooling="first")
    with pytest.raises(ValueError, match="write the instruction there"):
        classifier("letters", replace(TASK, prompt="{classes} {text}"), instruction="Hm.")
    with pytest.raises(ValueError, match="must stand before"):
        shown = replace(TASK, prompt="{text} {classes}", shots=(("x", "a"),))
        classifier("letters", shown)
    with pytest.raises(ValueError, match="no probabilities to calibrate"):
        classifier("nearest").calibrate("contextual", [])
    for method in ("hidden_mlp", "embedding_mlp", "nearest", "logistic", "tfidf"):
        with pytest.raises(ValueError, match=f"{method} has no zero-shot form: train it first"):
            classifier(method).predict(TEXTS)
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="shots: the prompt of .* has no place for examples"):
        train(monkeypatch, moods, out, "--method", "pairs", "--shots", "1")
    with pytest.raises(ValueError, match="--quantize nf4 is for adapters; full has none"):
        train(monkeypatch, moods, out, "--method", "full", "--quantize", "nf4")
    with pytest.raises(ValueError, match="generate has no probabilities to calibrate"):
        train(monkeypatch, moods, out, "--method", "generate", "--calibration", "fitted")
    with pytest.raises(ValueError, match="--head-lr: letters has no head of its own"):
        train(monkeypatch, moods, out, "--method", "letters", "--head-lr", "1e-2")
    with pytest.raises(ValueError, match="--recompute is for decoders"):
        train(monkeypatch, moods, out, "--method", "tfidf", "--recompute")
    assert not out.exists()


def test_full_saves_a_model_that_transformers_names(moods, tmp_path, monkeypatch):
    out = tmp_path / "run"
    train(monkeypatch, moods, out, "--method", "full")
    own, base = (
        load_file(out / "model.safetensors"),
        load_file(CHAT_TIED / "model.safetensors"),
    )
    assert own.keys() == base.keys()
    assert all((own[k] - base[k]).abs().max() > 0 for k in base if "embed" in k or "proj" in k)
    before = (out / "model.safetensors").read_bytes()
    clf = Classifier.load(out, "bfloat16")  # rounded, so not to be saved again
    clf.calibrate("contextual", [])
    clf.save(out)
    assert (out / "calibration.safetensors").exists()
    assert (out / "model.safetensors").read_bytes() == before


def test_a_head_of_its_own_has_a_learning_rate_of_its_own(moods, tmp_path, monkeypatch):
    given = ["--method", "hidden_mlp", "--max-steps", "3", "--dtype", "float32"]
    runs = {}
    for name, lr, head_lr in (("none", 0, 1e-9), ("head", 0, 1e-2), ("lora", 1e-2, 1e-9)):
        out = tmp_path / name
        train(monkeypatch, moods, out, *given, "--lr", lr, "--head-lr", head_lr)
        files = "head.safetensors", "adapter_model.safetensors"
        runs[name] = [load_file(out / file) for file in files]

    def moved(name: str, part: int) -> float:
        pairs = zip(runs[name][part].values(), runs["none"][part].values())
        return max((a - b).abs().max().item() for a, b in pairs)

    assert moved("head", 0) > 1e-3 and moved("head", 1) == 0
    assert moved("lora", 0) < 1e-6 and moved("lora", 1) > 1e-3


@pytest.mark.parametrize("method", ["full", "hidden_mlp", "similarity"])
def test_the_best_is_restored_whatever_came_after_it(method, tmp_path):
    """Of every weight that is trained, and of the calibration."""
    clf = classifier(method, dtype="float32")
    if METHODS[method].trains == "full":
        clf.backbone.requires_grad_(True)
    else:
        lora.inject(clf.backbone, 2, 4.0, 0.0)
    clf.ready, clf.calibration = True, {"scale": torch.ones(()), "bias": torch.full((3,), 0.5)}
    before = clf.predict_proba(TEXTS)
    clf.save(tmp_path)
    with torch.no_grad():
        for parameter in [*clf.trained().values(), clf.calibration["bias"]]:
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    assert np.abs(clf.predict_proba(TEXTS) - before).max() > 1e-3
    clf.restore(tmp_path)
    np.testing.assert_array_equal(clf.predict_proba(TEXTS), before)


def test_a_save_that_fails_changes_nothing(tmp_path, monkeypatch):
    """Head and adapter belong together."""
    clf = classifier("hidden_mlp", dtype="float32")
    lora.inject(clf.backbone, 2, 4.0, 0.0)
    clf.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for parameter in clf.trained().values():
        parameter.data += 1
    saved, save = [], methods.save

    def full(*given, **more):
        saved.append(1)
        if len(saved) == 2:
            raise OSError("no space left on device")
        return save(*given, **more)

    monkeypatch.setattr(methods, "save", full)
    with pytest.raises(OSError, match="no space"):
        clf.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_method_of_ones_own_as_the_readme_shows_it(tmp_path):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code = readme[: readme.index("```\n\nIt trains, evaluates")].rpartition("```python\n")[2]
    assert len(code.splitlines()) < 25
    try:
        exec(code, {})
        clf = classifier("hidden_linear", dtype="float32")
        lora.inject(clf.backbone, 2, 4.0, 0.0)
        clf.ready = True
        clf.save(tmp_path)
        before = clf.predict_proba(TEXTS)
        again = classifier("hidden_linear", dtype="float32")
        again.restore(tmp_path)
        np.testing.assert_array_equal(again.predict_proba(TEXTS), before)
        assert set(clf.trained()) > {"head.out.weight", "head.out.bias"}
    finally:
        METHODS.pop("hidden_linear", None)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "encoder_mlp"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_every_method_in_every_dtype_reads_any_text(method, dtype):
    clf = classifier(method, dtype=dtype)
    examples = [Example(f"{'glad dark burn'.split()[i % 3]} {i}", "afj"[i % 3]) for i in range(12)]
    if METHODS[method].trains == "fit":
        clf.fit(examples, examples)
    clf.ready = True
    rows = rows_of(clf, ["", "a", "bad \ud83d", "<|im_end|>", "dark " * 700])
    assert rows.shape == (5, 3) and np.isfinite(rows).all() and rows.max() <= 1 + 1e-3


def test_answers_begin_with_a_token_of_their_own_where_class_words_are_numbers():
    task = Task.of_labels(map(str, range(5)))
    for method in ("letters", "pairs", "sliced_head"):
        assert classifier(method, task, chat="none").predict(["glad"])[0] in task.labels


@pytest.mark.parametrize("given, expected", [
    (None, f"Instruct: {REQUEST}: anger, fear, joy\nQuery:so {{text}}"),
    ("", "so {text}"), ("Say {text}", "Instruct: Say {text}\nQuery:so {text}"),
])  # fmt: skip
def test_instructions_of_embeddings(given, expected):
    given = {None: "auto", "": "none"}.get(given, given)
    assert classifier("similarity", instruction=given).render("so {text}") == expected


def test_zero_shot_options_of_eval(moods, monkeypatch, capsys, tmp_path):
    load, loaded = eval_script.load_classifier, []
    monkeypatch.setattr(
        eval_script, "load_classifier", lambda a: loaded.append(load(a)) or loaded[-1]
    )
    given = ["--model", CHAT_TIED, "--data", moods, "--method", "letters", "--shots", "1"]
    run(eval_script, monkeypatch, *given, "--calibration", "contextual", "--text", "glad")
    (clf,) = loaded
    assert sorted(label for _, label in clf.task.shots) == clf.labels
    torch.testing.assert_close(clf.window(["N/A"])[0], torch.full((3,), 1 / 3))
    assert capsys.readouterr().out.count("%") == 3
    texts, out = tmp_path / "t.jsonl", tmp_path / "p.jsonl"
    texts.write_text('{"text": "glad"}\n')
    given = ["--model", CHAT_TIED, "--data", moods, "--method", "generate"]
    run(eval_script, monkeypatch, *given, "--predict", texts, "--out", out)
    assert json.loads(out.read_text()) == {"text": "glad", "label": None}


def test_adapters_of_every_backbone_are_where_peft_has_them(encoder):
    clf = Classifier.zero_shot(encoder, TASK, "float32", method="encoder_mlp")
    lora.inject(clf.backbone, 2, 4.0, 0.0)
    assert all(
        name.startswith("base_model.model.encoder.layer.")
        for name in lora.adapter_state(clf.backbone)
    )


def test_an_unknown_quantization_is_refused_whatever_the_method():
    task = Task(("a", "b"), ("a", "b"), ("", ""))
    with pytest.raises(ValueError, match="'int4' is not one of none, nf4, int8"):
        Classifier.zero_shot("", task, method="tfidf", quantize="int4")


@pytest.mark.parametrize("name", ["head", "calibration"])
def test_a_damaged_head_or_calibration_is_named(name, tmp_path):
    clf = classifier("similarity")
    lora.inject(clf.backbone, 4, 8, 0.0)
    clf.calibrate("contextual", [])
    clf.save(tmp_path)
    os.truncate(tmp_path / f"{name}.safetensors", 50)
    with pytest.raises(ValueError, match="head or calibration is damaged"):
        clf.restore(tmp_path)


def test_a_run_is_evaluated_as_it_was_trained(encoder, moods, tmp_path, monkeypatch):
    """Whatever its model's folder says later: pooling is the run's, and all else is refused."""
    model, out = Path(shutil.copytree(encoder, tmp_path / "model")), tmp_path / "run"
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    given = ("--method", "encoder_mlp", "--model", model, "--max-steps", 2)
    train(monkeypatch, moods, out, *given)
    before = rows_of(Classifier.load(out), ["glad", "dark shout"])
    shutil.rmtree(model / "1_Pooling")
    clf = Classifier.load(out)
    assert clf.pooling == "first"
    np.testing.assert_array_equal(rows_of(clf, ["glad", "dark shout"]), before)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.1}))
    with pytest.raises(ValueError, match="not the layer_norm_eps that"):
        Classifier.load(out)


@pytest.mark.parametrize("method", ["whole_names", "generate"])
def test_names_that_are_the_same_tokens_are_refused(method, monkeypatch):
    """As a tokenizer that knows no capitals makes them."""
    ids = Prompt.answer_ids
    monkeypatch.setattr(Prompt, "answer_ids", lambda prompt, word: ids(prompt, word.lower()))
    with pytest.raises(ValueError, match=r"'Law', 'law'.* are the same tokens"):
        classifier(method, Task.of_labels(["law", "Law", "tax"]))


def test_a_token_that_the_model_has_no_row_for_is_refused(tmp_path):
    folder = shutil.copytree(CHAT_TIED, tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["jo"] = 512  # as many tokens as before; the rows are 0 to 511
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the tokenizer has more tokens"):
        Classifier.zero_shot(folder, TASK)


def test_classes_that_are_the_same_tokens_are_refused(encoder):
    """Words that the tokenizer does not know; an MLP head need not read them."""
    task = Task.of_labels(["happy", "sad"])
    with pytest.raises(ValueError, match="same tokens: give them meanings"):
        Classifier.zero_shot(encoder, task, method="similarity")
    Classifier.zero_shot(encoder, task, method="encoder_mlp")


def test_a_description_longer_than_the_context_is_refused(encoder):
    task = Task(("joy", "fear"), ("joy", "fear"), ("", "dark " * 24))
    with pytest.raises(ValueError, match="exceeds the context of 24; use a shorter .*meanings"):
        Classifier.zero_shot(encoder, task, method="similarity")
    Classifier.zero_shot(encoder, task, method="encoder_mlp")


def test_shots_are_not_scored(moods, monkeypatch, capsys):
    given = ("--model", CHAT_TIED, "--data", moods, "--shots", 2, "--split", "train")
    run(eval_script, monkeypatch, *given)
    assert "train: 42 texts" in capsys.readouterr().out  # of 48, without two of each class
    lines = (moods / "train.jsonl").read_text().splitlines(keepends=True)
    (moods / "train.jsonl").write_text("".join(lines[:6]))  # two of each class
    with pytest.raises(ValueError, match="all its texts are shown in the prompt"):
        run(eval_script, monkeypatch, *given)

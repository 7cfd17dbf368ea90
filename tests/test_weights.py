"""Model folders to decoders: the forms that are read, and a refusal by name of everything else."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DECODERS, ENCODERS, FIXTURES, GRANITES, reference
from safetensors.torch import load, save_file

from minislm import load_backbone, weights
from minislm.decoder import DecoderConfig
from minislm.encoder import EncoderConfig
from minislm.weights import head_rows, read_config

# ------------------------------------------------------------------------------ config.json


def config_with(folder: Path, name: str, changes: dict, remove: tuple = ()) -> DecoderConfig:
    """What is read from a fixture's config.json after some changes."""
    raw = json.loads((FIXTURES / name / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if key not in remove}
    (folder / "config.json").write_text(json.dumps(raw))
    return read_config(folder)


# theta, eps, head_dim, tied as make_fixtures.py chose them; qk_norm and qkv_bias as the papers say
SETTINGS = {
    "qwen3-tied": (1e6, 1e-6, 16, True, True, False),
    "qwen3-untied": (1e6, 1e-6, 8, False, True, False),
    "qwen2-tied": (2e4, 1e-6, 8, True, False, True),
    "qwen2-untied": (2e4, 1e-6, 8, False, False, True),
    "llama-tied": (5e4, 1e-5, 8, True, False, False),
    "llama-untied": (5e4, 1e-5, 16, False, False, False),
}


@pytest.mark.parametrize("name", DECODERS)
def test_both_generations_of_config_are_read(name):
    theta, eps, head_dim, tied, qk_norm, qkv_bias = SETTINGS[name]
    assert read_config(FIXTURES / name) == DecoderConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3 if tied else 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        rms_norm_eps=eps,
        rope_theta=theta,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
    )


@pytest.mark.parametrize("name", GRANITES)
def test_both_generations_of_granite_are_read(name):
    assert read_config(FIXTURES / name) == DecoderConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=40 if "granite4" in name else 48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=2e4,
        max_position_embeddings=512,
        tie_word_embeddings=name.endswith("-tied"),
        qk_norm=False,
        qkv_bias=False,
        rope=name != "granite4-untied",
        embedding_multiplier=3.0,
        attention_multiplier=0.6,
        residual_multiplier=0.45,
        logits_scaling=2.5,
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_read(name):
    assert read_config(FIXTURES / name) == EncoderConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        type_vocab_size=2 if name == "bert" else 1,
        layer_norm_eps=1e-6,
        first_position=0 if name == "bert" else 2,
    )


def test_positions_begin_after_the_padding_token(tmp_path):
    config = config_with(tmp_path, "roberta", {"pad_token_id": 4})
    assert (config.first_position, config.max_position_embeddings) == (5, 21)


@pytest.mark.parametrize("rope", [
    {"rope_theta": 5e4},
    {"rope_theta": 5e4, "rope_scaling": None},
    {"rope_theta": 5e4, "rope_scaling": {"rope_type": "default"}},
    {"rope_theta": 5e4, "rope_scaling": {"type": "default"}},
    {"rope_parameters": {"rope_theta": 5e4}},
    {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}, "rope_scaling": None},
    {"rope_parameters": {"rope_theta": 5e4, "partial_rotary_factor": 1.0}},
])  # fmt: skip
def test_every_way_to_say_plain_rope_is_read(rope, tmp_path):
    bare = config_with(tmp_path, "llama-untied", {}, remove=("rope_parameters",))
    assert bare.rope_theta == 1e4
    config = config_with(tmp_path, "llama-untied", {"rope_parameters": None} | rope)
    assert config == read_config(FIXTURES / "llama-untied")


@pytest.mark.parametrize("key", [
    "head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings",
    "tie_word_embeddings", "attention_bias", "rope_scaling",
])  # fmt: skip
def test_null_means_the_default(key, tmp_path):
    left_out = config_with(tmp_path, "llama-tied", {}, remove=(key,))
    assert config_with(tmp_path, "llama-tied", {key: None}) == left_out


@pytest.mark.parametrize("name, changes", [
    ("qwen2-tied", {"use_mrope": False, "sliding_window": 32768}),  # Qwen2.5-0.5B
    ("llama-tied", {"rope_interleaved": False, "is_llama_config": True, "pretraining_tp": 1,
                    "transformers.js_config": {"kv_cache_dtype": {}}}),  # SmolLM2-135M
    ("granite4-tied", {"normalization_function": "rmsnorm", "init_method": "mup"}),  # Granite 4
    ("bert", {"position_embedding_type": "absolute", "directionality": "bidi",
              "pooler_type": "first_token_transform", "gradient_checkpointing": False}),
    ("xlm-roberta", {"output_past": True, "tokenizer_class": "XLMRobertaTokenizer"}),
])  # fmt: skip
def test_published_settings_that_change_nothing_are_accepted(name, changes, tmp_path):
    assert config_with(tmp_path, name, changes) == read_config(FIXTURES / name)


@pytest.mark.parametrize("changes, named", [
    ({"model_type": "mamba"}, "model_type.*mamba"),
    ({"model_type": None}, "model_type"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_(scaling|type).*llama3"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_(scaling|type).*yarn"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_(param|type).*linear"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"is_causal": False}, "is_causal = False"),
    ({"use_mrope": True}, "use_mrope"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types.*sliding_attention"),
    ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ({"attention_multiplier": 0.5}, "attention_multiplier"),
    ({"num_experts": 8}, "num_experts"),
    ({"qk_norm": True}, "qk_norm"),  # ours, but nothing that a Llama config may ask for
    ({"qkv_bias": True}, "qkv_bias"),
    ({"hidden_size": None}, "hidden_size"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers"),
    ({"num_key_value_heads": 2.5}, "num_key_value_heads = 2.5 must be a positive whole number"),
    ({"head_dim": 0}, "head_dim = 0 must be a positive whole number"),
    ({"num_key_value_heads": 3}, "num_attention_heads = 4 is no multiple of num_key_value_heads"),
    ({"head_dim": None, "num_attention_heads": 6}, "num_attention_heads = 6 does not divide"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ({"rope_theta": "1e4"}, "rope_theta = '1e4' must be a number"),
    ({"rope_theta": float("nan")}, "rope_theta = nan must be a number"),
])  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(changes, named, tmp_path):
    with pytest.raises(ValueError, match=f"config.json: .*{named}"):
        config_with(tmp_path, "llama-tied", changes)


@pytest.mark.parametrize("name, changes, named", [
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type.*relative_key"),
    ("bert", {"hidden_act": "gelu_new"}, "hidden_act.*gelu_new"),
    ("bert", {"hidden_act": "silu"}, "hidden_act.*silu"),
    ("bert", {"is_decoder": True}, "is_decoder"),
    ("bert", {"add_cross_attention": True}, "add_cross_attention"),
    ("bert", {"embedding_size": 16}, "embedding_size"),
    ("bert", {"num_attention_heads": 5}, "num_attention_heads"),
    ("bert", {"rope_scaling": {"rope_type": "yarn"}}, "rope_type.*yarn"),
    ("roberta", {"first_position": 3}, "first_position"),  # ours, not a config's
    ("bert", {"qk_norm": True}, "qk_norm"),
    ("granite-tied", {"attention_bias": True}, "attention_bias"),
    ("granite-tied", {"hidden_act": "gelu"}, "hidden_act.*gelu"),
    ("granite-tied", {"rope": True}, "rope"),
    ("granite4-tied", {"layer_types": ["attention", "mamba"]}, "layer_types.*mamba"),
    ("granite4-tied", {"layer_types": ["linear_attention"] * 2}, "layer_types.*linear_attention"),
    ("granite4-tied", {"num_local_experts": 8}, "num_local_experts = 8"),
    ("granite4-tied", {"normalization_function": "layernorm"}, "normalization_function"),
])  # fmt: skip
def test_what_an_encoder_or_granite_lacks_is_refused_by_name(name, changes, named, tmp_path):
    with pytest.raises(ValueError, match=f"config.json: .*{named}"):
        config_with(tmp_path, name, changes)


# ----------------------------------------------------------------------------- bad folders


def copy(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def edit_bytes(folder: Path, edit, name: str = "model.safetensors") -> None:
    (folder / name).write_bytes(edit((folder / name).read_bytes()))


def edit_tensors(folder: Path, edit) -> None:
    """Rewrites model.safetensors; `edit` changes the tensors or returns others."""
    path = folder / "model.safetensors"
    tensors = load(path.read_bytes())
    tensors = edit(tensors) or tensors
    path.unlink()
    save_file(tensors, path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such model folder"):
        load_backbone(tmp_path / "nowhere")


def test_a_file_is_no_folder():
    with pytest.raises(ValueError, match="config.json: no such model folder"):
        load_backbone(FIXTURES / "llama-tied" / "config.json")


@pytest.mark.parametrize("edit, message", [
    (lambda b: b[:-9], "config.json: not readable as JSON"),
    (lambda b: b"", "config.json: not readable as JSON"),
    (lambda b: b"\xff" + b, "config.json: not readable as JSON"),
    (lambda b: b"[" + b + b"]", "config.json: holds a list"),
    (lambda b: b.replace(b"1e-05", b'"1e-05"'), "rms_norm_eps = '1e-05' must be a number"),
])  # fmt: skip
def test_a_damaged_config_is_refused(edit, message, tmp_path):
    folder = copy(tmp_path, "llama-tied")
    edit_bytes(folder, edit, "config.json")
    with pytest.raises(ValueError, match=message):
        load_backbone(folder)


def test_a_missing_config_is_refused(tmp_path):
    folder = copy(tmp_path, "llama-tied")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json: not readable .*No such file"):
        load_backbone(folder)


def test_a_folder_without_weights_is_refused(tmp_path):
    folder = copy(tmp_path, "llama-tied")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor") as error:
        load_backbone(folder)
    assert "pytorch_model.bin" not in str(error.value)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="convert its pytorch_model.bin"):
        load_backbone(folder)


@pytest.mark.parametrize("edit, message", [
    (lambda b: b[:-1], "truncated"),
    (lambda b: b[: len(b) // 2], "truncated"),
    (lambda b: b[:200], "ends inside its header"),
    (lambda b: b[:5], "ends inside its header"),
    (lambda b: b"", "ends inside its header"),
    (lambda b: b"\xff" * 8 + b[8:], "ends inside its header"),
    (lambda b: b[:8] + b"\xff" * (len(b) - 8), "not a readable safetensors file"),
    (lambda b: b[:8] + b"{" * (len(b) - 8), "not a readable safetensors file"),
    (lambda b: (2).to_bytes(8, "little") + b"[]", "not a readable safetensors file"),
    (lambda b: b.replace(b'"dtype"', b'"dtypo"', 1), "not a readable safetensors file"),
    (lambda b: b.replace(b"[96,32]", b"[96,31]", 1), "embed_tokens.* shape"),
], ids=["last byte", "half", "header cut", "5 bytes", "empty", "length", "not UTF-8", "not JSON",
        "a list", "no dtype", "size"])  # fmt: skip
def test_a_damaged_file_is_refused(edit, message, tmp_path):
    folder = copy(tmp_path, "llama-tied")
    edit_bytes(folder, edit)
    with pytest.raises(ValueError, match=f"model.safetensors: .*{message}"):
        load_backbone(folder)


NORM = "model.norm.weight"


@pytest.mark.parametrize("edit, message", [
    (lambda t: {k: v for k, v in t.items() if k != NORM}, "the weights lack norm.weight"),
    (lambda t: t.update({"score.weight": torch.ones(2, 32)}), "the weights have score.weight"),
    (lambda t: t.update({NORM: torch.ones(31)}), r"norm.weight has shape \(31,\).* \(32,\)"),
    (lambda t: t.update({NORM: torch.ones(1, 32)}), r"norm.weight has shape \(1, 32\)"),
    (lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}), "norm.weight has dtype I8"),
    (lambda t: t.update({NORM: torch.ones(32).to(torch.float8_e4m3fn)}), "has dtype F8_E4M3"),
], ids=["missing", "unexpected", "shape", "dimensions", "int8", "float8"])  # fmt: skip
def test_other_tensors_than_the_models_are_refused(edit, message, tmp_path):
    folder = copy(tmp_path, "llama-tied")
    edit_tensors(folder, edit)
    with pytest.raises(ValueError, match=message):
        load_backbone(folder)


@pytest.mark.parametrize("name, edit, message", [
    ("xlm-roberta", lambda t: {k: v for k, v in t.items() if "0.attention.self.key.b" not in k},
     "the weights lack encoder.layer.0.attention.self.key.bias"),
    ("bert", lambda t: t.update({"qa_outputs.bias": torch.ones(2)}), "have qa_outputs.bias"),
    ("llama-tied", lambda t: t.update({"pooler.bias": torch.ones(2)}), "have pooler.bias"),
    ("bert", lambda t: t.update({"embeddings.LayerNorm.bias": torch.ones(32)}),
     "embeddings.LayerNorm.bias is there twice"),
    ("granite4-tied", lambda t: t.update({"model.layers.0.shared_mlp.input_linear.weight":
                                          torch.ones(81, 32)}), r"\(81, 32\) is not two layers"),
    ("granite4-tied", lambda t: t.update({"model.layers.0.shared_mlp.input_linear.weight":
                                          torch.tensor(1.0)}), r"shape \(\) is not two layers"),
    ("granite4-tied", lambda t: t.update({"model.layers.1.mamba.D": torch.ones(4)}),
     "have layers.1.mamba.D"),
], ids=["missing", "unknown head", "decoder with a pooler", "with and without prefix", "odd gate",
        "no matrix", "mamba"])  # fmt: skip
def test_other_tensors_than_an_encoders_or_granites_are_refused(name, edit, message, tmp_path):
    folder = copy(tmp_path, name)
    edit_tensors(folder, edit)
    with pytest.raises(ValueError, match=message):
        load_backbone(folder)


def test_an_untied_model_without_its_head_is_refused(tmp_path):
    folder = copy(tmp_path, "llama-untied")
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})
    with pytest.raises(ValueError, match="lack lm_head.weight"):
        load_backbone(folder)
    decoder = load_backbone(folder, head=False)
    with pytest.raises(ValueError, match="lack lm_head.weight"):
        head_rows(folder, decoder, [0])


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "a/x.safetensors"])
def test_a_shard_outside_the_folder_is_refused(shard, tmp_path):
    folder = copy(tmp_path, "qwen3-untied")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = shard
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"'{shard}' lies outside the model's folder"):
        load_backbone(folder)


def test_a_missing_shard_is_refused(tmp_path):
    folder = copy(tmp_path, "qwen3-untied")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors: not .* No such file"):
        load_backbone(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["x.safetensors"]}])
def test_an_index_without_a_weight_map_is_refused(index, tmp_path):
    folder = copy(tmp_path, "qwen3-untied")
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{INDEX}: it has no weight_map"):
        load_backbone(folder)


# ---------------------------------------------------------------------------- good folders


def logits(folder: Path, **arguments) -> torch.Tensor:
    decoder = load_backbone(folder, **arguments)
    return decoder.logits(decoder(reference(folder.name)["ids"]))


def merge_shards(folder: Path) -> None:
    """Makes one model.safetensors of a sharded model."""
    tensors = {}
    for path in folder.glob("model-*.safetensors"):
        tensors |= load(path.read_bytes())
        path.unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors")


def test_shards_and_one_file_give_the_same_numbers(tmp_path):
    folder = copy(tmp_path, "qwen3-untied")
    merge_shards(folder)
    assert torch.equal(logits(folder), logits(FIXTURES / "qwen3-untied"))


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_loads_into_every_other(stored, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", 1000)  # so that tensors are read in several chunks
    folder = copy(tmp_path, "llama-untied")
    edit_tensors(folder, lambda ts: {k: (v.double() / 3).to(stored) for k, v in ts.items()})
    expected = load((folder / "model.safetensors").read_bytes())
    state = load_backbone(folder, dtype=loaded).state_dict()
    assert state.keys() == {name.removeprefix("model.") for name in expected}
    for name, tensor in expected.items():
        torch.testing.assert_close(
            state[name.removeprefix("model.")], tensor.to(loaded), atol=0, rtol=0
        )


def test_the_decoder_is_frozen_and_in_eval_mode():
    decoder = load_backbone(FIXTURES / "llama-untied")
    assert not decoder.training
    assert not any(p.requires_grad for p in decoder.parameters())


def test_a_tied_model_may_repeat_its_head(tmp_path):
    folder = copy(tmp_path, "llama-tied")
    embedding = "model.embed_tokens.weight"
    edit_tensors(folder, lambda ts: ts | {"lm_head.weight": ts[embedding].clone()})
    assert torch.equal(logits(folder), logits(FIXTURES / "llama-tied"))
    loaded = load_backbone(folder)  # one table, and a run's config that says so
    assert loaded.config.tie_word_embeddings and loaded.lm_head is None


def test_a_stored_head_is_used_where_the_config_says_that_it_is_the_embedding(tmp_path):
    folder = copy(tmp_path, "llama-tied")
    embedding = "model.embed_tokens.weight"
    edit_tensors(folder, lambda ts: ts | {"lm_head.weight": 2 * ts[embedding]})  # exact
    tied = FIXTURES / "llama-tied"
    assert torch.equal(logits(folder), 2 * logits(tied))
    rows = (head_rows(f, load_backbone(f, head=False), [3, 7]) for f in (folder, tied))
    assert torch.equal(next(rows), 2 * next(rows))


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
def test_names_without_the_model_prefix_are_read(name, tmp_path):
    folder = copy(tmp_path, name)
    edit_tensors(folder, lambda ts: {k.removeprefix("model."): v for k, v in ts.items()})
    assert torch.equal(logits(folder), logits(FIXTURES / name))


def test_frequencies_that_old_checkpoints_keep_are_passed_over(tmp_path):
    folder = copy(tmp_path, "llama-tied")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda ts: ts | {name: torch.ones(4)})
    assert torch.equal(logits(folder), logits(FIXTURES / "llama-tied"))


def hidden(folder: Path) -> torch.Tensor:
    return load_backbone(folder)(reference(folder.name)["ids"])


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_read_without_its_heads_and_prefix(name, tmp_path):
    """And with the position ids that checkpoints of transformers before 4.31 keep."""
    folder = copy(tmp_path, name)

    def edit(tensors):
        bare = {re.sub("^(bert|roberta)[.]", "", key): value for key, value in tensors.items()}
        bare = {k: v for k, v in bare.items() if k.startswith(("embeddings.", "encoder."))}
        assert name == "xlm-roberta" or bare.keys() != tensors.keys()
        return bare | {"embeddings.position_ids": torch.arange(26)[None]}

    edit_tensors(folder, edit)
    assert torch.equal(hidden(folder), hidden(FIXTURES / name))


# ------------------------------------------------------------------------- rows of the head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-untied", "llama-untied"])
def test_head_rows_are_the_full_heads(name, dtype):
    full = load_backbone(FIXTURES / name, dtype)
    head = full.lm_head or full.embed_tokens
    ids = [95, 0, 7, 7]  # the last row, the first, and one twice
    rows = head_rows(FIXTURES / name, load_backbone(FIXTURES / name, dtype, head=False), ids)
    assert rows.dtype == torch.float32 and torch.equal(rows, head.weight[ids].float())


def count_filled(monkeypatch) -> list[int]:
    """A list that grows by the number of elements of each read."""
    counts, read_into = [], weights.read_into

    def counting(target, *rest):
        counts.append(target.numel())
        return read_into(target, *rest)

    monkeypatch.setattr(weights, "read_into", counting)
    return counts


def test_an_untied_head_stays_in_the_file(monkeypatch):
    counts = count_filled(monkeypatch)
    decoder = load_backbone(FIXTURES / "llama-untied", head=False)
    mapped = decoder.embed_tokens.weight.numel()
    assert sum(counts) == sum(p.numel() for p in decoder.parameters()) - mapped
    assert "lm_head.weight" not in decoder.state_dict()
    counts.clear()
    head_rows(FIXTURES / "llama-untied", decoder, [3, 90])
    assert sum(counts) == 2 * 32


@pytest.mark.parametrize("name", ["llama-untied", "bert"])
def test_embeddings_stay_in_the_file_too(name, tmp_path, monkeypatch):
    """Where it has the dtype, and its header the length, that they can be used as they are."""
    folder = copy(tmp_path, name)
    path = folder / "model.safetensors"
    content, counts = path.read_bytes(), count_filled(monkeypatch)
    backbone = load_backbone(folder)
    kept = {n: p.clone() for n, p in backbone.named_parameters() if "embed" in n and p.ndim == 2}
    everything = sum(p.numel() for p in backbone.parameters())
    assert sum(counts) == everything - sum(p.numel() for p in kept.values())
    for name in kept:  # what is written stays in memory
        backbone.get_parameter(name).zero_()
    assert path.read_bytes() == content and not backbone.get_parameter(name).any()

    length = int.from_bytes(content[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" "
                     + content[8 + length :])  # fmt: skip
    for dtype in (torch.float32, torch.float64):
        counts.clear()
        again = load_backbone(folder, dtype)
        assert sum(counts) == everything
        for name, value in kept.items():
            assert torch.equal(again.get_parameter(name), value.to(dtype))


@pytest.mark.parametrize("name", ["qwen3-tied", "llama-untied"])
def test_a_token_outside_the_vocabulary_has_no_row(name):
    with pytest.raises((ValueError, IndexError)):
        head_rows(FIXTURES / name, load_backbone(FIXTURES / name, head=False), [96])


# -------------------------------------------------------------------------------- memory

MEASURE = """
import re, sys, torch
from minislm import load_backbone
def kilobytes(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
torch.set_num_threads(1)
load_backbone(sys.argv[1])
before = kilobytes("VmRSS")
decoder = load_backbone(sys.argv[2], torch.float32)
stays = "embed_tokens.weight" if sys.argv[3] == "torch.float32" else ""  # in the file
size = sum(p.numel() * p.itemsize for name, p in decoder.named_parameters() if name != stays)
print((kilobytes("VmHWM") - before) * 1024 / size)
"""


def write_large_model(folder: Path, dtype: torch.dtype) -> None:
    """A Llama of 30 million parameters (120 MB in float32), more than half of them in its head."""
    D, layers, ffn, vocab = 512, 4, 1024, 34000
    name = "llama-untied"
    config = json.loads((FIXTURES / name / "config.json").read_text()) | {
        "hidden_size": D, "intermediate_size": ffn, "num_hidden_layers": layers, "head_dim": 128,
        "vocab_size": vocab, "num_key_value_heads": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        decoder = weights.Decoder(read_config(folder))
    tensors = {k: torch.ones(p.shape, dtype=dtype) for k, p in decoder.named_parameters()}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_takes_little_more_memory_than_the_weights(dtype, tmp_path):
    write_large_model(tmp_path / "large", dtype)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, FIXTURES / "llama-tied", tmp_path / "large", str(dtype)],
        capture_output=True, text=True, check=True, cwd=FIXTURES.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    shutil.rmtree(tmp_path / "large")
    assert 0.95 < float(run.stdout) <= 1.15  # less would mean that the measure measures nothing

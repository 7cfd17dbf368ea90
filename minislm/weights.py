"""A Hugging Face folder becomes a Decoder or Encoder: config.json and safetensors, also in shards.

A safetensors file is eight bytes (N, little-endian), N bytes of JSON ({name: {dtype, shape,
data_offsets}}), then the tensors' raw bytes (format: github.com/huggingface/safetensors). The model
is built on the meta device, and each parameter is allocated once and filled from the file in
chunks, so that loading takes little more memory than the weights, whatever dtype the file has.
Embeddings, of which texts need few rows, are memory-mapped if the file's dtype is the model's.
"""

import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import lora, quant
from .decoder import Decoder, DecoderConfig
from .encoder import Encoder, EncoderConfig

CHUNK = 1 << 20  # elements read at a time
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# model_type -> what sets the family apart
FAMILIES = {
    "llama": dict(qk_norm=False, qkv_bias=False),
    "qwen2": dict(qk_norm=False, qkv_bias=True),
    "qwen3": dict(qk_norm=True, qkv_bias=False),
    "granite": dict(qk_norm=False, qkv_bias=False),
    "granitemoehybrid": dict(qk_norm=False, qkv_bias=False),  # Granite 4, where it is dense
    "bert": dict(first_position=0),
    "roberta": dict(first_position=2),  # pad_token_id + 1, where there is one
    "xlm-roberta": dict(first_position=2),
}
FACTORS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
REQUIRED = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
# Settings of which only these values are implemented; any other unknown setting must be off.
FIXED = {
    "hidden_act": ("silu", "swish"), "partial_rotary_factor": (1,), "pretraining_tp": (1,),
    "is_decoder": (True, False), "is_causal": (True,), "normalization_function": ("rmsnorm",),
}  # fmt: skip
FIXED_ENCODER = {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",)}
# Settings that say nothing about what eval-mode inference computes.
IGNORED = {
    "model_type", "architectures", "auto_map", "transformers_version", "_name_or_path",
    "torch_dtype", "dtype", "initializer_range", "attention_dropout", "classifier_dropout",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "tokenizer_class", "use_cache",
    "return_dict", "id2label", "label2id", "attention_probs_dropout_prob", "is_llama_config",
    "chunk_size_feed_forward", "init_method", "transformers.js_config", "task_specific_params",
    "problem_type", "directionality",
    "sliding_window", "max_window_layers",  # only read where use_sliding_window is true
    "tie_word_embeddings",  # a decoder's is read; an encoder's is about a head that is left aside
}  # fmt: skip
# Nor do those that begin so: models with such layers are refused by other settings, or weights.
UNUSED = ("mamba_", "time_step_", "router_", "num_experts_per_tok", "pooler_", "hidden_dropout")
UNUSED += ("output_", "unsloth_", "_attn_implementation")
MODES = {"mean": "mean", "cls": "first", "lasttoken": "last"}
HEADS = ("pooler.", "cls.", "lm_head.", "classifier.")  # on an encoder: left aside


def resolve_folder(model: str | Path) -> Path:
    """The folder itself, or the local copy of a hub id (org/name), downloaded when needed."""
    if str(model) and Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download  # heavy, and only needed here

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja"]
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = f"see --model; the hub: {type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{model}: no such model folder; {reason}") from error


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(model: str | Path) -> dict[str, str]:
    """By name, of the files that say what a model makes of a text."""
    files = [*weight_files(folder := resolve_folder(model)), folder / "tokenizer.json"]
    return {path.name: sha256(path) for path in files}


def read_json(path: Path, kind: type = dict) -> dict | list:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a {kind.__name__}")
    return content


def read_config(folder: Path) -> DecoderConfig | EncoderConfig:
    """config.json, as transformers 4 or 5 writes it; what is not implemented is refused by name."""
    path = folder / "config.json"
    settings = {key: value for key, value in read_json(path).items() if value is not None}

    def refuse(key: str, value, why: str = "is not implemented") -> None:
        raise ValueError(f"{path}: {key} = {value!r} {why}")

    if (model_type := str(settings.get("model_type"))) not in FAMILIES:
        refuse("model_type", settings.get("model_type"), f"is not one of {', '.join(FAMILIES)}")
    for key in ("rope_parameters", "rope_scaling"):  # transformers 5, transformers 4
        if isinstance(settings.get(key), dict):
            settings |= settings.pop(key)
    if (rope_type := settings.pop("rope_type", settings.pop("type", "default"))) != "default":
        refuse("rope_type", rope_type)
    if layers := set(settings.pop("layer_types", [])) - {"full_attention", "attention"}:
        refuse("layer_types", layers)
    family = FAMILIES[model_type]
    if model_type == "granitemoehybrid":
        settings["intermediate_size"] = settings.pop("shared_intermediate_size", 1024)
        family = family | {"rope": settings.pop("position_embedding_type", None) == "rope"}

    encoder, granite = "first_position" in family, "granite" in model_type
    kind, fixed = (EncoderConfig, FIXED_ENCODER) if encoder else (DecoderConfig, FIXED)
    used = kind.__dataclass_fields__.keys() - {"rope", *family, *(() if granite else FACTORS)}
    whole = {name for name, field in kind.__dataclass_fields__.items() if field.type is int}
    for key, value in (dict.fromkeys(REQUIRED) | settings).items():
        if key in used & whole and not (isinstance(value, int) and value > 0):
            refuse(key, value, "must be a positive whole number")
        if key in used and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
            refuse(key, value, "must be a number, not below 0")
        known = key in used | IGNORED or key.startswith(UNUSED)
        if not known and value not in fixed.get(key, (False, {}, [])):
            refuse(key, value)

    given = {key: settings[key] for key in used & settings.keys()}
    heads, width = given["num_attention_heads"], given["hidden_size"]
    if "head_dim" not in given and width % heads:
        refuse("num_attention_heads", heads, f"does not divide hidden_size = {width}")
    if heads % (groups := given.get("num_key_value_heads", heads)):
        refuse("num_attention_heads", heads, f"is no multiple of num_key_value_heads = {groups}")
    if encoder:
        first = settings.get("pad_token_id", 1) + 1 if family["first_position"] else 0
        room = given.get("max_position_embeddings", 512) - first
        return EncoderConfig(**given | dict(max_position_embeddings=room, first_position=first))
    defaults = dict(num_key_value_heads=heads, head_dim=width // heads)
    defaults["attention_multiplier"] = 1.0 if granite else None
    return DecoderConfig(**defaults | given | family)


def read_pooling(folder: Path) -> str:
    """mean, first or last: how sentence-transformers pools the folder's encoder; default: mean."""
    path, listed = folder / "1_Pooling" / "config.json", folder / "modules.json"
    for module in read_json(listed, list) if listed.exists() else ():
        kind = str(module.get("type") if isinstance(module, dict) else module)
        if not kind.endswith((".Transformer", ".Pooling", ".Normalize")):
            raise ValueError(f"{listed}: {kind} is not implemented; set --pooling")
    modes = read_json(path) if path.exists() else {"pooling_mode": "mean"}
    # of old, each has a flag: pooling_mode_cls_token, say
    flags = [k for k in modes if "_mode_" in k and modes[k] is True]
    on = modes.get("pooling_mode", [re.sub("pooling_mode_|_tokens?$", "", k) for k in flags])
    on = [on] if isinstance(on, str) else on
    if len(on) != 1 or on[0] not in MODES:
        raise ValueError(f"{path}: {on} is not implemented; choose with --pooling")
    return MODES[on[0]]


class Stored(NamedTuple):
    """Where a tensor lies: `begin` in bytes, from the start of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file."""
    try:
        size, stored = path.stat().st_size, {}
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if size < start:
                raise ValueError("the file ends inside its header")
            header = json.loads(file.read(start - 8))
        for name, entry in header.items():
            if name.endswith(("__metadata__", "rotary_emb.inv_freq", "embeddings.position_ids")):
                continue  # old checkpoints keep what the config implies
            if entry["dtype"] not in STORED:
                raise ValueError(f"{name} has dtype {entry['dtype']}, none of {', '.join(STORED)}")
            dtype, shape = STORED[entry["dtype"]], tuple(entry["shape"])
            begin, end = (start + offset for offset in entry["data_offsets"])
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has {end - begin} bytes, which is not its shape {shape}")
            if end > size:
                raise ValueError(f"the file is truncated: {size:,} bytes; {name} ends at {end:,}")
            stored[name] = Stored(path, dtype, shape, begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from None
    return stored


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        has_bin = (folder / "pytorch_model.bin").exists()
        remedy = "convert its pytorch_model.bin" if has_bin else "only safetensors are read"
        raise ValueError(f"{folder}: neither {whole.name} nor {index.name} there; {remedy}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: it has no weight_map")
    shards = sorted(set(map(str, names.values())))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise ValueError(f"{index}: the shard {outside[0]!r} lies outside the model's folder")
    return [folder / shard for shard in shards]


def read_stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder under our names (without a CausalLM's `model.`, say)."""
    tensors = {}
    for path in weight_files(folder):
        for name, stored in read_header(path).items():
            name = re.sub(r"^(model|bert|roberta)\.", "", name)
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight")  # as bert-base-uncased has
            name = name.replace("LayerNorm.beta", "LayerNorm.bias")
            if twice := tensors.keys() & (parts := unstacked(name, stored)).keys():
                raise ValueError(f"{path}: {min(twice)} is there twice")
            tensors |= parts
    return tensors


def unstacked(name: str, stored: Stored) -> dict[str, Stored]:
    """Splits Granite 4's one layer of gate and up. (PEFT cannot read adapters of the halves.)"""
    name = name.replace("shared_mlp.output_linear", "mlp.down_proj")
    block, stacked, _ = name.partition("shared_mlp.input_linear.weight")
    if not stacked:
        return {name: stored}
    if len(stored.shape) != 2 or stored.shape[0] % 2:
        raise ValueError(f"{stored.path}: {name} of shape {stored.shape} is not two layers in one")
    gate = stored._replace(shape=(stored.shape[0] // 2, stored.shape[1]))
    up = gate._replace(begin=gate.begin + math.prod(gate.shape) * gate.dtype.itemsize)
    return {f"{block}mlp.gate_proj.weight": gate, f"{block}mlp.up_proj.weight": up}


@torch.no_grad()
def read_into(target: Tensor, stored: Stored, begin: int = 0) -> Tensor:
    """Fills `target` from a stored tensor, from element `begin` on, and returns it."""
    with open(stored.path, "rb") as file:
        file.seek(stored.begin + begin * stored.dtype.itemsize)
        for part in target.view(-1).split(CHUNK):
            buffer = bytearray(part.numel() * stored.dtype.itemsize)
            if file.readinto(buffer) != len(buffer):
                raise ValueError(f"{stored.path}: the file ends early")
            part.copy_(torch.frombuffer(buffer, dtype=stored.dtype))
    return target


def check_fit(stored: dict[str, Stored], own: dict[str, Tensor], folder: Path) -> None:
    """Raises ValueError unless the stored tensors are the model's own, all and no others."""
    if lacking := own.keys() - stored.keys():
        raise ValueError(f"{folder}: the weights lack {min(lacking)}")
    if unused := stored.keys() - own.keys():
        raise ValueError(f"{folder}: the weights have {min(unused)}, which the model does not use")
    for name, tensor in own.items():
        if (found := stored[name].shape) != (needed := tuple(tensor.shape)):
            raise ValueError(f"{folder}: {name} has shape {found}, the model calls for {needed}")


def has_own_head(stored: dict[str, Stored]) -> bool:
    """Whether an LM head is stored that is not the embedding: their beginnings tell, as training
    leaves no row as it was."""
    pair = [stored[name] for name in ("lm_head.weight", "embed_tokens.weight") if name in stored]
    size = min([CHUNK, *(math.prod(at.shape) for at in pair)])  # elements
    return len(pair) == 2 and not torch.equal(*(read_into(torch.empty(size), at) for at in pair))


def load_backbone(
    model: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu",
    head: bool = True, quantize: str = "none",
) -> Decoder | Encoder:  # fmt: skip
    """The model in a folder or of a hub id, frozen, in eval mode; it needs no tokenizer.

    head: False leaves the LM head of an untied model in the file: `logits` will not work, and
        `head_rows` reads the rows that a classifier needs.
    quantize: none, or a key of quant.KINDS: the blocks' linear layers, each as soon as it is read.

    Raises ValueError: see `read_config`; or the tensors in the files are not exactly the model's.
    """
    folder, device = resolve_folder(model), str(device)  # a torch.device is as good
    config, stored = read_config(folder), read_stored(folder)
    if getattr(config, "tie_word_embeddings", False) and has_own_head(stored):
        config = replace(config, tie_word_embeddings=False)  # as transformers 5.24 does
    with torch.device("meta"):
        backbone = (Encoder if isinstance(config, EncoderConfig) else Decoder)(config).eval()
    if isinstance(backbone, Encoder):
        stored = {name: at for name, at in stored.items() if not name.startswith(HEADS)}
    elif config.tie_word_embeddings or not head:
        stored.pop("lm_head.weight", None)
        backbone.lm_head = None
    check_fit(stored, dict(backbone.named_parameters()), folder)

    for path in [path for path, _ in backbone.named_modules()]:  # a list of modules would keep them
        module = backbone.get_submodule(path)
        quantized = quantize != "none" and path.rpartition(".")[2] in quant.TARGETS
        read_as = torch.float32 if quantized else dtype  # rounded once, not twice
        for name, parameter in list(module.named_parameters(recurse=False)):
            at = stored[f"{path}.{name}"]
            as_it_is = at.dtype == dtype and device == "cpu" and at.begin % dtype.itemsize == 0
            if isinstance(module, nn.Embedding) and as_it_is:
                # as it lies in the file, which must stay: rows that no text has take no memory
                size = parameter.numel() * dtype.itemsize  # bytes
                content = np.memmap(at.path, np.uint8, "c", at.begin, size)  # writes stay in memory
                value = torch.from_numpy(content).view(dtype).view(at.shape)
            else:  # to_empty would import sympy, a second
                value = read_into(torch.empty(parameter.shape, dtype=read_as, device=device), at)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        if quantized:
            backbone.set_submodule(path, quant.quantized(module, quantize))
    return backbone


def refill(own: dict[str, Tensor], stored: dict[str, Stored], folder: Path) -> None:
    """Other values for the model's own tensors: those stored in `folder`."""
    check_fit(stored, own, folder)
    for name, tensor in own.items():
        read_into(tensor, stored[name])


def load_adapter(folder: Path, model: Decoder | Encoder) -> None:
    """Reads a plain LoRA adapter that we or PEFT saved; where the model has none, injects it."""
    path = folder / "adapter_config.json"
    config, stored = read_json(path), read_header(folder / "adapter_model.safetensors")
    inits = True, False, None, "gaussian", "eva", "orthogonal"  # others change the base as well
    known = {"peft_type": ("LORA",)} | {k: (v, None, False) for k, v in lora.PLAIN.items()}
    known |= {"init_lora_weights": inits, "alora_invocation_tokens": (None, [])}
    for key, values in known.items():
        if config.get(key) not in values:
            raise ValueError(f"{path}: {key} = {config.get(key)!r} is not implemented")
    for key, kind, name in (("r", int, "whole number"), ("lora_alpha", (int, float), "number")):
        if not isinstance(config.get(key), kind):
            raise ValueError(f"{path}: {key} = {config.get(key)!r} must be a {name}")
    if not lora.adapters(model):
        names = {name.removeprefix(lora.prefix(model)).partition(".lora_")[0] for name in stored}
        lora.inject(model, config["r"], config["lora_alpha"], config.get("lora_dropout", 0), names)
    refill(lora.adapter_state(model), stored, folder)


@torch.no_grad()
def head_rows(model: str | Path, decoder: Decoder, ids: list[int]) -> Tensor:
    """The LM head's rows (C, D) of some tokens, divided as the logits are, in float32 at least."""
    embedding = decoder.embed_tokens.weight
    rows = embedding[ids]  # an id that is none raises here
    if not decoder.config.tie_word_embeddings:
        folder, shape = resolve_folder(model), tuple(embedding.shape)
        stored = read_stored(folder).get("lm_head.weight")
        if stored is None or stored.shape != shape:
            raise ValueError(f"{folder}: the weights lack lm_head.weight of shape {shape}")
        for row, token in zip(rows, ids):
            read_into(row, stored, token * shape[1])
    return rows.to(torch.promote_types(rows.dtype, torch.float32)) / decoder.config.logits_scaling

"""The table of methods, and Classifier: a model, a task and a method, ready to label texts.

A method is a row: what its prompt's answer is, and which head reads the scores. Axes: N texts, B
texts of a batch, C classes, D hidden.
"""

import ctypes
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from . import lora, metrics, quant
from .data import Example, Task, class_indices, load_task, replacing
from .decoder import Decoder
from .distributed import gather, rank, share, world
from .heads import SlicedHead
from .packing import common_prefix, last_hidden, length_batches
from .text import Prompt, detect_chat, load_tokenizer
from .weights import (
    head_rows,
    load_backbone,
    read_json,
    resolve_folder,
    sha256,
    weight_files,
)  # fmt: skip

WINDOW = 2048  # texts sorted by length at a time
BUDGET = {"cpu": 1024, "cuda": 16384}  # tokens a batch at inference: full kernels, warm caches
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Method:
    about: str  # one line for --help


METHODS = {
    "sliced_head": Method("the prompt ends before the class name; scores: the names' first tokens"),
}


def choose_dtype(dtype: str, device: str) -> str:
    """What "auto" means: bfloat16 where the device computes it fast, or else float32."""
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    if device.startswith("cuda"):
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = (f"_is_{feature}_supported" for feature in ("avx512_bf16", "amx_tile"))
        fast = any(getattr(torch.cpu, name, lambda: False)() for name in has)
    return "bfloat16" if fast else "float32"


def check_quantize(quantize: str, device: str) -> None:
    if quantize not in ("none", *quant.KINDS):
        known = ", ".join(quant.KINDS)
        raise ValueError(f"quantization {quantize!r} is not one of none, {known}")
    if quantize == "int8" and device != "cpu":
        raise ValueError(f"int8 runs on the cpu, not on {device}; use nf4 or bfloat16 there")


def reuse_memory() -> None:
    """Lets glibc keep the memory that tensors free, up to the peak, for the tensors to come.

    By default it returns large blocks to the system, which must clear each page anew when it is
    next touched: a tenth of a training step, a quarter of the time of a bfloat16 batch.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:  # elsewhere the allocator does as it likes
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, bytes: its largest value
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, bytes


def read_run(run: Path) -> dict:
    """The config.json of a run: settings, task, versions, hashes."""
    if not (run / "config.json").exists():
        raise ValueError(f"{run}: no such run (a folder that train.py wrote)")
    config = read_json(run / "config.json")
    if "settings" not in config:
        raise ValueError(f"{run}: not a run (its config.json has no settings)")
    return config


class Classifier:
    """One forward pass a text: prompt, last hidden state, class rows of the LM head, softmax."""

    def __init__(self, model: str, decoder: Decoder, prompt: Prompt, method: str = "sliced_head"):
        """model: the folder or hub id that the decoder came from."""
        if method not in METHODS:
            raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
        self.model, self.method, self.decoder, self.prompt = model, method, decoder, prompt
        self.task = prompt.task
        self.label_token_ids = prompt.label_token_ids()
        self.head = SlicedHead(head_rows(model, decoder, self.label_token_ids))
        self.one_by_one = False  # slower, and bitwise the same whatever other texts there are
        self._prefix: tuple[tuple, list] = ((), [])  # of which tokens and weights; keys and values
        self._unlike = [prompt.encode("a"), prompt.encode("1")]  # share the template and no more

    @classmethod
    def zero_shot(
        cls,
        model: str | Path,
        task: Task | str | Path,
        dtype: str = "auto",
        device: str = "cpu",
        method: str = "sliced_head",
        chat: str = "auto",
        max_text_tokens: int = 512,
        quantize: str = "none",
    ) -> "Classifier":
        """The pretrained model as it is. On Linux the process keeps its memory (`reuse_memory`).

        model: a folder in Hugging Face layout, or a hub id.
        task: a Task, a task.toml, or a data folder with a task.toml or a train split.
        dtype: float32, bfloat16, float64, or auto: bfloat16 where the device computes it fast.
        chat: a name in text.CHATS; auto reads it off the model's chat template.
        quantize: none, int8 (a CPU's fastest inference) or nf4 (an eighth of float32's memory).

        Raises:
            ValueError: whatever is wrong with the folder, the task or a value, and what to do.
        """
        dtype = choose_dtype(dtype, device)
        check_quantize(quantize, device)
        if device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device {device!r} is neither cpu nor cuda")
        if device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"device {device!r}: no CUDA GPU was found; use cpu")
        folder = resolve_folder(model)
        task = task if isinstance(task, Task) else load_task(Path(task))
        detected, system = detect_chat(folder) if chat == "auto" else (chat, None)
        prompt = Prompt(load_tokenizer(folder), task, detected, system, max_text_tokens)
        kind = None if quantize == "none" else quantize
        decoder = load_backbone(folder, DTYPES[dtype], device, head=False, quantize=kind)
        reuse_memory()
        if prompt.tokenizer.get_vocab_size() > decoder.config.vocab_size:
            raise ValueError(f"{folder}: the tokenizer has more tokens than the model's vocab_size")
        room = decoder.config.max_position_embeddings - len(prompt.encode(""))
        if room < max_text_tokens:
            if room < 1:
                raise ValueError(f"{model}: the prompt alone is longer than the model's context")
            prompt.max_text_tokens = room
        return cls(str(model), decoder, prompt, method)

    @classmethod
    def load(
        cls,
        run: str | Path,
        dtype: str = "auto",
        device: str = "cpu",
        model: str | Path | None = None,
        quantize: str = "auto",
    ) -> "Classifier":
        """A run folder that train.py wrote.

        dtype, quantize: see `zero_shot`; auto: those of the training.
        model: where the base model is now, if not where it was at training.
        """
        run = Path(run)
        config = read_run(run)
        settings = config["settings"]
        trained = settings.get("quantize", "none")
        quantize = trained if quantize == "auto" else quantize
        check_quantize(quantize, device)
        dtype = settings["dtype"] if (dtype, quantize) == ("auto", trained) else dtype
        dtype = choose_dtype(dtype, device)
        clf = cls.zero_shot(
            model or settings["model"],
            Task.from_dict(config["task"]),
            "float32" if quantize == "int8" else dtype,  # until the adapter is merged
            device,
            settings["method"],
            settings["chat"],
            settings["max_text_tokens"],
            "nf4" if quantize == "nf4" else "none",
        )
        for file in weight_files(resolve_folder(clf.model)):
            if config["weights_sha256"].get(file.name) != sha256(file):
                raise ValueError(f"{file}: not the weights that {run} was trained on")
        lora.load_adapter(run, clf.decoder)
        # eight bits of mantissa, or four of NF4, would swallow most of an adapter: it stays beside
        if quantize == "int8":
            lora.merge(clf.decoder)
            quant.quantize(clf.decoder.layers[:-1], "int8")  # as load_backbone does
            for parameter in clf.decoder.parameters():
                parameter.data = parameter.data.to(DTYPES[dtype])
        elif quantize == "none" and dtype != "bfloat16":
            lora.merge(clf.decoder)
        return clf

    def save(self, run: Path) -> None:
        """Writes the adapter into a run folder, in PEFT's format, each file whole or not at all.

        Of several processes, the first writes.
        """
        if rank() > 0:
            return
        state = {k: v.cpu().contiguous() for k, v in lora.adapter_state(self.decoder).items()}
        with replacing(run / "adapter_config.json") as file:
            json.dump(lora.adapter_config(self.decoder, self.model), file, indent=2)
        with replacing(run / "adapter_model.safetensors", "wb") as file:
            file.write(safetensors.torch.save(state, metadata={"format": "pt"}))

    @property
    def labels(self) -> list[str]:
        return list(self.task.labels)

    def render(self, text: str) -> str:
        """The exact prompt that the model sees."""
        return self.prompt.render(text)

    def logits(self, prompts: list[list[int]]) -> Tensor:
        """Class logits (B, C) of prompts (token ids), for training: gradients flow."""
        return self.head(last_hidden(self.decoder, prompts, len(common_prefix(prompts))))

    @torch.inference_mode()
    def window_probabilities(self, texts: list[str]) -> np.ndarray:
        """(N, C) float32; the template's shared prefix is computed once and kept."""
        prompts = [self.prompt.encode(text) for text in texts]
        shared = common_prefix(prompts + self._unlike)
        weights = (p for p in self.decoder.parameters() if not p.is_inference())  # they can change
        of = shared, [(p.data_ptr(), p._version) for p in weights]
        if of != self._prefix[0]:
            ids = torch.tensor(shared, dtype=torch.int64, device=self.head.weight.device)
            self._prefix = of, self.decoder.prefix(ids) if shared else []
        probabilities = np.empty((len(texts), len(self.task.labels)), np.float32)
        lengths = [len(p) - len(shared) for p in prompts]
        budget = BUDGET[self.head.weight.device.type]
        for rows in length_batches(lengths, len(shared), budget):
            batch = [prompts[i] for i in rows]
            hidden = last_hidden(self.decoder, batch, len(shared), self._prefix[1] or None)
            probabilities[rows] = self.head(hidden).softmax(-1).cpu().numpy()
        return probabilities

    def stream(self, texts: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (text, probabilities (C,) float32) in input order, a window of texts in memory.

        Where there are several processes, each computes its share, and each yields every row.
        """
        training = self.decoder.training
        self.decoder.eval()
        texts = iter(texts)
        try:
            while window := list(islice(texts, WINDOW * world())):
                rows = np.empty((len(window), len(self.task.labels)), np.float32)
                own = share(window)
                batches = [[text] for text in own] if self.one_by_one else [own]
                found = [self.window_probabilities(batch) for batch in batches] or [rows[:0]]
                for i, part in enumerate(gather(np.concatenate(found))):
                    rows[i :: world()] = part
                yield from zip(window, rows)
        finally:
            self.decoder.train(training)

    def predict_proba(self, texts: list[str]) -> np.ndarray:
        """Class probabilities, (N, C) float32; rows sum to 1."""
        if isinstance(texts, str):
            raise ValueError("predict takes a list of texts, not one string")
        rows = [row for _, row in self.stream(texts)]
        return np.stack(rows) if rows else np.empty((0, len(self.task.labels)), np.float32)

    def evaluate(self, examples: list[Example], name: str) -> dict:
        """`metrics.evaluate` on examples, with a progress bar; `name` says which they are."""
        truth, truncated = class_indices(examples, self.task, name), self.prompt.truncated
        rows = self.stream(example.text for example in examples)
        silent = rank() > 0 or None  # None: where the screen is a file
        bar = tqdm(rows, name, len(examples), unit=" texts", leave=False, disable=silent)
        predicted = [int(probabilities.argmax()) for _, probabilities in bar]
        result = metrics.evaluate(truth, predicted, self.labels)
        return result | {"truncated": sum(gather(self.prompt.truncated - truncated))}

    def predict(self, texts: list[str]) -> list[str]:
        """The most probable label of each text."""
        return [self.task.labels[i] for i in self.predict_proba(texts).argmax(-1)]

"""The table of methods, and Classifier: a model, a task and a method, ready to label texts.

A method is a row: how it puts a text to the model, and which head reads the answer. All the rest is
the same for all. Axes: N texts, B texts of a batch, Q prompts per text, C classes, D hidden.
"""

import ctypes
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice, takewhile, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from . import classic, lora, metrics, quant, weights
from .data import Example, Task, class_indices, load_task, replacing
from .decoder import Cache, Decoder
from .distributed import all_gather, rank, world_size
from .encoder import Encoder
from .heads import CosineHead, MLPHead, NamesHead, SlicedHead, fit_calibration
from .packing import Group, arrange, common_prefix, last_hidden, length_batches, pad, pooled_hidden
from .text import Prompt, parse

WINDOW = 2048  # prompts sorted by length at a time
BUDGET = {"cpu": 2048, "cuda": 16384}  # tokens per batch at inference: full kernels, warm caches
ROOM = 4  # tokens that a generated answer may be longer than the longest class name
SILENT = SimpleNamespace(update=lambda n: None)  # a progress bar that is none
POOLINGS, CALIBRATIONS = ("last", "mean", "first"), ("none", "contextual", "fitted")
# settings of a run that say what its classifier is
OPTIONS = ("method", "chat", "max_text_tokens", "instruction", "pooling", "bidirectional")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Method(NamedTuple):
    """How a text is put to the model, what reads the answer, and what is trained."""

    about: str  # one line for --help
    form: str  # of the prompt: a key of text.FORMS, or "n-grams"
    head: Callable[["Classifier"], nn.Module]
    trains: str = "lora"  # lora: adapters, and the head if it has weights; full: all; fit: the head
    backbones: tuple[type, ...] = (Decoder,)
    ready: bool = True  # has an answer before it is trained
    generates: str = ""  # answers, and no probabilities: "freely", or "names" of classes only


def sliced(clf: "Classifier") -> SlicedHead:
    groups = clf.prompt.label_tokens()
    clf.label_token_ids = sum(groups, [])
    rows = weights.head_rows(clf.model, clf.backbone, clf.label_token_ids)
    head = SlicedHead(torch.stack([r.mean(0) for r in rows.split([len(g) for g in groups])]))
    if clf.row.trains == "full":
        head.weight = nn.Parameter(head.weight)
    return head


def yes_no(clf: "Classifier") -> SlicedHead:
    ids = [clf.prompt.answer_ids(word)[0] for word in ("yes", "no")]
    yes, no = weights.head_rows(clf.model, clf.backbone, ids).split(1)
    return SlicedHead(yes - no)


def whole_names(clf: "Classifier") -> NamesHead:
    rows = weights.head_rows(clf.model, clf.backbone, sum(names := clf.prompt.name_ids(), []))
    return NamesHead(clf.backbone.logits, rows, names, clf.row.generates == "names")


def mlp(clf: "Classifier") -> MLPHead:
    return MLPHead(clf.backbone.config.hidden_size, len(clf.labels))


def cosine(clf: "Classifier") -> CosineHead:
    clf.class_groups = [[ids] for ids in clf.prompt.class_ids]
    if len({*map(tuple, clf.prompt.class_ids)}) < len(clf.labels):
        raise ValueError("two classes are the same tokens: give them meanings in task.toml")
    return CosineHead(len(clf.labels))


def fitted(head: type[classic.Fitted]) -> Callable[["Classifier"], classic.Fitted]:
    return lambda clf: head(len(clf.labels))


ANY = (Decoder, Encoder)
AT_ONCE = dict(trains="fit", backbones=ANY, ready=False)
WHOLE = dict(form="names", head=whole_names)
METHODS = {
    "sliced_head": Method("LM head's rows of the class names' first tokens", "names", sliced),
    "letters": Method("the letters' rows, where classes stand behind A, B, C", "letters", sliced),
    "whole_names": Method("log-probability of each whole class name", **WHOLE),
    "hidden_mlp": Method("last hidden state of the prompt, MLP", "names", mlp, ready=False),
    "embedding_mlp": Method("text's embedding, MLP", "embedding", mlp, backbones=ANY, ready=False),
    "encoder_mlp": Method("encoder, MLP", "embedding", mlp, backbones=(Encoder,), ready=False),
    "similarity": Method("cosine to the class descriptions", "embedding", cosine, backbones=ANY),
    "pairs": Method("one yes-no question per class, as rerankers", "pairs", yes_no),
    "generate": Method("greedy decoding, then parsing", generates="freely", **WHOLE),
    "generate_constrained": Method("greedy decoding of class names", generates="names", **WHOLE),
    "nearest": Method("nearest neighbours", "embedding", fitted(classic.Nearest), **AT_ONCE),
    "prototypes": Method("class means", "embedding", fitted(classic.Prototypes), **AT_ONCE),
    "logistic": Method("logistic regression", "embedding", fitted(classic.Logistic), **AT_ONCE),
    "tfidf": Method("TF-IDF and a linear SVM", "n-grams", fitted(classic.Tfidf), **AT_ONCE),
    "full": Method("sliced_head with every weight trained", "names", sliced, "full"),
}  # fmt: skip


def choose_dtype(dtype: str, device: str) -> str:
    """What "auto" means: bfloat16 where the device computes it fast, or else float32."""
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def tune() -> None:
    """Settings of the whole process, to be called before the first product.

    glibc returns large freed blocks to the system, which clears their pages again: 1/10 of a step.
    To look up the addresses of its 4 KB pages takes 1/12: 2 MB instead. oneDNN keeps 1,024 kernels
    of 0.7 MB, dozens for each number of tokens: 128 are enough. cuDNN's attention plans anew for
    each shape of a batch, half of a step: it is turned off.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # it is glibc
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, bytes: its largest value
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-2, 1 << 30)  # M_TOP_PAD: once, the heap grows by 1 GB (of addresses)
        libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
        begin, block, end = libc.sbrk(0), libc.malloc(31 << 20), libc.sbrk(0)
        libc.free(ctypes.c_void_p(block))
        libc.mallopt(-2, 128 << 10)  # as it was
        size = ctypes.c_size_t(end - begin)
        libc.madvise(ctypes.c_void_p(begin), size, 14)  # MADV_HUGEPAGE


def read_run(run: Path) -> dict:
    """The config.json of a run: settings, task, versions, hashes."""
    path = run / "config.json"
    config = weights.read_json(path) if path.exists() else {}
    known = {*config, *(config.get("settings") or ())}
    if not {"task", "weights_sha256", "model", "data", "dtype", "quantize", *OPTIONS} <= known:
        raise ValueError(f"{run}: no run there (a folder of train.py's, with all its settings)")
    return config


class Classifier:
    """One forward pass per text: prompt, hidden state, class scores, softmax."""

    def __init__(self, model: str, backbone: nn.Module, prompt: Prompt, method: str, pooling: str):
        """model: the backbone's folder or hub id; "", with nn.Identity: there is none (n-grams)."""
        self.model, self.method, self.backbone, self.prompt = model, method, backbone, prompt
        self.task, self.pooling = prompt.task, pooling
        self.labels, self.render = list(prompt.task.labels), prompt.render
        weight = next(backbone.parameters(), torch.empty(0))  # of n-grams there is none
        self.device, wide = str(weight.device), torch.promote_types(weight.dtype, torch.float32)
        # whether what prompts begin with can run once: nothing after it changes it
        self.shares = isinstance(backbone, Decoder) and backbone.causal and pooling == "last"
        self.label_token_ids: list[int] = []
        self.class_groups: list[Group] = []  # prompts of the classes, where texts are compared
        self.head = self.row.head(self).to(self.device, wide)
        self.nodes: Group = getattr(self.head, "nodes", [])  # beginnings of answers that it reads
        self.modules = nn.ModuleDict({"backbone": backbone, "head": self.head}).eval()
        self.calibration: dict[str, Tensor] = {}  # scale () and bias (C,) of the logits
        self.one_by_one = False  # slower, and bitwise the same whatever other texts there are
        self.ready = self.row.ready  # has an answer
        self.unparsed: Counter[str] = Counter()  # answers generated that name no class
        self._cached: tuple[list, Cache | None, Tensor | None] | None = None
        template = common_prefix(prompt.branches("a") + prompt.branches("1"))
        self._template = template if self.shares else []
        prompt.truncated = 0

    row = property(lambda self: METHODS[self.method])  # a copy of it could not be pickled

    @classmethod
    def zero_shot(
        cls, model: str | Path, task: Task | str | Path, dtype: str = "auto", device: str = "cpu",
        method: str = "sliced_head", chat: str = "auto", max_text_tokens: int = 512,
        quantize: str = "none", instruction: str = "auto", pooling: str = "auto",
        bidirectional: bool = False,
    ) -> "Classifier":  # fmt: skip
        """The pretrained model as it is. The process is tuned (see `tune`).

        model: a folder in Hugging Face layout, or a hub id.
        task: a Task, a task.toml, or a data folder with a task.toml or a train split.
        dtype: float32, bfloat16, float64, or auto: bfloat16 where the device computes it fast.
        device: cpu, cuda, or one of several GPUs, as cuda:1. method: a key of METHODS.
        chat: a name in text.CHATS; auto reads it off the model's chat template.
        max_text_tokens: longer texts are cut at their end; at most what the context has room for.
        quantize: none, int8 (fastest on x86 CPUs, with AMX only if compiled; it is read in
            float32) or nf4 (the blocks' linear layers in an eighth of float32's memory).
        instruction: in place of the method's own (auto); "none": no instruction.
        pooling: of embeddings: last, mean or first token; auto: last for decoders; for encoders
            as sentence-transformers' 1_Pooling/config.json has it, or else mean.
        bidirectional: each token of a decoder sees the whole text, as in an encoder.

        Raises ValueError: whatever is wrong with the folder, the task or a value, and what to do.
        """
        tune()
        dtype = choose_dtype(dtype, device := str(device))  # a torch.device is as good
        quant.check(quantize, device)
        if method not in METHODS:
            raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
        if pooling not in ("auto", *POOLINGS):
            raise ValueError(f"pooling {pooling!r} is not one of auto, {', '.join(POOLINGS)}")
        row, task = METHODS[method], task if isinstance(task, Task) else load_task(Path(task))
        if pooling != "auto" and row.form != "embedding":
            raise ValueError(f"pooling is for methods that embed texts; {method} reads an answer")
        if task.shots and row.form not in ("names", "letters"):
            raise ValueError(f"shots: the prompt of {method} has no place for examples")
        whole = row.head is whole_names  # reads the whole LM head, after each beginning of a name
        if bidirectional and (row.form not in ("names", "letters", "embedding") or whole):
            raise ValueError(f"bidirectional: {method} has no attention, or needs a causal one")
        if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
            raise ValueError(f"device {device!r} is neither cpu nor a cuda GPU that PyTorch finds")
        if row.form == "n-grams":
            return cls("", nn.Identity(), classic.NGrams(task), method, "last")

        folder = weights.resolve_folder(model)
        # int8 comes last, from float32
        kind, first = ("none", "float32") if quantize == "int8" else (quantize, dtype)
        backbone = weights.load_backbone(folder, DTYPES[first], device, whole, kind)
        if not isinstance(backbone, row.backbones):
            needed, found = row.backbones[0].__name__.lower(), type(backbone).__name__.lower()
            raise ValueError(f"{method} needs a model of kind {needed}; {folder}: {found}")
        encodes = isinstance(backbone, Encoder)
        backbone.causal = not (encodes or bidirectional)
        if pooling == "first" and backbone.causal:
            raise ValueError("pooling first: a causal decoder's first token has seen no text")
        form = "e5" if encodes else row.form
        prompt = Prompt(folder, task, chat, max_text_tokens, form, instruction)
        if max(prompt.tokenizer.get_vocab().values()) >= backbone.config.vocab_size:
            raise ValueError(f"{folder}: the tokenizer has more tokens than the model's vocab_size")
        if pooling == "auto":
            pooling = weights.read_pooling(folder) if encodes else "last"
        clf = cls(str(model), backbone, prompt, method, pooling)
        longest = max(map(len, prompt.branches(""))) + max(map(len, clf.nodes), default=0)
        context = backbone.config.max_position_embeddings
        room = context - longest - ROOM * bool(row.generates)
        if not longest:
            raise ValueError(f"{model}: an empty text would have no token; give an instruction")
        if room < 1 or max(map(len, chain(*clf.class_groups)), default=0) > context:
            remedy = "use a shorter instruction or meanings, or fewer shots; or list no classes"
            raise ValueError(f"{model}: the prompt exceeds the context of {context}; {remedy}")
        prompt.max_text_tokens = min(room, max_text_tokens)
        if quantize == "int8":
            clf.quantize_int8(DTYPES[dtype])
        return clf

    @classmethod
    def load(
        cls, run: str | Path, dtype: str = "auto", device: str = "cpu",
        model: str | Path | None = None, quantize: str = "auto",
    ) -> "Classifier":  # fmt: skip
        """A run folder that train.py wrote.

        dtype, quantize: see `zero_shot`; auto: the training's (with another quantize: zero_shot's).
        model: where the base model is now. Raises ValueError if it is another, or run is no run.
        """
        config = read_run(run := Path(run))
        settings, trained = config["settings"], config["settings"]["quantize"]
        quantize = trained if quantize == "auto" else quantize
        if quantize == "nf4" and METHODS[settings["method"]].trains == "full":
            raise ValueError(f"{run}: every weight was trained: nf4 is for runs with adapters")
        dtype = settings["dtype"] if (dtype, quantize) == ("auto", trained) else dtype
        dtype = choose_dtype(dtype, str(device))
        model, task = model or settings["model"], Task.from_dict(config["task"])
        given = {name: settings[name] for name in OPTIONS}
        kind, first = ("none", "float32") if quantize == "int8" else (quantize, dtype)
        clf = cls.zero_shot(model, task, first, device, quantize=kind, **given)
        now = weights.hashes(clf.model) | vars(clf.backbone.config) if clf.model else {}
        if odd := (config["weights_sha256"] | config.get("architecture", {})).items() - now.items():
            raise ValueError(f"{clf.model}: not the {min(odd)[0]} that {run} was trained with")
        prompt = {"prompt": clf.render(""), "prompt_ids": str(clf.prompt.branches(""))}
        if any(config.get(key, now) != now for key, now in prompt.items()):
            raise ValueError(f"{clf.model}: the prompt is not {run}'s; is its chat template there?")
        clf.restore(run)
        clf.merge()
        if quantize == "int8" and clf.model:  # last: from float32
            clf.quantize_int8(DTYPES[dtype])
        return clf

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name: adapters, or all; and the head's own."""
        return {name: p for name, p in self.modules.named_parameters() if p.requires_grad}

    def save(self, run: Path) -> None:
        """Writes what was trained (of a loaded run: unmerged adapters, head), all files or none."""
        if rank() > 0:  # of several processes, the first writes
            return
        files, states = {}, {"head": self.head.state_dict(), "calibration": self.calibration}
        if lora.adapters(self.backbone):
            states["adapter_model"] = lora.adapter_state(self.backbone)
            config = lora.adapter_config(self.backbone, self.model)
            files["adapter_config.json"] = json.dumps(config, indent=2).encode()
        if self.row.trains == "full" and next(self.backbone.parameters()).requires_grad:
            own = self.backbone.state_dict().items()  # under transformers' names (but Granite 4's)
            states["model"] = {"model." * ("lm_head" not in k) + k: v for k, v in own}
        for name, state in states.items():
            if state:
                state = {key: tensor.cpu().contiguous() for key, tensor in state.items()}
                files[f"{name}.safetensors"] = save(state, metadata={"format": "pt"})
        with ExitStack() as stack:  # they belong together: all are written before one is replaced
            for name, content in files.items():
                file = stack.enter_context(replacing(run / name, "wb"))
                file.write(content)
                file.flush()

    def restore(self, run: Path) -> None:
        """Reads back what `save` wrote."""
        if self.row.trains == "lora":
            weights.load_adapter(run, self.backbone)
        if self.row.trains == "full":
            weights.refill(dict(self.backbone.named_parameters()), weights.read_stored(run), run)
        files = run / "head.safetensors", run / "calibration.safetensors"
        try:
            new, self.calibration = (load_file(f, self.device) if f.exists() else {} for f in files)
        except SafetensorError as error:
            raise ValueError(f"{run}: its head or calibration is damaged: {error}") from None
        own = self.head.state_dict(keep_vars=True)
        if own.keys() != new.keys():
            raise ValueError(f"{run}: its head has {list(new)}, the method needs {list(own)}")
        for key, tensor in new.items():
            own[key].data = tensor
        self.ready = True

    def merge(self) -> None:
        """Merges the adapters, for speed, unless rounding would take a quarter of them."""
        if lora.rounded_away(self.backbone) < 1 / 4:
            lora.merge(self.backbone)

    def hidden(self, groups: list[Group], shared: int, cache: Cache | None = None) -> Tensor | list:
        """What the head reads of each text: (B, Q, D), see `packing.last_hidden`, or n-grams."""
        if not self.model:
            return [ids for (ids,) in groups]
        if self.shares:
            batch = arrange(groups, shared, cache is not None, self.nodes)
            hidden = last_hidden(self.backbone, batch, cache)
        else:
            hidden = pooled_hidden(self.backbone, groups, self.pooling)
        return hidden.float() if self.row.trains == "fit" else hidden

    def logits(self, groups: list[Group]) -> Tensor:
        """Class logits (B, C) of texts' prompts (`Prompt.branches`), for training."""
        return self.head(torch.cat([self.hidden(*part) for part in self.parts(groups)]))

    def parts(self, groups: list[Group]) -> list[tuple[list[Group], int]]:
        """What a training pass reads: the texts, and the classes where these are compared with
        them; each with the number of tokens that all its prompts begin with."""
        self._cached = None  # a fused optimizer changes weights unseen by `versions`
        parts = [part for part in (groups, self.class_groups) if part]
        return [(part, len(common_prefix([*chain(*part)]))) for part in parts]

    def arrange(self, groups: list[Group]) -> list[list[Tensor]]:
        """A training batch for `score`, as tensors of few distinct shapes."""
        return [arrange(*part, nodes=self.nodes, rounded=True) for part in self.parts(groups)]

    def score(self, batches: list[list[Tensor]]) -> Tensor:
        """`logits` of an arranged batch, by operations that its shapes alone decide."""
        hidden = [last_hidden(self.backbone, batch, packed=False) for batch in batches]
        return self.head(torch.cat(hidden))

    def cached(self) -> tuple[Cache | None, Tensor | None]:
        """The cache of what all prompts begin with, and the class vectors: computed once."""
        if self._cached is None or self._cached[0] != self.versions():
            cache = None
            if self._template:
                _, cache = self.backbone.extend(pad([self._template]).to(self.device))
            classes = self.hidden(self.class_groups, 0) if self.class_groups else None
            self._cached = self.versions(), cache, classes
        return self._cached[1:]

    def versions(self) -> list[tuple[int, int]]:
        """What tells whether a weight has changed; through .data one changes unseen."""
        parameters = (p for p in self.modules.parameters() if not p.is_inference())
        return [(p.data_ptr(), p._version) for p in parameters]

    @torch.no_grad()
    def quantize_int8(self, dtype: torch.dtype) -> None:
        """The blocks' linear layers in int8, adapters merged, all else in `dtype`; for inference.

        What serves all texts is computed before: an error there would reach every text. A decoder's
        last block stays: few tokens pass most of it, and no later one evens out its errors.
        """
        lora.merge(self.backbone)
        cache, classes = self.cached()
        blocks = self.backbone.layers[: -1 if isinstance(self.backbone, Decoder) else None]
        if len(self._template) > 16:  # enough tokens to go by
            quant.smooth(blocks, lambda: self.backbone.extend(pad([self._template])))
        for block in blocks:
            quant.quantize(block, "int8")
        for parameter in self.backbone.parameters():
            parameter.data = parameter.data.to(dtype)
        cache = cache and cache._replace(kv=[(k.to(dtype), v.to(dtype)) for k, v in cache.kv])
        self._cached = self.versions(), cache, classes

    def compile(self, training: bool = False) -> None:
        """torch.compile of the blocks, at their first run, but for those that need another graph:
        the last, which returns few tokens, and in training the first, whose input has no gradient.

        A graph is compiled for one number of tokens, then for any. On a CPU it is called from C++:
        calls from Python take another 4% of a step.
        """
        if os.name == "posix" and not shutil.which(os.environ.get("CXX", "g++")):
            raise ValueError("compiling needs a C++ compiler: install g++, or name yours in CXX")
        for block in self.backbone.layers[training:-1] if self.model else ():
            block.compile(options={"cpp_wrapper": self.device == "cpu"})

    @torch.inference_mode()
    def window(self, texts: list[str], read="probabilities", bar=SILENT) -> Tensor:
        """A row per text (N, ...): its "probabilities", "logits" (uncalibrated) or "hidden"."""
        if self.modules.training:  # its step may have had no example here: see `parts`
            self._cached = None
        self.modules.eval()  # and so it stays
        groups = [self.prompt.branches(text) for text in texts]
        decodes = self.row.generates == "freely" and read == "probabilities"
        cache, classes = self.cached()
        # less than the template where a text merges with its end; -1: what common_prefix drops
        shared = len(common_prefix([*chain(*groups), [*self._template, -1]]))
        cache = cache and cache.first(shared)
        parts, order, c = [], [], self.calibration
        budget = BUDGET[self.device.partition(":")[0]]
        budget = min(budget, 2048) if self.nodes else budget  # each has V logits, in float32
        copied = shared if decodes or not (cache and cache.serves_all()) else 0
        keys = 4 if decodes else 16  # those of all blocks are kept, or of one at a time
        for rows in length_batches(groups, shared, copied, budget, len(self.nodes), keys):
            batch = [groups[i] for i in rows]
            part = (self.generate if decodes else self.hidden)(batch, shared, cache)
            if read != "hidden" and not decodes:
                part = self.head(part if classes is None else torch.cat([part, classes]))
                if read == "probabilities":
                    part = (part * c.get("scale", 1) + c.get("bias", 0)).softmax(-1)
            parts.append(part)
            order += rows
            bar.update(len(rows))
        return torch.cat(parts)[torch.tensor(order, device=parts[0].device).argsort()]

    def generate(self, groups: list[Group], shared: int, cache: Cache | None) -> Tensor:
        """One-hot rows (B, C): the class that greedy decoding names, or zeros; as for `hidden`."""
        words, names, decoder = self.task.words, self.prompt.name_ids(), self.backbone
        ids = pad([prompt[shared:] for (prompt,) in groups]).to(self.device)
        steps, ended = [], torch.zeros(len(ids), dtype=torch.bool, device=self.device)
        # a base model, which a new line ends, may say that the document ends
        added = self.prompt.tokenizer.get_added_tokens_decoder().items()
        stops = {names[0][-1], *(i for i, token in added if token.special)}
        for _ in range(max(map(len, names)) + ROOM):
            hidden, cache = decoder.extend(ids, cache)
            hidden = hidden[torch.arange(len(ids)), (ids >= 0).sum(1) - 1]  # (B, D), the last's
            steps.append(decoder.logits(hidden).argmax(-1))  # (B,)
            ended |= torch.isin(steps[-1], torch.tensor([*stops], device=self.device))
            if ended.all():
                break
            ids = steps[-1][:, None]
        rows = torch.zeros(len(ids), len(words), device=self.device)
        for row, answer in zip(rows, torch.stack(steps, 1).tolist()):
            answer = [*takewhile(lambda token: token not in stops, answer)]
            text = self.prompt.tokenizer.decode(answer).strip()
            if (index := parse(text, words)) is None:
                self.unparsed[text] += 1
            else:
                row[index] = 1
        return rows

    def stream(self, texts: Iterable[str], read="probabilities", bar=SILENT) -> Iterator[tuple]:
        """Yields (text, probabilities (C,) float32) in input order, a window of texts in memory.

        read: see `window`. bar: updated with every batch.
        A method that generates yields 1 for its answer, or zeros where that names no class.
        Of several processes, each computes its share, and each yields every row.
        Raises ValueError where the method's head is yet to be trained, or scores are NaN.
        """
        if isinstance(texts, (str, dict)) or hasattr(texts, "columns"):
            raise ValueError(f"a classifier takes a list of texts, not a {type(texts).__name__}")
        if read == "probabilities" and not self.ready:
            raise ValueError(f"{self.method} has no zero-shot form: train it first, with train.py")
        texts, asked = iter(texts), len(self.prompt.branches(""))  # prompts per text
        while window := list(islice(texts, max(1, WINDOW // asked) * world_size())):
            if odd := [text for text in window if not isinstance(text, str)]:
                raise ValueError(f"a text is a string, which {odd[0]!r} is not")
            own = window[rank() :: world_size()]
            parts = [[text] for text in own] if self.one_by_one else [own]
            with torch.autocast(self.device.partition(":")[0], enabled=False):  # whoever calls
                found = [self.window(p, read, bar).float().cpu().numpy() for p in parts if p]
            bar.update(len(window) - len(own))  # the other processes' texts
            if any(np.isnan(rows).any() for rows in found):
                raise ValueError("the scores are not numbers; was --lr too high in training?")
            turns = zip_longest(*all_gather([*chain(*found)]))  # the processes' rows, as shared out
            yield from zip(window, chain(*turns))

    def predict_proba(self, texts: list[str]) -> np.ndarray:
        """Class probabilities, (N, C) float32; rows sum to 1.

        Raises ValueError where the method generates an answer, and has no probabilities.
        """
        if self.row.generates:
            raise ValueError(f"{self.method} gives answers without probabilities: use predict")
        rows = [row for _, row in self.stream(texts)]
        return np.array(rows, np.float32).reshape(-1, len(self.labels))

    def predict(self, texts: list[str]) -> list[str | None]:
        """The most probable label of each text; None where a generated answer names no class."""
        return [self.label(row) for _, row in self.stream(texts)]

    def label(self, row: np.ndarray) -> str | None:
        """The label of a row of `stream`."""
        return self.task.labels[int(row.argmax())] if row.any() else None

    def rows(self, examples: list[Example], name: str, read="probabilities") -> np.ndarray:
        """What `stream` yields of each example, (N, ...), with a progress bar."""
        if not examples:
            raise ValueError(f"{name}: there are no examples")
        quiet = rank() > 0 or None  # None: where stderr is no terminal
        with tqdm(desc=name, total=len(examples), leave=False, unit=" texts", disable=quiet) as bar:
            return np.array([row for _, row in self.stream((e.text for e in examples), read, bar)])

    def evaluate(self, examples: list[Example], name: str) -> dict:
        """`metrics.evaluate` on examples, with a progress bar; `name` says which they are."""
        truth, truncated = class_indices(examples, self.task, name), self.prompt.truncated
        before = self.unparsed.copy()
        rows = self.rows(examples, name)  # (N, C)
        predicted = np.where(rows.any(1), rows.argmax(1), -1)
        result = metrics.evaluate(truth, predicted, self.labels)
        result |= {"truncated": sum(all_gather(self.prompt.truncated - truncated))}
        if self.row.generates == "freely":
            answers = sum(all_gather(self.unparsed - before), Counter())
            result["empty_answers"] = answers.pop("", 0)
            result["invented"] = answers.total()
            first = sorted(answers.items(), key=lambda found: (-found[1], found[0]))[:10]
            result["most_frequent_inventions"] = dict(first)  # in an order that no resuming changes
        return result

    def fit(self, train: list[Example], validation: list[Example]) -> None:
        """Fits a head that is not trained by steps."""
        data = []
        for name, examples in (("train", train), ("validation", validation)):
            if self.model:
                x = torch.tensor(self.rows(examples, f"embed {name}", "hidden"), device=self.device)
            else:
                x = [ids for example in examples for ids in self.prompt.branches(example.text)]
            data += [x, torch.tensor(class_indices(examples, self.task, name), device=self.device)]
        self.head.fit(*data)
        self.ready = True

    def calibrate(self, kind: str, validation: list[Example]) -> None:
        """Sets the calibration: contextual (from a text without content), or fitted."""
        if kind not in CALIBRATIONS[1:]:
            raise ValueError(f"calibration {kind!r} is neither contextual nor fitted")
        if self.row.generates or not self.ready:
            raise ValueError(f"{self.method} has no probabilities to calibrate (yet)")
        if kind == "contextual":  # without content all classes are alike (Zhao et al. 2021)
            self.calibration = {"bias": -self.window(["N/A"], "logits")[0].log_softmax(-1)}
        else:
            logits = self.rows(validation, "calibrating", "logits")
            data = logits, class_indices(validation, self.task, "validation")
            self.calibration = fit_calibration(*(torch.tensor(x, device=self.device) for x in data))

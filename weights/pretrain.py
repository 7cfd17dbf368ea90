"""Pretrain the bundled model from an archive of Wikipedia, on a laptop's CPU or a GPU.

    python weights/pretrain.py x_transformers-2.16.1.tar.gz --out weights/a --minutes 80

The archive (or enwik8.gz itself, or enwik8) holds 100 MB of English Wikipedia's markup. Most of the
training rows are its articles, stripped to text. The others (--prompts) are laid out as a
classifier's prompts: the class list shows some articles' Wikipedia categories, sentences of these
articles follow, each with its own category as the answer. So the model has seen what a class list
is for before anyone fine-tunes it. --topics adds to the embedding what tokens are about, from their
co-occurrence. Matrices are trained with Muon (Jordan et al. 2024), the rest with AdamW.

The budget is wall time, --minutes: the learning rate is constant and falls to zero over the last
40%.
"""

import argparse
import gzip
import html
import json
import random
import re
import sys
import tarfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minislm.decoder import Decoder, DecoderConfig  # noqa: E402
from minislm.weights import load_backbone  # noqa: E402

CONFIG = DecoderConfig(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rope_theta=1e4,
    max_position_embeddings=2048,
)
LENGTH = 256  # tokens per row
END = "<|endoftext|>"
SPECIAL = [END, "<|im_start|>", "<|im_end|>"]


def read_enwik8(path: Path) -> str:
    """The dump's XML, from the tar archive, the gzip file or the plain file."""
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as tar:
            member = next(m for m in tar if m.name.endswith("enwik8.gz"))
            data = gzip.decompress(tar.extractfile(member).read())
    else:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8", errors="ignore")  # the dump is cut at 100 MB, inside a character


def strip_markup(text: str) -> str:
    """Wiki markup to plain paragraphs."""
    text = html.unescape(html.unescape(text))
    text = re.sub(r"<!--.*?-->|<(ref|math|gallery|timeline)[^>]*>.*?</\1>", " ", text, flags=re.S)
    for opening, closing in (("{{", "}}"), ("{|", "|}")):
        inner = re.compile(
            f"{re.escape(opening)}(?:(?!{re.escape(opening)}|{re.escape(closing)}).)*"
            f"{re.escape(closing)}",
            re.S,
        )
        for _ in range(4):  # nesting
            text = inner.sub(" ", text)
    text = re.sub(r"<[^<>]{1,200}>", " ", text)
    for _ in range(2):  # links inside picture captions
        text = re.sub(
            r"\[\[(?:[^\[\]|]*:[^\[\]]*|[^\[\]]*\|)?([^\[\]|]*)\]\]",
            lambda m: "" if ":" in m[0].split("|")[0] else m[1],
            text,
        )
    text = re.sub(r"\[\w+:[^\s\]]+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|__\w+__", "", text)
    lines = []
    for line in text.splitlines():
        line = re.sub(r"\s+", " ", re.sub(r"^[*#:;]+|^=+|=+$", "", line.strip())).strip()
        if line and not line.startswith(("|", "!", "{")):
            lines.append(line)
    return "\n".join(lines)


def read_articles(xml: str) -> list[tuple[str, str, list[str]]]:
    """(title, text, categories) of every article that is more than a redirect or a census table."""
    articles = []
    pages = re.findall(r"<title>([^<]*)</title>.*?<text[^>]*>(.*?)</text>", xml, re.S)
    for title, raw in tqdm(pages, "reading articles", unit="page"):
        if raw.lstrip().lower().startswith("#redirect") or re.match(r"\w+:\w", title):
            continue
        if "[[United States Census Bureau]]" in raw:  # thousands of towns, one template
            continue
        categories = [
            c.split("|")[0].strip() for c in re.findall(r"\[\[Category:([^\]]+)\]\]", raw)
        ]
        text = strip_markup(raw)
        if len(text) > 400:
            articles.append((html.unescape(title), text, categories))
    return articles


def train_tokenizer(articles) -> Tokenizer:
    """Byte-level BPE; digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = (text if i % 3 else text.lower() for i, (_, text, _) in enumerate(articles))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def topics(articles) -> dict[str, list[int]]:
    """Category -> its articles, for categories that name a topic, not a year or a chore."""
    by_topic: dict[str, list[int]] = {}
    for i, (_, _, categories) in enumerate(articles):
        for name in categories:
            if not re.search(r"\d|births|deaths|stub|articles|Wikipedia|List|[Pp]eople", name):
                by_topic.setdefault(name.lower(), []).append(i)
    return {name: members for name, members in by_topic.items() if len(members) >= 3}


class PromptRows:
    """Rows of (ids, weights) laid out as the classifier's prompt for base models."""

    def __init__(self, articles, tokenizer: Tokenizer, rng: random.Random):
        self.articles, self.tokenizer, self.rng = articles, tokenizer, rng
        self.topics = topics(articles)
        self.names = sorted(self.topics)

    def sentence(self, article: int) -> str:
        """One to three sentences from anywhere in the article, half of the time in lower case."""
        sentences = re.findall(r"[^.!?\n]{25,300}[.!?]", self.articles[article][1])
        if not sentences:
            return self.articles[article][1][:150].replace("\n", " ")
        at = self.rng.randrange(len(sentences))
        text = "".join(sentences[at : at + self.rng.choice([1, 1, 1, 2, 3])]).strip()
        return text.lower() if self.rng.random() < 0.5 else text

    def meaning(self, name: str) -> str:
        members = self.topics[name]
        return ", ".join(
            self.articles[i][0] for i in self.rng.sample(members, min(3, len(members)))
        )

    def row(self) -> tuple[list[int], list[float]]:
        rng = self.rng
        names = rng.sample(self.names, rng.randint(3, 8))
        listing = f" {', '.join(names)}"
        if rng.random() < 0.4:  # with a meaning each: the titles of some of the topic's articles
            listing = "".join(f"\n- {name}: {self.meaning(name)}" for name in names)
        ids = self.tokenizer.encode(f"Classes:{listing}\n").ids
        weights = [0.0] * len(ids)  # the list is drawn at random: nothing to predict
        while len(ids) < LENGTH + 1:
            name = rng.choice(names)
            text = self.tokenizer.encode(
                f"\nText: {self.sentence(rng.choice(self.topics[name]))}\nClass:"
            ).ids
            answer = self.tokenizer.encode(f" {name}\n").ids
            ids += text + answer
            weights += [1.0] * len(text) + [4.0] * len(answer)
        return ids[: LENGTH + 1], weights[: LENGTH + 1]


def encode(articles, tokenizer: Tokenizer) -> list[list[int]]:
    """The articles' token ids, every fourth article in lower case."""
    texts = [text if i % 4 else text.lower() for i, (_, text, _) in enumerate(articles)]
    encoded = [e.ids for e in tokenizer.encode_batch([f"{t}{END}" for t in texts])]
    print(f"{len(articles):,} articles, {sum(map(len, encoded)):,} tokens")
    return encoded


def batches(articles, encoded, tokenizer: Tokenizer, rows: int, prompts: float, seed: int):
    """Endless (ids, weights) of shape (rows, LENGTH + 1), reshuffled each epoch."""
    rng = random.Random(seed)
    encoded = list(encoded)
    prompt_rows = PromptRows(articles, tokenizer, rng)
    print(
        f"{len(prompt_rows.names):,} topics, such as {', '.join(rng.sample(prompt_rows.names, 8))}"
    )
    n_prompts = round(rows * prompts)
    while True:
        rng.shuffle(encoded)
        stream = np.concatenate([np.asarray(e, np.int64) for e in encoded])
        stream = stream[rng.randrange(LENGTH) :]
        plain = stream[: len(stream) // LENGTH * LENGTH - LENGTH + 1]
        starts = list(range(0, len(plain) - LENGTH, LENGTH))
        rng.shuffle(starts)
        for at in range(0, len(starts) - rows, rows - n_prompts):
            ids = [plain[s : s + LENGTH + 1].tolist() for s in starts[at : at + rows - n_prompts]]
            weights = [[1.0] * (LENGTH + 1) for _ in ids]
            for _ in range(n_prompts):
                row_ids, row_weights = prompt_rows.row()
                ids.append(row_ids)
                weights.append(row_weights)
            yield torch.tensor(ids), torch.tensor(weights)


def save(model: Decoder, tokenizer: Tokenizer, out: Path, about: dict) -> None:
    """A Hugging Face folder: config.json, model.safetensors (bfloat16), tokenizer.json."""
    out.mkdir(parents=True, exist_ok=True)
    c = asdict(model.config)
    del c["qk_norm"], c["qkv_bias"]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": 0,
        **c,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {
        f"model.{k}": v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    (out / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}, indent=2) + "\n")
    (out / "pretraining.json").write_text(json.dumps(about, indent=2) + "\n")


def topic_vectors(encoded: list[list[int]], size: int, window: int = 48) -> tuple[Tensor, Tensor]:
    """What tokens are about: unit vectors (V, size), and inverse document frequencies (V,).

    Positive pointwise mutual information of two tokens in one window, context counts to the power
    3/4, factored by a truncated SVD (Levy, Goldberg & Dagan 2015).
    """
    from scipy.sparse import csr_matrix  # only here: the extra "pretrain"

    windows = [
        np.unique(ids[i : i + window]) for ids in encoded for i in range(0, len(ids), window)
    ]
    rows = np.repeat(np.arange(len(windows)), [len(w) for w in windows])
    ones = np.ones(len(rows), np.float32)
    shape = len(windows), CONFIG.vocab_size
    present = csr_matrix((ones, (rows, np.concatenate(windows))), shape=shape)
    counts = torch.from_numpy((present.T @ present).toarray())  # (V, V)
    frequency = counts.diagonal().clone()
    counts.fill_diagonal_(0)
    total = counts.sum(1)
    context = total**0.75 / (total**0.75).sum()
    pmi = (counts / (total[:, None] * context).clamp(min=1e-9)).log().clamp(min=0)
    u, s, _ = torch.svd_lowrank(pmi, q=size + 44, niter=4)
    vectors = F.normalize(u[:, :size] * s[:size].sqrt(), dim=1)
    return vectors, (len(windows) / (1 + frequency)).log().clamp(min=0)


@torch.no_grad()
def add_topics(embedding: Tensor, encoded: list[list[int]]) -> None:
    """Adds topic vectors to an embedding (V, D): turned to lie as it does, and of its size.

    A language model's embedding says above all how a token is used; with little text it says
    little of what the token is about, which is what a classifier asks. Rare tokens weigh more.
    """
    vectors, idf = topic_vectors(encoded, embedding.shape[1])
    vectors = vectors - vectors.mean(0)
    u, _, v = torch.linalg.svd(vectors.T @ (embedding - embedding.mean(0)))  # Procrustes
    vectors = vectors @ u @ v * idf[:, None]
    embedding += vectors * embedding.pow(2).mean().sqrt() / vectors.pow(2).mean().sqrt()


def initial_model(init: Path | None) -> Decoder:
    """Random weights, every block beginning as the identity; or an earlier model's."""
    if init:
        return load_backbone(init).requires_grad_(True)
    model = Decoder(CONFIG)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight)
        elif weight.ndim == 2:
            embedding = name.startswith("embed")
            torch.nn.init.normal_(weight, std=0.02 if embedding else weight.shape[1] ** -0.5)
    return model


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("archive", type=Path)
    p.add_argument("--out", type=Path, default=Path("weights/tiny"))
    p.add_argument("--minutes", type=float, default=80)
    p.add_argument(
        "--init", type=Path, help="go on from this model and tokenizer (an earlier --out)"
    )
    p.add_argument("--topics", action="store_true", help="first add topic vectors to the embedding")
    p.add_argument("--rows", type=int, default=32, help=f"rows of {LENGTH} tokens per step")
    p.add_argument("--prompts", type=float, default=0.25, help="share of rows that are prompts")
    p.add_argument("--muon-lr", type=float, default=5e-3)
    p.add_argument("--adam-lr", type=float, default=3e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    a = p.parse_args()
    torch.manual_seed(a.seed)

    articles = read_articles(read_enwik8(a.archive))
    tokenizer = (
        Tokenizer.from_file(str(a.init / "tokenizer.json")) if a.init else train_tokenizer(articles)
    )
    encoded = encode(articles, tokenizer)
    data = batches(articles, encoded, tokenizer, a.rows, a.prompts, a.seed)

    model = initial_model(a.init)
    if a.topics:
        add_topics(model.embed_tokens.weight, encoded)
    model.to(a.device)
    parameters = sum(w.numel() for w in model.parameters())
    matrices = [w for n, w in model.named_parameters() if w.ndim == 2 and not n.startswith("embed")]
    others = [w for n, w in model.named_parameters() if w.ndim != 2 or n.startswith("embed")]
    optimizers = [
        torch.optim.Muon(matrices, lr=a.muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=a.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_lr = [a.muon_lr, a.adam_lr]
    forward = torch.compile(model) if a.compile else model

    step, average, log, start = 0, None, [], time.time()
    earlier = json.loads((a.init / "pretraining.json").read_text()) if a.init else None

    def about() -> dict:
        return {
            "source": a.archive.name,
            "steps": step,
            "tokens": step * a.rows * LENGTH,
            "minutes": round((time.time() - start) / 60, 1),
            "prompts": a.prompts,
            "topics": a.topics,
            "parameters": parameters,
            "threads": torch.get_num_threads(),
            "device": a.device,
            "loss": log,
            "went_on_from": earlier,
        }

    bar = tqdm(total=round(a.minutes * 60), unit="s")
    for ids, weights in data:
        done = (time.time() - start) / (a.minutes * 60)
        if done >= 1:
            break
        lr = min(1.0, (step + 1) / 50, (1 - done) / 0.4)
        for optimizer, base in zip(optimizers, base_lr):
            optimizer.param_groups[0]["lr"] = base * lr
        total, weight_sum = 0.0, weights[:, 1:].sum().item()
        for part, w in zip(ids.to(a.device).split(8), weights.to(a.device).split(8)):
            with torch.autocast(a.device, torch.bfloat16):
                hidden = forward(part[:, :-1])
                logits = model.logits(hidden)  # (8, LENGTH, V)
            losses = F.cross_entropy(
                logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="none"
            )
            loss = (losses * w[:, 1:].flatten()).sum() / weight_sum
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        average = total if average is None else 0.98 * average + 0.02 * total
        bar.n = min(round(done * a.minutes * 60), bar.total)
        bar.set_postfix(
            step=step, loss=f"{average:.3f}", tokens=f"{step * a.rows * LENGTH / 1e6:.1f}M"
        )
        if step % 100 == 0:
            log.append([step, round(average, 4)])
            save(model, tokenizer, a.out, about())
            print(json.dumps(log[-1]), f"{time.time() - start:.0f}s", flush=True)
    save(model, tokenizer, a.out, about())


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

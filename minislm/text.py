"""Text to tokens: tokenizer, chat formats, prompts, label tokens.

A prompt has three parts, and only the middle one holds anything that a user wrote:

    head     the chat format's opening, up to its last control token
    body     plain text: instruction, classes, the text to classify
    tail     the chat format's closing, up to the point where the answer begins

Control tokens are recognised in head and tail alone, so a text that contains "<|im_end|>" is a text
that contains these ten characters. The chat formats are written out here (no Jinja); tests hold
them against what transformers renders from the models' own templates.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from .data import Task
from .weights import read_json

INSTRUCTION = "Classify the text into one of the classes. Answer with the class only."
CLASSES_AND_TEXT = "Classes:{classes}\n\nText: {text}"
SLOT = "\nClass:"  # where the answer goes in a prompt for a model that has no chat format

# Templates that open with a system turn of their own when the chat has none
DEFAULT_SYSTEM = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "You are a helpful assistant. Please ensure responses are professional, accurate, and safe.",
    "You are a helpful assistant.",
)


@dataclass(frozen=True)
class Chat:
    """A chat format: `turn` around a role and its content, `answer` after the last turn."""

    turn: str
    answer: str


CHATS = {
    "qwen3": Chat(  # with thinking off
        "<|im_start|>{role}\n{content}<|im_end|>\n",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "chatml": Chat("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n"),
    "granite": Chat(
        "<|start_of_role|>{role}<|end_of_role|>{content}<|end_of_text|>\n",
        "<|start_of_role|>assistant<|end_of_role|>",
    ),
    "none": Chat("{content}", ""),  # a base model continues a document
}


def detect_chat(folder: Path) -> tuple[str, str | None]:
    """The chat format's name and default system text, recognised by the model's own template.

    Granite 3's template puts today's date into the system turn; a classifier whose prompt changes
    every day is none, so that turn is left out.
    """
    path = folder / "chat_template.jinja"
    if path.exists():
        template = path.read_text(encoding="utf-8")
    elif (folder / "tokenizer_config.json").exists():
        template = read_json(folder / "tokenizer_config.json").get("chat_template") or ""
        if isinstance(template, list):  # several named templates
            template = next((t["template"] for t in template if t.get("name") == "default"), "")
    else:
        template = ""
    system = next((s for s in DEFAULT_SYSTEM if s in template), None)
    if not template:
        return "none", None
    if "<|start_of_role|>" in template:
        return "granite", system
    if "<|im_start|>" in template and "enable_thinking" in template:
        return "qwen3", system
    if "<|im_start|>" in template and "<think>" not in template and "bos_token" not in template:
        return "chatml", system
    raise ValueError(
        f"{folder}: its chat template is none of {', '.join(CHATS)}; choose the nearest with --chat"
    )


def chat_parts(chat: str, system: str | None) -> tuple[str, str, str]:
    """What stands around the user's words: (up to the last control token, rest, closing)."""
    if chat not in CHATS:
        raise ValueError(f"chat format {chat!r} is not one of {', '.join(CHATS)}")
    turn, answer = CHATS[chat].turn, CHATS[chat].answer
    opening, closing = turn.replace("{role}", "user").split("{content}")
    if system is not None and chat != "none":
        opening = turn.format(role="system", content=system) + opening
    cut = opening.rfind("|>") + 2 if opening else 0
    return opening[:cut], opening[cut:], closing + answer


def load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ValueError(
            f"{folder}: no tokenizer.json there; save the fast tokenizer into the folder"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path}: not a readable tokenizer: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def without_control_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, for which control tokens are plain text."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = []
    content["post_processor"] = None
    plain = Tokenizer.from_str(json.dumps(content))
    for token in tokenizer.get_added_tokens_decoder().values():
        ids = plain.encode(token.content, add_special_tokens=False).ids
        if token.special and tokenizer.token_to_id(token.content) in ids:
            raise ValueError(f"this tokenizer cannot read {token.content} as plain text")
    return plain


class Prompt:
    """Renders texts into prompts for one task and one model, as strings and as token ids.

    max_text_tokens: a longer text is cut at its end; nothing else ever is. `truncated` counts them
        as they are encoded.
    """

    def __init__(
        self, tokenizer: Tokenizer, task: Task, chat: str = "none", system: str | None = None,
        max_text_tokens: int = 512,
    ):  # fmt: skip
        if max_text_tokens < 1:
            raise ValueError(f"max_text_tokens must be at least 1, not {max_text_tokens}")
        self.tokenizer, self.plain = tokenizer, without_control_tokens(tokenizer)
        self.task, self.max_text_tokens, self.truncated = task, max_text_tokens, 0

        self.head, lead, self.tail = chat_parts(chat, system)

        classes = " " + ", ".join(task.words)
        if any(task.meanings):
            classes = "".join(f"\n- {w}: {m}" for w, m in zip(task.words, task.meanings))
        default = CLASSES_AND_TEXT if chat == "none" else f"{INSTRUCTION}\n{CLASSES_AND_TEXT}"
        before, after = (task.prompt or default).split("{text}")
        self.before = lead + before.replace("{classes}", classes)
        self.after = after.replace("{classes}", classes) + (SLOT if chat == "none" else "")
        self.answer_space = " " if chat == "none" else ""

        # a tokenizer that cuts " 0" into " " and "0": the space then belongs to the prompt
        if self.answer_space and all(
            self.plain.encode(" " + word, add_special_tokens=False).ids[:1]
            == self.plain.encode(" ").ids
            for word in task.words
        ):
            self.after, self.answer_space = self.after + " ", ""

        self.head_ids = self.start_ids() if chat == "none" else self.control_ids(self.head)
        self.tail_ids = self.control_ids(self.tail)

    def start_ids(self) -> list[int]:
        """What the tokenizer puts before a text: a beginning-of-sequence token, or nothing."""
        bare = self.tokenizer.encode("a", add_special_tokens=False).ids
        whole = self.tokenizer.encode("a").ids
        return whole[: next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)]

    def control_ids(self, part: str) -> list[int]:
        """Head or tail as ids, each of its control tokens being one."""
        ids = self.tokenizer.encode(part, add_special_tokens=False).ids
        for token in re.findall(r"<[|\w/]+>", part):
            if self.tokenizer.token_to_id(token) not in ids:
                raise ValueError(
                    f"the tokenizer has no token {token}, which the chat format needs; "
                    "choose another format with --chat"
                )
        return ids

    def cut(self, text: str) -> str:
        """The text's first max_text_tokens tokens; lone surrogates, invalid Unicode, replaced."""
        text = text.encode("utf-8", "replace").decode()
        if len(text.encode()) <= self.max_text_tokens:  # a token is a byte or more
            return text
        offsets = self.plain.encode(text, add_special_tokens=False).offsets
        if len(offsets) <= self.max_text_tokens:
            return text
        return text[: offsets[self.max_text_tokens - 1][1]]

    def render(self, text: str) -> str:
        """The prompt as a string, as the model sees it."""
        return self.head + self.before + self.cut(text) + self.after + self.tail

    def encode(self, text: str) -> list[int]:
        """The prompt's token ids."""
        kept = self.cut(text)
        self.truncated += len(kept) < len(text)
        body = self.before + kept + self.after
        return self.head_ids + self.plain.encode(body, add_special_tokens=False).ids + self.tail_ids

    def label_token_ids(self) -> list[int]:
        """The first token of each class word where the answer begins, all distinct.

        Raises:
            ValueError: two classes begin with the same token, or a word merges with the prompt.
        """
        end = self.tail or self.after
        encode = self.tokenizer.encode if self.tail else self.plain.encode
        bare = encode(end, add_special_tokens=False).ids
        by_token: dict[int, list[str]] = {}
        for word in self.task.words:
            ids = encode(end + self.answer_space + word, add_special_tokens=False).ids
            if ids[: len(bare)] != bare or len(ids) == len(bare):
                raise ValueError(
                    f"the class word {word!r} merges with the end of the prompt; choose another"
                )
            by_token.setdefault(ids[len(bare)], []).append(word)
        if collisions := {t: words for t, words in by_token.items() if len(words) > 1}:
            groups = "; ".join(
                f"{', '.join(words)} ({self.tokenizer.decode([token])!r}, token {token})"
                for token, words in collisions.items()
            )
            raise ValueError(
                f"classes begin with the same token: {groups}. Give them other words in task.toml"
            )
        return list(by_token)

"""Text to tokens: tokenizer, chat formats, prompts, label tokens.

A prompt has three parts, and only the middle one holds anything that a user wrote:

    opening  of the chat format, up to its last control token
    body     plain text: instruction, classes, the text to classify
    closing  of the chat format, up to the point where the answer begins

Control tokens are recognised in opening and closing alone: a text that contains "<|im_end|>" is one
that contains these ten characters. The chat formats are written out here (no Jinja); tests hold
them against what transformers renders from the models' own templates.
"""

import json
import re
from itertools import chain, islice, product
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from tokenizers import Tokenizer

from .data import Task
from .weights import read_json

REQUEST = "Classify the text into one of the classes"
# letters of Thai, Lao, Burmese, Khmer, Japanese and Chinese: nothing stands between words
NO_SPACES = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
CONTROL = r"<.+>|\[.+\]"  # added tokens so named are control tokens, special or not: <think>
NO_CHARACTER = "\ufdd0"  # a Unicode noncharacter: no text has it
LISTED = "{instruction}\nClasses:{classes}\n\nText: {text}"


class Form(NamedTuple):
    """What is asked of the model, and where it answers if it has no chat format (`slot`)."""

    instruction: str
    template: str  # with {class}: one prompt per class
    slot: str = ""
    system: str | None = None  # in place of the chat format's own


FORMS = {
    "names": Form(f"{REQUEST}. Answer with the class only.", LISTED, "\nClass:"),
    "letters": Form(f"{REQUEST}. Answer with the letter of the class only.", LISTED, "\nLetter:"),
    "pairs": Form(  # Qwen3-Reranker's
        "Judge whether the Document is the class of the Query",
        "<Instruct>: {instruction}\n<Query>: {text}\n<Document>: {class}",
        "\nAnswer (yes or no):",
        "Judge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".',
    ),
    # the text itself, to be represented: Qwen3-Embedding's form, and multilingual-e5's two
    "embedding": Form(f"{REQUEST}:{{classes}}", "Instruct: {instruction}\nQuery:{text}"),
    "e5": Form("", "query: {text}"),
    "e5-instruct": Form("", "Instruct: {instruction}\nQuery: {text}"),
}

# System texts that templates add by themselves. Granite 3's is left out: it holds today's date, and
# a classifier's prompt must not change every day.
DEFAULT_SYSTEM = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "You are a helpful assistant. Please ensure responses are professional, accurate, and safe.",
    "You are a helpful assistant.",
    "You are a helpful assistant",
)

ROLE = "<|start_of_role|>{role}<|end_of_role|>"
IM_TURN = "<|im_start|>{role}\n{content}<|im_end|>\n"
CHATS = {  # what stands around a role and its content; what opens the answer after the last turn
    "qwen3": (IM_TURN, "<|im_start|>assistant\n<think>\n\n</think>\n\n"),  # thinking is off
    "chatml": (IM_TURN, "<|im_start|>assistant\n"),
    "granite": (ROLE + "{content}<|end_of_text|>\n", ROLE.format(role="assistant")),
    "none": ("{content}", ""),  # a base model continues a document
}


def detect_chat(folder: Path) -> tuple[str, str | None]:
    """The chat format's name and default system text, recognised by the model's own template."""
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    template = path.read_text(encoding="utf-8") if path.exists() else ""
    if not path.exists() and config.exists():
        template = read_json(config).get("chat_template") or ""
        if isinstance(template, list):  # several named templates
            named = {t.get("name"): t.get("template") for t in template}
            template = named.get("default") or "none of them is the default"
        template = str(template)
    if not template:
        return "none", None
    ends = r"(?=['\"<]|$)"  # there the text must end: a longer one is another
    system = next((s for s in DEFAULT_SYSTEM if re.search(re.escape(s) + ends, template)), None)
    # plain text after the role, or a value for a variable of it, is a default that we do not know
    unknown = r"system(<\|end_of_role\|>|\\n|\n)[^\s'\"\\{<]"
    if "<|im_start|>" in template:
        unknown += r"|system(\\n|\n)<\|im_end|system\w* *= *['\"][^'\"]"
    if system is None and re.search(unknown, template):
        raise ValueError(f"{folder}: its template has an unknown system text; choose with --chat")
    if "<|start_of_role|>" in template:
        return "granite", system
    if "<|im_start|>" in template and "enable_thinking" in template:
        return "qwen3", system
    if "<|im_start|>" in template and "<think>" not in template and "bos_token" not in template:
        return "chatml", system
    raise ValueError(f"{folder}: its template is none of {', '.join(CHATS)}; choose with --chat")


def chat_parts(chat: str, system: str | None) -> tuple[str, str, str]:
    """What stands around the user's words: (up to the last control token, rest, closing)."""
    if chat not in CHATS:
        raise ValueError(f"chat format {chat!r} is not one of {', '.join(CHATS)}")
    turn, answer = CHATS[chat]
    opening, closing = turn.replace("{role}", "user").split("{content}")
    if system is not None and chat != "none":
        opening = turn.format(role="system", content=system) + opening
    head, end, lead = opening.rpartition("|>")
    return head + end, lead, closing + answer


def load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path}: {error}; save the fast tokenizer there") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def without_control_tokens(tokenizer: Tokenizer, follows: bool = False) -> Tokenizer:
    """A copy that reads control tokens as plain text; other added words stay.

    follows: its texts come after a control token, so Metaspace must prepend no space.
    """
    scheme, file = '"prepend_scheme":"%s"', tokenizer.to_str()
    content = json.loads(file.replace(scheme % "first", scheme % "never") if follows else file)
    content["post_processor"] = None
    model, added = content["model"], content["added_tokens"]
    control = {t["content"] for t in added if t["special"] or re.fullmatch(CONTROL, t["content"])}
    control -= {*chain(*model.get("merges", ()))}  # words are made of these: a "!" that pads, say
    # renamed, wherever they are listed, to what no text contains
    names = {t: f"{NO_CHARACTER}{i}" for i, t in enumerate(sorted(control)) if len(t) > 1}
    for token in added:
        token["content"] = names.get(token["content"], token["content"])
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    vocab = model["vocab"]  # piece -> id; of Unigram (piece, score) pairs
    pairs = vocab.items() if isinstance(vocab, dict) else vocab
    model["vocab"] = type(vocab)((names.get(piece, piece), value) for piece, value in pairs)
    return Tokenizer.from_str(json.dumps(content))


class Prompt:
    """Renders texts into prompts for one task and one model, as strings and as token ids.

    folder: the model's. chat: a key of CHATS; auto: recognised by the model's own template.
    max_text_tokens: longer texts and shots are cut at their end; `truncated` counts the texts.
    form: a key of FORMS. instruction: in place of the form's own (auto); none: without.
    """

    def __init__(
        self, folder: Path, task: Task, chat: str = "auto", max_text_tokens: int = 512,
        form: str = "names", instruction: str = "auto",
    ):  # fmt: skip
        if max_text_tokens < 1:
            raise ValueError(f"max_text_tokens must be at least 1, not {max_text_tokens}")
        self.tokenizer = load_tokenizer(folder)
        self.task, self.form, self.max_text_tokens, self.truncated = task, form, max_text_tokens, 0
        given = {"auto": None, "none": ""}.get(instruction, instruction)
        asks = FORMS["e5-instruct" if form == "e5" and given else form]
        lists, embeds, system = asks.template == LISTED, form in ("embedding", "e5"), None

        # Around the text: a chat's turns, or what the tokenizer adds, and a slot for the answer
        if embeds:
            chat = "none"
        elif chat == "auto":
            chat, system = detect_chat(folder)
        self.opening, lead, self.closing = chat_parts(chat, asks.system or system)
        self.plain = without_control_tokens(self.tokenizer, follows=bool(self.opening))
        self.opening_ids, self.closing_ids = map(self.control_ids, (self.opening, self.closing))
        self.slot, self.space = (asks.slot, " ") if chat == "none" else ("", "")
        if chat == "none":
            bare, whole = self.ids("a"), self.tokenizer.encode("a").ids
            at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
            self.opening_ids, added = whole[:at], whole[at + len(bare) :]
            if embeds:
                end = read_json(folder / "config.json").get("eos_token_id")  # a number, or several
                end = end[0] if isinstance(end, list) else end
                self.closing_ids = added or ([] if end is None else [end])
            # a tokenizer that cuts " 0" into " " and "0": the space then belongs to the prompt
            words = {"letters": ("A",), "pairs": ("yes", "no")}.get(form, task.words)
            if not embeds and all(self.ids(" " + w)[:1] == self.ids(" ") for w in words):
                self.slot, self.space = self.slot + " ", ""

        # The classes, as they are listed; examples follow them
        self.answers = self.codes() if form == "letters" else task.words
        names = [f"{w}: {m}" if m else w for w, m in zip(task.words, task.meanings)]
        if form == "letters":
            classes = "".join(f"\n{code}. {name}" for code, name in zip(self.answers, names))
        elif lists and any(task.meanings):
            classes = "".join(f"\n- {name}" for name in names)
        else:
            classes = " " + ", ".join(task.words)
        for text, label in task.shots:
            answer = self.answers[task.labels.index(label)]
            classes += f"\n\nText: {self.cut(text)}{asks.slot} {answer}"

        # The body: what is before the text, and after it
        own = task.prompt if lists else None
        if own and given:
            raise ValueError("the task has a prompt of its own: write the instruction there")
        if own and task.shots and own.index("{text}") < own.index("{classes}"):
            raise ValueError("shots follow {classes}, which must stand before {text} in the prompt")
        query = "query: " if form == "e5" and given is None else ""
        template = own or ("{text}" if embeds and given == "" else asks.template)
        if given is None:  # a base model continues a document: nothing is asked of it
            given = "" if lists and chat == "none" else asks.instruction
        if not given:
            template = template.removeprefix("{instruction}\n")
        sides = (lead + template + self.slot).split("{text}")
        sides = (s.replace("{instruction}", given).replace("{classes}", classes) for s in sides)
        self.before, after = sides
        self.afters = [after.replace("{class}", n) for n in names] if form == "pairs" else [after]
        self.class_ids = [self.opening_ids + self.ids(query + n) + self.closing_ids for n in names]

    def ids(self, text: str) -> list[int]:
        """The tokens of plain text."""
        return self.plain.encode(text, add_special_tokens=False).ids

    def control_ids(self, part: str) -> list[int]:
        """Opening or closing as ids, each of its control tokens being one."""
        ids = self.tokenizer.encode(part, add_special_tokens=False).ids
        for token in re.findall(r"<[|\w/]+>", part):
            if self.tokenizer.token_to_id(token) not in ids:
                raise ValueError(f"the tokenizer has no {token}; choose another format with --chat")
        return ids

    def cut(self, text: str) -> str:
        """The text's first max_text_tokens tokens; what is no Unicode character replaced."""
        # an encoder's limit is hard, so its text is counted where it stands
        before = self.before if self.form == "e5" else ""
        text = before + text.encode("utf-8", "replace").decode().replace(NO_CHARACTER, "?")
        most = len(self.ids(before)) + self.max_text_tokens
        # cut between characters only; what is left may have more tokens by itself, so repeat
        while len(offsets := self.plain.encode(text, add_special_tokens=False).offsets) > most:
            text = text[: min(offsets[most - 1][1], offsets[most][0], len(text) - 1)]
        return text[len(before) :]

    def render(self, text: str) -> str:
        """The prompt as a string, as the model sees it; several with an empty line between them."""
        body = self.before + self.cut(text)
        return "\n\n".join(self.opening + body + after + self.closing for after in self.afters)

    def branches(self, text: str) -> list[list[int]]:
        """The token ids of the text's prompts: one, or one per class."""
        kept = self.cut(text)
        self.truncated += len(kept) < len(text)
        bodies = [self.ids(self.before + kept + after) for after in self.afters]
        return [self.opening_ids + body + self.closing_ids for body in bodies]

    def name_ids(self) -> list[list[int]]:
        """The tokens of each class's whole name, and the one that ends an answer."""
        end = self.closing_ids[:1] or self.ids("\n")[-1:]
        names = [self.answer_ids(word) + end for word in self.answers]
        if len({*map(tuple, names)}) < len(names):
            raise ValueError(f"two of the words {self.answers} are the same tokens; change one")
        return names

    def codes(self) -> list[str]:
        """A, B, ... Z, and then pairs of letters: as many as classes, each one token."""
        pairs = map("".join, product(ascii_uppercase, repeat=2))
        single = (c for c in chain(ascii_uppercase, pairs) if len(self.answer_ids(c)) == 1)
        codes, needed = list(islice(single, len(self.task.words))), len(self.task.words)
        if len(codes) < needed:
            found = f"only {len(codes)} letters and pairs of letters that are one token"
            raise ValueError(f"{needed} classes, but the tokenizer has {found}; use another method")
        return codes

    def answer_ids(self, word: str) -> list[int]:
        """The tokens of a word where the answer begins."""
        tokenizer, end = (self.tokenizer, self.closing) if self.closing else (self.plain, self.slot)
        both = end, end + self.space + word
        bare, ids = (tokenizer.encode(text, add_special_tokens=False).ids for text in both)
        if ids[: len(bare)] != bare or len(ids) == len(bare):
            raise ValueError(f"the class word {word!r} merges with the prompt; choose another")
        return ids[len(bare) :]

    def label_tokens(self) -> list[list[int]]:
        """The first tokens of each class's words where the answer begins; classes share none."""
        more = self.task.synonyms if self.form == "names" else [()] * len(self.answers)
        groups = [(word, *others) for word, others in zip(self.answers, more)]
        tokens = [[self.answer_ids(word)[0] for word in group] for group in groups]
        by_token = {t: [w for w, g in zip(self.answers, tokens) if t in g] for t in chain(*tokens)}
        if shared := {t: ", ".join(words) for t, words in by_token.items() if len(words) > 1}:
            found = (f"{w} ({self.tokenizer.decode([t])!r}, token {t})" for t, w in shared.items())
            remedy = "Give them other words in task.toml, or use the method letters or whole_names"
            raise ValueError(f"classes begin with the same token: {'; '.join(found)}. {remedy}")
        return tokens


def parse(answer: str, words: tuple[str, ...]) -> int | None:
    """The index of the class that an answer's first line names, as all of it or within it.

    None if it names none, or several of which none contains all others.
    """
    answer = answer.strip().partition("\n")[0]
    if said := {answer, answer.rstrip(" .!")} & {*words}:
        return words.index(max(said, key=len))
    folded = [word.casefold() for word in words]
    whole = [rf"(?<![^\W{NO_SPACES}]){re.escape(word)}(?![^\W{NO_SPACES}])" for word in folded]
    found = [i for i, word in enumerate(whole) if re.search(word, answer.casefold())]
    longest = max(found, key=lambda i: len(folded[i]), default=None)
    return longest if all(re.search(whole[i], folded[longest]) for i in found) else None

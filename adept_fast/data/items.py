"""What a record means: a text, an instruction with its output, or a multiple-choice question; and its tokens and labels.

Labels are aligned with input_ids as in transformers (the model shifts them); -100 is not supervised. A text is supervised on all its
tokens, an instruction on the tokens of its output only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from os import PathLike
from typing import TYPE_CHECKING, Any

from adept_fast.data.encoding import Encoder
from adept_fast.data.readers import read
from adept_fast.data.sources import Record, Source
from adept_fast.errors import InputError
from adept_fast.settings.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
STYLES = ("plain", "chat")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """Tokens of one sequence. `labels[t]` is input_ids[t] where supervised, else -100; the first token is never predicted."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def supervised(self) -> int:
        """Number of tokens that count in the loss."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True)
class Choices:
    """A multiple-choice question: one sequence per choice, of equal prompt; `answer` is the index of the right one."""

    options: tuple[Item, ...]
    answer: int


def content_hash(content: Mapping[str, Any]) -> str:
    """sha256 of a record's content: what decides its part of a split, whichever file it stands in."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str).encode(errors="surrogatepass")).hexdigest()


def document_text(record: Record, column: str | None = None) -> str:
    """The text of a record to train on: its text column, or instruction and output joined."""
    content = record.content
    if column is None and {"instruction", "output"} <= content.keys():
        prompt, answer = _prompt_and_answer(record)
        return prompt + answer
    key = column or "text"
    text = content.get(key)
    if not isinstance(text, str):
        keys = ", ".join(sorted(map(str, content))) or "none"
        raise InputError(f"{record.where}: no text under {key!r} (keys: {keys}); name the text column with column=")
    if not text.strip():
        raise InputError(f"{record.where}: {key!r} is empty")
    return _encodable(text, record)


def _encodable(text: str, record: Record) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{record.where}: holds half of a surrogate pair, which is not text") from None
    return text


def is_choice(record: Record) -> bool:
    return "choices" in record.content


def _prompt_and_answer(record: Record) -> tuple[str, str]:
    prompt, answer = record.content["instruction"], record.content["output"]
    if not (isinstance(prompt, str) and isinstance(answer, str) and prompt.strip() and answer.strip()):
        raise InputError(f"{record.where}: 'instruction' and 'output' must be texts that are not empty")
    joined = prompt[-1:].isspace() or answer[:1].isspace()
    return _encodable(prompt, record), _encodable(answer if joined else "\n" + answer, record)


def check_item(record: Record, column: str | None = None) -> None:
    """Raise InputError, naming file and line, unless the record is a text, an instruction with output, or tokenised."""
    if not isinstance(record.content, Mapping):
        raise InputError(f'{record.where}: expected a record such as {{"text": ...}}, found {type(record.content).__name__}')
    if column is None and not {"text", "input_ids"} & record.content.keys() and not {"instruction", "output"} <= record.content.keys():
        keys = ", ".join(sorted(map(str, record.content))) or "none"
        raise InputError(f"{record.where}: neither 'text' nor 'instruction' and 'output' (keys: {keys})")
    if "input_ids" not in record.content:
        document_text(record, column)


def tokenize_item(
    record: Record,
    tokenizer: PreTrainedTokenizerBase | Encoder | None,
    style: str = "plain",
    column: str | None = None,
    vocabulary: int | None = None,
) -> Item:
    """Tokens and labels of a text, an instruction with output, or a record that is tokenised already, each token below `vocabulary`."""
    check_item(record, column)
    require("score.probe_format", style, str, STYLES)
    content = record.content
    if "input_ids" in content:
        try:
            ids, labels = (tuple(map(index, content.get(key, content["input_ids"]))) for key in ("input_ids", "labels"))
        except TypeError:
            raise InputError(f"{record.where}: 'input_ids' and 'labels' must be lists of whole numbers") from None
        if len(labels) != len(ids):
            raise InputError(f"{record.where}: {len(ids)} input_ids but {len(labels)} labels")
        if any(token < 0 for token in ids) or any(label < 0 and label != IGNORE for label in labels):
            raise InputError(f"{record.where}: input_ids must be 0 or more, labels too or {IGNORE} where they are not supervised")
        return _known(Item(ids, labels), record.where, vocabulary)
    if tokenizer is None:
        raise InputError(f"{record.where}: a tokenizer is needed for items that are not tokenised: pass tokenizer=")
    encoder = Encoder.of(tokenizer)
    if column is None and {"instruction", "output"} <= content.keys():
        prompt, answer = _prompt_and_answer(record)
        if style == "chat":
            return _chat_item(prompt.strip(), answer.strip(), encoder)
        return _answer_item(prompt, answer, encoder)
    ids = tuple(encoder.texts([document_text(record, column)])[0])
    return Item(ids, ids)


def _known(item: Item, where: str, vocabulary: int | None) -> Item:
    highest = max((*item.input_ids, *item.labels), default=0)
    if vocabulary is not None and highest >= vocabulary:
        raise InputError(f"{where}: token {highest}, but the model has {vocabulary}: tokenise it with the model's own tokenizer")
    return item


def _answer_item(prompt: str, answer: str, encoder: Encoder) -> Item:
    """Prompt and answer tokenised together; a token belongs to the answer when it ends inside it."""
    return _supervised(*encoder.parts([prompt, answer]))


def _chat_item(prompt: str, answer: str, encoder: Encoder) -> Item:
    return _supervised(*encoder.chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], prompt=1))


def _supervised(ids: Sequence[int], parts: Sequence[int]) -> Item:
    """All but the tokens of the first part are supervised."""
    return Item(tuple(ids), tuple(token if part else IGNORE for token, part in zip(ids, parts, strict=True)))


def tokenize_choices(record: Record, tokenizer: PreTrainedTokenizerBase | Encoder) -> Choices:
    """Question, lettered choices, "Answer:"; each option continues it with " A. text", " B. text", ..."""
    question, choices, answer = (record.content.get(key) for key in ("question", "choices", "answer"))
    if not isinstance(question, str) or not isinstance(choices, Sequence) or isinstance(choices, str) or not 2 <= len(choices) <= 26:
        raise InputError(f"{record.where}: a multiple-choice item is 'question', 'choices' (2 to 26 texts) and 'answer'")
    if isinstance(answer, str) and answer.strip().upper() in tuple(LETTERS[: len(choices)]):
        answer = LETTERS.index(answer.strip().upper())
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise InputError(f"{record.where}: 'answer' must be an index from 0 to {len(choices) - 1} or a letter, found {answer!r}")
    listed = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    prompt = "\n".join([question, *listed, "Answer:"])
    encoder = Encoder.of(tokenizer)
    return Choices(tuple(_answer_item(prompt, f" {line}", encoder) for line in listed), answer)


def load_items(
    probe: str | PathLike[str] | Source | Mapping[str, Any] | Iterable[Mapping[str, Any] | Item],
    tokenizer: PreTrainedTokenizerBase | Encoder | None = None,
    style: str = "plain",
    vocabulary: int | None = None,
) -> list[Item]:
    """Items of a probe given as a path, dataset name, source, or list of records or Items.

    Raises InputError when none is supervised, or for tokens from `vocabulary` on.
    """
    tokenizer = tokenizer and Encoder.of(tokenizer)
    if isinstance(probe, (str, PathLike, Mapping, Source)):
        source = Source.of(str(probe) if isinstance(probe, PathLike) else probe)
        items = [tokenize_item(record, tokenizer, style, source.column, vocabulary) for record in read(source)]
    else:
        items = [
            _known(entry, where, vocabulary)
            if isinstance(entry, Item)
            else tokenize_item(Record(entry, where), tokenizer, style, vocabulary=vocabulary)
            for entry, where in ((entry, f"probe item {number}") for number, entry in enumerate(probe, 1))
        ]
    if not any(item.supervised for item in items):
        raise InputError("the probe holds no supervised token: give items with text, or with instruction and output")
    return items

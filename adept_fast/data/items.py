"""Tokens and labels of records: a text is supervised on all its tokens, whatever has answers on the tokens of its answers only.

Labels are aligned with input_ids as in transformers (the model shifts them); -100 is not supervised. What a record means is
data/records.py's to say.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from adept_fast.data.encoding import Encoder
from adept_fast.data.readers import read
from adept_fast.data.records import IGNORE, Answered, Chat, MalformedRecord, Question, Text, Tokens, meaning
from adept_fast.data.source_files import source_files
from adept_fast.data.source_summary import SourceSummary
from adept_fast.data.sources import TEMPLATES, Record, Source
from adept_fast.data.templates import as_chat, prompt_and_answer, question_prompt, rendered
from adept_fast.errors import InputError
from adept_fast.settings.validation import require, require_made

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES = TEMPLATES
OVERLONG = ("drop", "cut")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """Tokens of one sequence. `labels[t]` is input_ids[t] where supervised, else -100; the first token is never predicted.

    Raises InputError for anything else: masking would measure the tokens and gradients the labels.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.input_ids):
            raise InputError(f"{len(self.input_ids)} input_ids but {len(self.labels)} labels")
        if min(self.input_ids, default=0) < 0:
            raise InputError(f"input_ids must be 0 or more, found {min(self.input_ids)}")
        for at, (token, label) in enumerate(zip(self.input_ids, self.labels, strict=True)):
            if label not in (token, IGNORE):
                raise InputError(
                    f"label {label} at position {at}, whose token is {token}: labels are the tokens of their own positions (the model "
                    f"shifts them), or {IGNORE} where they are not supervised"
                )

    @property
    def supervised(self) -> int:
        """Number of tokens that count in the loss."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True)
class Tokenized:
    """items: those that can be measured on; overlong: how many records were longer than the limit; unsupervised: how many others, or
    what is left of them, hold no token that counts in the loss."""

    items: list[Item]
    overlong: int
    unsupervised: int


@dataclass(frozen=True)
class Choices:
    """A multiple-choice question: one sequence per choice, of equal prompt; `answer` is the index of the right one."""

    options: tuple[Item, ...]
    answer: int


def content_hash(content: Mapping[str, Any]) -> str:
    """sha256 of a record's content: what decides its part of a split, whichever file it stands in."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str).encode(errors="surrogatepass")).hexdigest()


def is_choice(record: Record) -> bool:
    return isinstance(meaning(record), Question)


def is_tokenised(record: Record) -> bool:
    return isinstance(meaning(record), Tokens)


def tokenize(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase | Encoder,
    *,
    limit: int,
    overlong: str,
    style: str = "plain",
    vocabulary: int | None = None,
) -> Tokenized:
    """Tokenise records to measure on: probe items, held-out documents, evaluation texts.

    limit, overlong: "drop" leaves out what is longer than so many tokens, "cut" takes its first ones. Others: see tokenize_item.
    """
    require("overlong", overlong, str, OVERLONG)
    whole = [tokenize_item(record, tokenizer, style, vocabulary) for record in records]
    fitting = [item for item in whole if len(item.input_ids) <= limit]
    kept = fitting if overlong == "drop" else [Item(item.input_ids[:limit], item.labels[:limit]) for item in whole]
    items = [item for item in kept if item.supervised]
    return Tokenized(items, len(whole) - len(fitting), len(kept) - len(items))


def tokenize_item(
    record: Record, tokenizer: PreTrainedTokenizerBase | Encoder | None, style: str = "plain", vocabulary: int | None = None
) -> Item:
    """Tokens and labels of any record that is not empty, each token below `vocabulary`.

    style: how an instruction and its output are written, one of STYLES; plain: as the record's source says.
    """
    require("style", style, str, STYLES)
    found, template = meaning(record), record.template if style == "plain" else style
    if found is None:
        raise MalformedRecord(f"{record.where}: is empty")
    if isinstance(found, Tokens):
        try:
            item = Item(found.input_ids, found.labels)
        except InputError as error:
            raise MalformedRecord(f"{record.where}: {error}") from None
        return _known(item, record.where, vocabulary)
    if tokenizer is None:
        raise InputError(f"{record.where}: a tokenizer is needed for items that are not tokenised: pass tokenizer=")
    encoder = Encoder.of(tokenizer)
    if isinstance(found, Text):
        ids = tuple(encoder.texts([found.text])[0])
        return Item(ids, ids)
    if isinstance(found, Answered) and template == "chat":
        found = as_chat(found)
    if isinstance(found, Chat):
        return _chat_item(found, encoder, record.where)
    return _answer_item(*prompt_and_answer(found, template), encoder)


def _known(item: Item, where: str, vocabulary: int | None) -> Item:
    highest = max(item.input_ids, default=0)
    if vocabulary is not None and highest >= vocabulary:
        raise InputError(f"{where}: token {highest}, but the model has {vocabulary}: tokenise it with the model's own tokenizer")
    return item


def _answer_item(prompt: str, answer: str, encoder: Encoder) -> Item:
    """Prompt and answer tokenised together; a token belongs to the answer when it ends inside it."""
    ids, parts = encoder.parts([prompt, answer])
    return Item(tuple(ids), tuple(token if part else IGNORE for token, part in zip(ids, parts, strict=True)))


def _chat_item(chat: Chat, encoder: Encoder, where: str) -> Item:
    """All that the assistant says is supervised, with what closes it; as TRL, Axolotl and LLaMA-Factory do."""
    ids = encoder.texts([rendered(chat, encoder.tokenizer, where)])[0]
    labels = [IGNORE] * len(ids)
    for number, message in enumerate(chat.messages):
        if message["role"] == "assistant" and number >= chat.answers_from:
            begin, end = _span(chat, number, ids, encoder, where)
            labels[begin:end] = ids[begin:end]
    return Item(tuple(ids), tuple(labels))


def _span(chat: Chat, number: int, ids: list[int], encoder: Encoder, where: str) -> tuple[int, int]:
    """From where to where in the chat's tokens the answer stands that is message `number`. Templates may put more before the last message
    than before an earlier one (an empty thought): then it begins behind that."""
    try:
        upto, parts = encoder.chat(chat.messages[: number + 1], prompt=number, **chat.options)
        begin = len(parts) - sum(parts)
        for more in range(sum(parts)) if ids[:begin] == upto[:begin] else ():
            end = len(upto) - more
            if ids[begin:end] == upto[begin + more :]:
                return begin, end
    except InputError as error:
        raise MalformedRecord(f"{where}: {error}") from None
    raise MalformedRecord(f"{where}: this chat template rewrites earlier messages: give prompt and completion as texts")


def tokenize_choices(record: Record, tokenizer: PreTrainedTokenizerBase | Encoder) -> Choices:
    """Each option of a question behind the same prompt."""
    question = meaning(record)
    if not isinstance(question, Question):
        raise MalformedRecord(f"{record.where}: a multiple-choice item is 'question', 'choices' and 'answer'")
    prompt, options = question_prompt(question)
    encoder = Encoder.of(tokenizer)
    return Choices(tuple(_answer_item(prompt, option, encoder) for option in options), question.answer)


def load_items(
    probe: str | PathLike[str] | Source | Mapping[str, Any] | Iterable[Mapping[str, Any] | Item],
    tokenizer: PreTrainedTokenizerBase | Encoder | None = None,
    style: str = "plain",
    vocabulary: int | None = None,
) -> list[Item]:
    """Items of a probe given as a path, dataset name, source, or list of records or Items.

    Records that are empty are left out with a warning, which names keys that are not read, too. Raises InputError when none is supervised,
    or for tokens from `vocabulary` on.
    """
    tokenizer = tokenizer and Encoder.of(tokenizer)
    entries: Iterable[Item | Record]
    if isinstance(probe, (str, PathLike, Mapping, Source)):
        source = Source.of(str(probe) if isinstance(probe, PathLike) else probe)
        summary, entries = SourceSummary(source, files=source_files(source)), read(source)
    else:
        require_made("probe", probe, Iterable, "give a path, or a list of records such as {'text': ...}")
        summary = SourceSummary(Source("probe"))
        numbered = [(entry, f"probe item {number}") for number, entry in enumerate(probe, 1)]
        entries = [_known(entry, where, vocabulary) if isinstance(entry, Item) else Record(entry, where) for entry, where in numbered]
    items = [
        entry if isinstance(entry, Item) else tokenize_item(entry, tokenizer, style, vocabulary)
        for entry in entries
        if isinstance(entry, Item) or summary.take(entry, meaning) is not None
    ]
    for line in summary.notes():
        logger.warning(line)
    if not any(item.supervised for item in items):
        raise InputError("the probe holds no supervised token: give items with text, or with instruction and output")
    return items

"""Parse records in the formats that LLaMA-Factory, TRL and Axolotl read. A format is recognised by its keys.

| keys, optional ones after the semicolon | parsed as |
|---|---|
| question, choices, answer | Question |
| input_ids; labels | Item |
| messages (role, content) or conversations (from, value); system, tools | Chat |
| instruction, output; input, system, history | PromptAnswer |
| instruction, response; context or input, system, history | PromptAnswer, the format of Dolly |
| question, answer, and no other key but an id and the like (BESIDE) | PromptAnswer, the format of GSM8K |
| prompt, completion | PromptAnswer, or Chat if they are lists of messages |
| text | Text |

The first whose needed keys are all there, and not null, is meant. A record whose text is empty or null means nothing: it is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from operator import index
from typing import Any

from adept_fast.data.sources import Record
from adept_fast.errors import InputError
from adept_fast.settings.validation import shown

IGNORE = -100
REMEDY = "name its text with column=, or name its keys as one of these formats has them"
REMEDIES = {  # keys of common records without a format -> what to do
    frozenset(("chosen", "rejected")): "of a preferred and a rejected answer one can be trained on: name 'chosen' 'completion' where "
    "'prompt' stands beside it, or give column=chosen where it is a list of messages",
    frozenset(("question", "answer")): "'question' and 'answer' are read where nothing but an id stands beside them: leave the others out, "
    "or name what is asked, with all that belongs to it, 'prompt', and the answer 'completion'",
}
BESIDE = frozenset(("id", "_id", "idx", "index", "uid", "uuid", "url", "source", "split", "category", "difficulty"))
"""Keys that name or sort a record, and may stand beside a question and its answer. They are not read."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
}
"""Names of roles, including ShareGPT's -> names in chat templates."""


class MalformedRecord(InputError):
    """A single row that cannot be read; others may be."""


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class PromptAnswer:
    """A prompt, in its parts, and its answer. apart: whether to separate them by a line break if neither has white space there."""

    prompt: str
    answer: str
    context: str = ""
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()
    apart: bool = True


@dataclass(frozen=True)
class Chat:
    """Messages for a chat template. The assistant's messages from index `answers_from` on are the answers."""

    messages: tuple[Mapping[str, Any], ...]
    answers_from: int = 0
    tools: tuple[Any, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """Return keyword arguments for the chat template."""
        return {"tools": list(self.tools)} if self.tools else {}


@dataclass(frozen=True)
class Question:
    """A multiple-choice question. answer: the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Item:
    """Tokens of one sequence. labels[t] is input_ids[t] if supervised, else -100; the model shifts labels, as in transformers.

    Raises InputError for other labels: masking would measure the tokens, and gradients the labels.
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
        """Return the number of supervised tokens. The first token is never predicted."""
        return sum(label != IGNORE for label in self.labels[1:])


Parsed = Text | PromptAnswer | Chat | Question | Item


def parse_record(record: Record) -> Parsed | None:
    """Parse a record; None if it is empty. Raises MalformedRecord, with file and line, if it cannot be read."""
    if record.fault is not None:
        raise MalformedRecord(f"{record.where}: {record.fault}")
    if not isinstance(record.content, Mapping):
        raise MalformedRecord(f'{record.where}: expected a record such as {{"text": ...}}, found {type(record.content).__name__}')
    form = _format_of(record)
    try:
        return None if form is None else form.read({key: value for key, value in record.content.items() if value is not None})
    except ValueError as error:
        raise MalformedRecord(f"{record.where}: {error}") from None


def unread(record: Record) -> frozenset[str]:
    """Return the keys of a record that are not read and not null."""
    form = _format_of(record)
    return frozenset(key for key, value in record.content.items() if value is not None and form and key not in {*form.needed, *form.also})


@dataclass(frozen=True)
class _Format:
    """A format. alone: whether it applies only to records without any other key, those of BESIDE left out."""

    needed: tuple[str, ...]
    also: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Parsed | None]
    alone: bool = False

    def fits(self, keys: Set[str], named: Set[str]) -> bool:
        """Whether the format applies to a record with values for `keys`, and columns `named`."""
        return keys >= {*self.needed} and not (self.alone and named - {*self.needed} - BESIDE)


def _format_of(record: Record) -> _Format | None:
    """Return the format of a record; None if only null values prevent one. Raises MalformedRecord if no format applies."""
    content, column, named = record.content, record.column, record.content.keys() | record.nulls
    here = {key for key, value in content.items() if value is not None}
    formats = FORMATS if column is None else (_Format((column,), (), lambda content: _column(content, column)),)
    found = next((form for form in formats if form.fits(here, named)), None)
    if found is None and here and not any(form.fits(named, named) for form in formats):
        keys = ", ".join(sorted(map(str, here)))
        if column is not None:
            raise MalformedRecord(f"{record.where}: no column {column!r} (keys: {keys})")
        known = "; ".join(", ".join(form.needed) for form in formats[::-1])
        remedy = next((remedy for pair, remedy in REMEDIES.items() if here >= pair), REMEDY)
        raise MalformedRecord(f"{record.where}: its keys ({keys}) are of no format that is read ({known}); {remedy}")
    return found


def _column(content: Mapping[str, Any], column: str) -> Parsed | None:
    """Parse the column that the source names: a text, or messages."""
    value = content[column]
    return _chat(value, {}, column) if isinstance(value, (list, tuple)) else _text({"text": value}, column)


def _text(content: Mapping[str, Any], name: str = "text") -> Text | None:
    text = _string(content["text"], name)
    return Text(text) if text.strip() else None


def _string(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a text, found {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} holds half of a surrogate pair, which is not text") from None
    return value


def _instruction(content: Mapping[str, Any], context: str = "input", answer: str = "output") -> PromptAnswer | None:
    """Parse an instruction. context, answer: the keys of its input and of its output."""
    prompt, context, answer, system = (_string(content.get(key), key) for key in ("instruction", context, answer, "system"))
    history = content.get("history") or ()
    if not isinstance(history, (list, tuple)) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise ValueError(f"'history' must be a list of pairs, prompt and answer, found {shown(history)}")
    pairs = tuple((_string(asked, "history"), _string(answered, "history")) for asked, answered in history)
    if not answer.strip() or not (prompt.strip() or context.strip()):
        return None
    return PromptAnswer(prompt if prompt.strip() else context, answer, context if prompt.strip() and context.strip() else "", system, pairs)


def _response(content: Mapping[str, Any]) -> PromptAnswer | None:
    if "input" in content and "context" in content:
        raise ValueError("'input' and 'context' both stand beside the instruction: leave one")
    return _instruction(content, "input" if "input" in content else "context", "response")


def _asked(content: Mapping[str, Any]) -> PromptAnswer | None:
    question, answer = (_string(content[key], key) for key in ("question", "answer"))
    return PromptAnswer(question, answer) if question.strip() and answer.strip() else None


def _completion(content: Mapping[str, Any]) -> Parsed | None:
    """Parse TRL's format: two texts that follow each other unchanged, or two lists of messages."""
    prompt, completion = content["prompt"], content["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt, completion = _string(prompt, "prompt"), _string(completion, "completion")
        return PromptAnswer(prompt, completion, apart=False) if completion.strip() else None
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answered = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    if not isinstance(asked, (list, tuple)) or not isinstance(answered, (list, tuple)):
        raise ValueError("'prompt' and 'completion' must be texts, or lists of messages")
    return _chat([*asked, *answered], content, "prompt, completion", len(asked))


def _chat(messages: Any, content: Mapping[str, Any], name: str, answers_from: int = 0) -> Chat | None:
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"{name!r} must be a list of messages, found {shown(messages)}")
    read = [_message(message, name) for message in messages]
    if not any(message["content"].strip() or "tool_calls" in message for message in read):
        return None
    if (system := _string(content.get("system"), "system")).strip() and (not read or read[0]["role"] != "system"):
        read, answers_from = [{"role": "system", "content": system}, *read], answers_from + bool(answers_from)
    return Chat(tuple(read), answers_from, _tools(content.get("tools") or []))


def _tools(tools: Any) -> tuple[Any, ...]:
    """Parse tools: a list, or its JSON, as in table columns."""
    try:
        listed = (json.loads(tools) if tools.strip() else []) if isinstance(tools, str) else tools
    except ValueError:
        listed = None
    if not isinstance(listed, (list, tuple)):
        raise ValueError(f"'tools' must be a list or its JSON, found {shown(tools)}")
    return tuple(listed)


def _message(message: Any, name: str) -> dict[str, Any]:
    """Convert a message to the form of chat templates: role, content, and all other keys."""
    if not isinstance(message, Mapping):
        raise ValueError(f"each of {name!r} must be a message, {{role, content}} or {{from, value}}, found {shown(message)}")
    given = {key: value for key, value in message.items() if value is not None}
    role, content = given.pop("from", given.get("role")), given.pop("value", given.get("content", ""))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(f"a message's role must be one of {', '.join(ROLES)}, found {shown(role)}")
    if isinstance(content, (list, tuple)):  # parts, the format of multimodal models
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
            raise ValueError("a message holds parts that are not text")
        content = "".join(_string(part.get("text"), "content") for part in content)
    return {**given, "role": ROLES[role.lower()], "content": _string(content, "content")}


def _question(content: Mapping[str, Any]) -> Question:
    question, choices, answer = (content[key] for key in ("question", "choices", "answer"))
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError("a multiple-choice item is 'question', 'choices' (2 to 26 texts) and 'answer'")
    texts = tuple(_string(choice, "choices") if isinstance(choice, str) else str(choice) for choice in choices)
    if isinstance(answer, str) and answer.strip().upper() in tuple(LETTERS[: len(choices)]):
        answer = LETTERS.index(answer.strip().upper())
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"'answer' must be an index from 0 to {len(choices) - 1} or a letter, found {shown(answer)}")
    return Question(_string(question, "question"), texts, answer)


def _tokens(content: Mapping[str, Any]) -> Item | None:
    try:
        ids, labels = (tuple(map(index, content.get(key, content["input_ids"]))) for key in ("input_ids", "labels"))
    except TypeError:
        raise ValueError("'input_ids' and 'labels' must be lists of whole numbers") from None
    item = Item(ids, labels)
    return item if ids else None


FORMATS: tuple[_Format, ...] = (
    _Format(("question", "choices", "answer"), (), _question),
    _Format(("input_ids",), ("labels",), _tokens),
    _Format(("messages",), ("system", "tools"), lambda content: _chat(content["messages"], content, "messages")),
    _Format(("conversations",), ("system", "tools"), lambda content: _chat(content["conversations"], content, "conversations")),
    _Format(("instruction", "output"), ("input", "system", "history"), _instruction),
    _Format(("instruction", "response"), ("context", "input", "system", "history"), _response),
    _Format(("question", "answer"), (), _asked, alone=True),
    _Format(("prompt", "completion"), ("tools",), _completion),
    _Format(("text",), (), _text),
)

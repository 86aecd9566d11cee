"""Encode text as token ids. No other module calls a tokenizer.

The names of control tokens ("</s>", "<pad>", "<|im_end|>", all special tokens of the tokenizer) in a text are ordinary text: a page about
tokenizers does not end a document. They are encoded as any other word, unless the data contains them on purpose. Control tokens that the
tokenizer and the chat template write themselves stay: BOS, the turns of a chat.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from adept_fast.data.templates import Rendered
from adept_fast.errors import InputError
from adept_fast.settings.validation import require

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("text", "tokens")
MARK = f"\uf8ff{secrets.token_hex(8)}"  # random, so that it is in no text


class Encoder:
    """A tokenizer with a rule for control tokens.

    special_tokens: encode control tokens in a text as "text", like any other word, or as the "tokens" themselves
    found: how often each control token occurred in the texts encoded so far
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_tokens: str = "text") -> None:
        self.tokenizer = tokenizer
        require("special_tokens", special_tokens, str, SPECIAL_TOKENS)
        self.special_tokens = special_tokens
        self.found: Counter[str] = Counter()
        self._told = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase | Encoder) -> Encoder:
        """Return the given encoder, or a tokenizer's default encoder."""
        return tokenizer if isinstance(tokenizer, Encoder) else cls(tokenizer)

    @cached_property
    def begin(self) -> list[int]:
        """Return the tokens that the tokenizer writes before each text: BOS, several, or none."""
        return self._around[0]

    @property
    def end(self) -> list[int]:
        """Return the tokens that end a document: EOS, or none."""
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    @cached_property
    def control(self) -> dict[str, int]:
        """Return all control tokens: name -> id."""
        added = {token.content: number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        named = {token: self.tokenizer.convert_tokens_to_ids(token) for token in self.tokenizer.all_special_tokens}
        return {token: number for token, number in {**named, **added}.items() if token and isinstance(number, int)}

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text behind `begin`, without EOS. A text written by a chat template has only the template's control tokens."""
        if any(isinstance(text, Rendered) for text in texts):
            rest = iter(self.texts([text for text in texts if not isinstance(text, Rendered)]))
            return [self.chat(text.chat.messages, **text.chat.options)[0] if isinstance(text, Rendered) else next(rest) for text in texts]
        plain = [self._has_control_tokens(text) and self.special_tokens == "text" for text in texts]
        rest = iter(self._ordinary([text for text, apart in zip(texts, plain, strict=True) if not apart]))
        return [self._as_text(text)[0] if apart else next(rest) for text, apart in zip(texts, plain, strict=True)]

    def parts(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Encode the joined parts behind `begin`. Returns token ids, and the index of the part in which each token ends."""
        text = "".join(parts)
        plain = self._has_control_tokens(text) and self.special_tokens == "text"
        if not self.tokenizer.is_fast:
            encoded = [self._as_text(each)[0] if plain else self._ordinary([each])[0] for each in accumulate(parts)]
            return encoded[-1], _owners_without_offsets(encoded)
        if plain:
            ids, ends = self._as_text(text)
        else:
            called = self._call(text, return_offsets_mapping=True)
            own = self._without_added(called["input_ids"])
            ids, ends = called["input_ids"][own], [end for _, end in called["offset_mapping"][own]]
        return ids, _owners(ends, parts)

    def chat(self, messages: Sequence[Mapping[str, Any]], prompt: int | None = None, **options: Any) -> tuple[list[int], list[int]]:
        """Encode a conversation by the chat template.

        Returns token ids, and the part of each: 0 for the first `prompt` messages and the header of their answer, 1 behind. The template
        writes all control tokens, BOS included; those in contents are text.
        """
        if not self.tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template: use plain prompts and answers, or set one")
        contents = [_contents(message) for message in messages]
        plain = [self._has_control_tokens(text) for text in contents]
        marked = any(plain) and self.special_tokens == "text"
        shown = [_replaced(message, self._hidden) if marked else dict(message) for message in messages]
        whole = str(self.tokenizer.apply_chat_template(shown, tokenize=False, **options))
        head = ""
        if prompt is not None:
            head = str(self.tokenizer.apply_chat_template(shown[:prompt], add_generation_prompt=True, tokenize=False, **options))
            if not whole.startswith(head):
                raise InputError("this chat template rewrites earlier turns: use plain prompts and answers")
        parts = [head, whole[len(head) :]]
        if marked:
            return self._chat_as_text([self._shown(part) for part in parts])
        if not self.tokenizer.is_fast:
            encoded = [self._call(text, add_special_tokens=False)["input_ids"] for text in (head, whole)]
            return encoded[-1], _owners_without_offsets(encoded)
        called = self._call(whole, add_special_tokens=False, return_offsets_mapping=True)
        return called["input_ids"], _owners([end for _, end in called["offset_mapping"]], parts)

    def describe(self) -> bytes:
        """Return bytes that determine the tokens of a text, for digests."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        described = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        return f"{described}|{tokenizer.eos_token_id}|{tokenizer.bos_token_id}|{self.special_tokens}".encode()

    def warn_of_control_tokens(self, where: str) -> None:
        """Log once how control tokens were encoded, if any were found. where: the purpose of the texts, first words of the line."""
        if self._told or not self.found:
            return
        self._told, found = True, self.found
        listed = ", ".join(f"{token!r} {count:,} times" for token, count in found.most_common(3))
        more = f" and {len(found) - 3} others" if len(found) > 3 else ""
        kept = self.special_tokens == "tokens"
        fate = "kept as tokens, by special_tokens=tokens" if kept else "encoded as plain text; special_tokens=tokens keeps them"
        logger.warning(f"{where}: control tokens stand in the text ({listed}{more}): {fate}")

    def count_control_tokens(self, texts: Iterable[str]) -> None:
        """Count the control tokens of texts that are not encoded again, because they come from a cache."""
        for text in texts:
            contents = [_contents(message) for message in text.chat.messages] if isinstance(text, Rendered) else [text]
            for content in contents:
                self.found += self.count(content)

    def count(self, text: str) -> Counter[str]:
        """Count each control token in a text."""
        return Counter(self._pattern.findall(text))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(token) for token in sorted(self.control, key=len, reverse=True)) or r"(?!)")

    def _has_control_tokens(self, text: str) -> bool:
        found = self.count(text)
        self.found += found
        return bool(found)

    def _call(self, text: Any, **options: Any) -> Any:
        return self.tokenizer(text, verbose=False, **options)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """Return the tokens that the tokenizer writes before and behind a text."""
        whole, body = self._call("a")["input_ids"], self._call("a", add_special_tokens=False)["input_ids"]
        at = next((at for at in range(len(whole) - len(body) + 1) if whole[at : at + len(body)] == body), 0)
        return list(whole[:at]), list(whole[at + len(body) :])

    def _without_added(self, ids: Sequence[int]) -> slice:
        """Return the slice without the tokens written behind the text, and with BOS once if the text begins with it too."""
        begin, behind = self._around
        last = len(ids) - len(behind) if behind and list(ids[-len(behind) :]) == behind else len(ids)
        return slice(len(begin) if begin and list(ids[: 2 * len(begin)]) == [*begin, *begin] else 0, last)

    def _ordinary(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids[self._without_added(ids)] for ids in self._call(list(texts))["input_ids"]] if texts else []

    @cached_property
    def _names(self) -> dict[str, str]:
        """Return a private name for each control token, for texts in which its real name is plain text."""
        return {token: f"{MARK}{number}\uf8ff" for number, token in enumerate(self.control)}

    @cached_property
    def _twin(self) -> Tokenizer:
        """Return a copy of the tokenizer whose control tokens have private names and the same ids.

        No text contains these names. So no control token is matched, neither as an added token nor as a word of a unigram vocabulary.
        """
        from tokenizers import Tokenizer

        described = json.loads(self.tokenizer.backend_tokenizer.to_str())
        described["truncation"] = described["padding"] = None
        for token in described["added_tokens"]:
            if token["content"] in self._names:
                token |= {"content": self._names[token["content"]], "normalized": False}
        model, names = described["model"], self._names
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
        else:
            model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if "merges" in model:
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
        return Tokenizer.from_str(json.dumps(described))

    def _as_text(self, text: str) -> tuple[list[int], list[int]]:
        """Encode a text with names of control tokens as text, behind `begin`. Returns ids, and end offsets if the tokenizer is fast."""
        if not self.tokenizer.is_fast:
            return [*self.begin, *self._letters(text)], []
        encoded = self._twin.encode(text)
        own = self._without_added(encoded.ids)
        return encoded.ids[own], [end for _, end in encoded.offsets[own]]

    def _letters(self, text: str) -> list[int]:
        """Do the same with a slow tokenizer, without `begin`."""
        for options in ({}, {"split_special_tokens": True}):
            ids = self._call(text, add_special_tokens=False, **options)["input_ids"]
            if not self._control_ids & set(ids):
                return ids
        named = ", ".join(map(repr, self.count(text)))
        raise InputError(f"{named} cannot be plain text to {type(self.tokenizer).__name__}: take it out, or set special_tokens=tokens")

    @cached_property
    def _control_ids(self) -> set[int]:
        """Return the ids of control tokens, without the unknown token, which plain text may become."""
        return {*self.control.values()} - {self.tokenizer.unk_token_id}

    def _hidden(self, text: str) -> str:
        """Replace control tokens in a message by placeholders, which `_shown` turns back."""
        numbers = {token: number for number, token in enumerate(self.control)}
        return self._pattern.sub(lambda match: f"{MARK}-{numbers[match[0]]}\uf8ff", text)

    def _shown(self, rendered: str) -> str:
        """Rename the template's control tokens to those of `_names`, and turn placeholders back into text."""
        tokens = list(self.control)
        renamed = self._pattern.sub(lambda match: self._names[match[0]], rendered)
        return re.sub(f"{MARK}-([0-9]+)\uf8ff", lambda match: tokens[int(match[1])], renamed)

    def _chat_as_text(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        if self.tokenizer.is_fast:
            encoded = self._twin.encode("".join(parts), add_special_tokens=False)
            return encoded.ids, _owners([end for _, end in encoded.offsets], parts)
        numbers = {self._names[token]: number for token, number in self.control.items()}
        split = re.compile("(" + "|".join(map(re.escape, numbers)) + ")")
        ids: list[int] = []
        owners: list[int] = []
        for owner, part in enumerate(parts):
            for piece in filter(None, split.split(part)):
                ids += [numbers[piece]] if piece in numbers else self._letters(piece)
            owners += [owner] * (len(ids) - len(owners))
        return ids, owners


def _owners(ends: Sequence[int], parts: Sequence[str]) -> list[int]:
    """Return the part in which each token ends, from its end offset in the joined parts."""
    lengths = [len("".join(parts[: number + 1])) for number in range(len(parts) - 1)]
    return [sum(end > length for length in lengths) for end in ends]


def _owners_without_offsets(encoded: Sequence[Sequence[int]]) -> list[int]:
    """Do the same for a tokenizer without offsets. A part's tokens start where the ids with it first differ from the ids without it.

    encoded: ids of the first part, of the first two joined, and so on
    """
    owners = [0] * len(encoded[-1])
    for part, before in enumerate(encoded[:-1], 1):
        same = next((at for at, (one, other) in enumerate(zip(before, encoded[-1], strict=False)) if one != other), len(before))
        owners[same:] = [part] * (len(owners) - same)
    return owners


def _contents(message: Mapping[str, Any]) -> str:
    return "\n".join(value for value in message.values() if isinstance(value, str))


def _replaced(message: Mapping[str, Any], change: Any) -> dict[str, Any]:
    return {key: change(value) if isinstance(value, str) else value for key, value in message.items()}

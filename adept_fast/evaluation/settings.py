"""The settings of evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adept_fast.data.sources import Source
from adept_fast.errors import InputError
from adept_fast.settings.validation import COUNT, Range, declare, prefixed, shown

NAME = re.compile(r"[\w-]+")


class PromptText(str):
    """A prompt: any text that is not blank, of several lines perhaps."""

    @classmethod
    def of(cls, value: Any) -> PromptText:
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"a prompt is text, found {shown(value)}")
        return cls(value)


@dataclass(frozen=True)
class Further(Source):
    """A further corpus. held_out: measure only the documents that a run with this source as its domain holds out."""

    held_out: bool = False


class FurtherCorpora(dict[str, Further]):
    """Further corpora by name."""

    @classmethod
    def of(cls, value: Any) -> FurtherCorpora:
        if not isinstance(value, Mapping):
            raise InputError(f"a table of names and sources, such as {{law: law.jsonl}}, found {shown(value)}")
        for name in value:
            if not isinstance(name, str) or not NAME.fullmatch(name) or name in ("general", "domain"):
                raise InputError(f"{shown(name)} is no name for a further corpus: letters, digits, - and _, and neither general nor domain")
        found = cls()
        for name, source in value.items():
            with prefixed(f"{name}."):
                found[name] = Further.of(source)
        return found


@dataclass(frozen=True)
class Eval:
    general: Source | None = declare(None, meaning="file with questions or texts; null: the part of the probe that only reports")
    domain: Source | None = declare(None, meaning="null: the held-out documents")
    also: FurtherCorpora | None = declare(
        None, meaning="{law: law.jsonl}: further corpora by name; {law: {path: law.txt, held_out: true}}: what a run on it held out"
    )
    max_items: int | None = declare(None, COUNT, "of each")
    general_limit: float | None = declare(
        None, Range(0), "nats per token that general loss may rise: eval then finds the largest strength alpha of the copies within it"
    )
    prompts: tuple[PromptText, ...] | None = declare(
        None, meaning="for base and tuned model to answer; null: openings of held-out documents and general questions; []: none"
    )
    answer_tokens: int = declare(48, COUNT, "of each answer, at most")
    tasks: tuple[str, ...] = declare((), meaning="of lm-eval, for base and tuned model: [arc_easy, hellaswag]; needs adept-fast[eval]")
    tasks_limit: int | None = declare(None, COUNT, "items of each task")
    tasks_include_path: str | None = declare(None, meaning="folder with YAML files of your own tasks")

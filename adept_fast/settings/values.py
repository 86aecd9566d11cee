"""How a value is written, in a recipe and behind key= on the command line.

What a key takes decides how its value is read, not what the value looks like:

- text (names, paths, patterns): as it stands, "#", ":", "*", "~" and leading zeros included; spaces around it are dropped;
- a number: decimal, 3, 1_000, 0.5, 1e-4; 010 is ten;
- true or false: true, yes, on; false, no, off;
- nothing: null, or no text at all; ~ too, where text is not taken;
- a list: [3, 7]; one entry needs no brackets; a table: {parameters: 0.15}; both as YAML has them, but that # begins no comment behind key=;
- "..." or '...': text, whatever it looks like.

YAML 1.1 would read no as false, 010 as 8, 1e-4 as text, 1:30 as 90 and 2024-01-01 as a date.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adept_fast.runtime.yaml_text import Written, parsed
from adept_fast.settings.validation import alternatives, options

WHOLE = re.compile(r"[-+]?[0-9]+(_[0-9]+)*", re.ASCII)
DECIMAL = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.?(inf|nan)", re.ASCII | re.IGNORECASE)
NOTHING = ("", "null", "Null", "NULL", "~")
TRUTHS = {**dict.fromkeys(("true", "yes", "on"), True), **dict.fromkeys(("false", "no", "off"), False)}
HASH = "\ufdd0"  # stands for "#" while YAML reads a value: a character that no text has


def given(text: str, key: str) -> Any:
    """The value behind key=. Raises InputError for brackets or quotes with no YAML in them."""
    text = text.strip()
    enclosed = len(text) > 1 and text[0] + text[-1] in ("[]", "{}", '""', "''")
    if not enclosed:
        return Written(text)
    return _with_hashes(parsed(text.replace("#", HASH), f"{key}: the value is", as_written=True))


def _with_hashes(value: Any) -> Any:
    if isinstance(value, str):
        return type(value)(value.replace(HASH, "#"))
    if isinstance(value, list):
        return [_with_hashes(entry) for entry in value]
    return {_with_hashes(key): _with_hashes(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def read(value: Any, hint: Any = Any) -> Any:
    """The value, where it is Written (or holds what is) in the form that the type hint takes; what is none of its forms stays text."""
    if isinstance(value, Mapping):
        return {_plain(key): read(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [read(entry) for entry in value]
    return _scalar(value, hint) if isinstance(value, Written) else value


def _plain(key: Any) -> Any:
    return str(key) if isinstance(key, Written) else key


def _scalar(text: Written, hint: Any) -> Any:
    kinds = alternatives(options(hint)[0])
    anything = Any in kinds
    is_text = str in kinds and not anything
    if text in (NOTHING[:2] if is_text else NOTHING):
        return None
    if (anything or bool in kinds) and text.lower() in TRUTHS:
        return TRUTHS[text.lower()]
    if (anything or int in kinds or float in kinds) and WHOLE.fullmatch(text) and len(text) < 100:
        return int(text)
    if (anything or float in kinds) and DECIMAL.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan").replace("_", ""))
    return str(text)


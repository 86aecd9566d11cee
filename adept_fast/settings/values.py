"""Parses values in recipes and after key= on the command line.

The type of a setting decides how its value is parsed, not the look of the value:

- text (names, paths, patterns): verbatim, with "#", ":", "*", "~" and leading zeros; surrounding spaces are dropped;
- numbers: decimal, such as 3, 1_000, 0.5, 1e-4; 010 is ten;
- booleans: true, yes, on; false, no, off;
- None: null or nothing at all; also ~ if the setting takes no text;
- lists: [3, 7], or one entry without brackets; tables: {parameters: 0.15}. Both as in YAML, except that # after key= begins no comment;
- "..." or '...': always text.

YAML 1.1 would read no as false, 010 as 8, 1e-4 as text, 1:30 as 90 and 2024-01-01 as a date.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adept_fast.runtime.yaml_text import PlainScalar, parse_yaml
from adept_fast.settings.validation import alternatives, options

WHOLE = re.compile(r"[-+]?[0-9]+(_[0-9]+)*", re.ASCII)
DECIMAL = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.?(inf|nan)", re.ASCII | re.IGNORECASE)
NOTHING = ("", "null", "Null", "NULL", "~")
TRUTHS = {**dict.fromkeys(("true", "yes", "on"), True), **dict.fromkeys(("false", "no", "off"), False)}
HASH = "\ufdd0"  # replaces "#" while YAML parses a value; no text has this noncharacter


def parse_value(text: str, key: str) -> Any:
    """Parse the text after key=. Raises InputError for malformed YAML in brackets or quotes."""
    text = text.strip()
    enclosed = len(text) > 1 and text[0] + text[-1] in ("[]", "{}", '""', "''")
    if not enclosed:
        return PlainScalar(text)
    return _with_hashes(parse_yaml(text.replace("#", HASH), f"{key}: the value is", plain_scalars=True))


def _with_hashes(value: Any) -> Any:
    if isinstance(value, str):
        return type(value)(value.replace(HASH, "#"))
    if isinstance(value, list):
        return [_with_hashes(entry) for entry in value]
    return {_with_hashes(key): _with_hashes(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def read(value: Any, hint: Any = Any) -> Any:
    """Convert each PlainScalar in a value to the type hint. One that cannot be converted stays text."""
    if isinstance(value, Mapping):
        return {_plain(key): read(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [read(entry) for entry in value]
    return _scalar(value, hint) if isinstance(value, PlainScalar) else value


def _plain(key: Any) -> Any:
    return str(key) if isinstance(key, PlainScalar) else key


def _scalar(text: PlainScalar, hint: Any) -> Any:
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


"""What can go wrong because of what the user gave, told apart from what goes wrong by itself."""

from __future__ import annotations

import re
from collections.abc import Mapping


class InputError(ValueError):
    """Bad usage or input: the message names the file, line or argument and the way out (exit code 2).

    arguments: those that the message names, as the caller of the function that raises it wrote them; the first is the one at fault.
    """

    arguments: tuple[str, ...] = ()

    def __init__(self, message: str, *arguments: str) -> None:
        super().__init__(message)
        self.arguments = arguments

    def rename(self, names: Mapping[str, str]) -> None:
        """Call arguments by other names, as somebody knows them who wrote keys of a recipe: each where the message first names it."""
        message = str(self)
        for name in self.arguments:
            key = names.get(name, name)
            message = re.sub(rf"(?<![\w.]){re.escape(name)}(?!\w)", lambda _, key=key: key, message, count=1)
        self.args = (message,)
        self.arguments = tuple(names.get(name, name) for name in self.arguments)


class UnsupportedFamilyError(InputError):
    """A model whose layers cannot be found, or whose copies cannot be made silent."""


class ExpansionError(RuntimeError):
    """An expanded model that does not compute what its base computes."""


class ForeignOriginalsError(ExpansionError, InputError):
    """A checkpoint whose originals are not those that its record names: the proof fails because of what was given."""

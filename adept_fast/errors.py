"""What can go wrong because of what the user gave, told apart from what goes wrong by itself."""

from __future__ import annotations


class InputError(ValueError):
    """Bad usage or input: the message names the file, line or key and the way out (exit code 2)."""


class UnsupportedFamilyError(InputError):
    """A model whose layers cannot be found, or whose copies cannot be made silent."""


class ExpansionError(RuntimeError):
    """An expanded model that does not compute what its base computes."""


class ForeignOriginalsError(ExpansionError, InputError):
    """A checkpoint whose originals are not those that its record names: the proof fails because of what was given."""

"""Exceptions for faults of the input, as opposed to faults of the program."""

from __future__ import annotations

import re
from collections.abc import Mapping


class InputError(ValueError):
    """Report wrong input. The message is one line: the file, line or argument at fault, and how to fix it. The CLI exits with code 2.

    Args:
        message: that line.
        arguments: names of the arguments in the message, as the caller wrote them, the one at fault first.

    >>> try:
    ...     AdamW(model.parameters(), lr=-1.0)
    ... except InputError as error:
    ...     print(error)
    Invalid learning rate: -1.0
    """

    arguments: tuple[str, ...] = ()

    def __init__(self, message: str, *arguments: str) -> None:
        super().__init__(message)
        self.arguments = arguments

    def rename(self, names: Mapping[str, str]) -> None:
        """Replace names of arguments by the recipe keys that the user wrote, each at its first place in the message."""
        message = str(self)
        for name in self.arguments:
            key = names.get(name, name)
            message = re.sub(rf"(?<![\w.]){re.escape(name)}(?!\w)", key.replace("\\", r"\\"), message, count=1)
        self.args = (message,)
        self.arguments = tuple(names.get(name, name) for name in self.arguments)


class UnsupportedFamilyError(InputError):
    """A model family that cannot be scored or expanded: no decoder layers were found, or its copies cannot be made silent.

    Args:
        message, arguments: as of InputError.

    >>> from transformers import AutoModelForCausalLM, BertConfig
    >>> bert = AutoModelForCausalLM.from_config(BertConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4))
    >>> try:
    ...     expand_model(bert, [3])
    ... except UnsupportedFamilyError as error:
    ...     print(error)
    bert: cannot be expanded: layer 0: ...
    """


class ExpansionError(RuntimeError):
    """Report that logits or weights of an expanded model differ from those of its base. The message has the largest difference.

    >>> expanded = expand_model(model, [1])
    >>> with torch.no_grad():  # layer 2 is the copy, and no longer silent
    ...     _ = expanded.get_decoder().layers[2].mlp.down_proj.weight.fill_(1.0)
    >>> try:
    ...     verify_expansion(model, expanded)
    ... except ExpansionError as error:
    ...     print(error)
    the expanded model does not compute what its base computes in one forward: largest logit difference ...
    """


class ForeignOriginalsError(ExpansionError, InputError):
    """A checkpoint whose original layers are not those of the base in its record, because other files were put there."""

"""Run an expanded model as its base: its copies are bypassed, and the residual stream passes them unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import Tensor, nn

from adept_fast.expansion.expand_model import copies
from adept_fast.models.decoder_layers import replaced_forward, with_hidden
from adept_fast.models.unwrap import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PLAIN: WeakSet[nn.Module] = WeakSet()  # layers that return the hidden states alone: their own forward need not run


@contextmanager
def bypassed(model: PreTrainedModel) -> Iterator[None]:
    """Bypass the copies of the last expansion while inside, trained or not.

    The logits are then those of the model before that expansion, bit for bit.
    """
    with ExitStack() as stack:
        for layer in copies(unwrapped(model)):
            stack.enter_context(replaced_forward(layer, _identity(layer)))
        yield


def _identity(layer: nn.Module) -> Any:
    """Return a forward that gives back its input, in the output type of the layer's own forward."""
    forward = layer.forward

    def identity(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if layer not in _PLAIN:
            output = forward(hidden, *args, **kwargs)
            if not isinstance(output, Tensor):
                return with_hidden(output, hidden)
            _PLAIN.add(layer)
        return hidden

    return identity

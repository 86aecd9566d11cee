"""The model before its copies, inside the expanded one: the trained copies are bypassed, and the residual stream passes unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import Tensor, nn

from adept_fast.expansion.expand_model import copies
from adept_fast.models import replaced_forward, unwrapped, with_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PLAIN: WeakSet[nn.Module] = WeakSet()  # layers seen to return hidden states and nothing else: their own forward need not run


@contextmanager
def bypassed(model: PreTrainedModel) -> Iterator[None]:
    """For the time being `model` computes what it computed before its last expansion, trained or not: the same logits, bit for bit."""
    with ExitStack() as stack:
        for layer in copies(unwrapped(model)):
            stack.enter_context(replaced_forward(layer, _passing(layer)))
        yield


def _passing(layer: nn.Module) -> Any:
    """A forward that hands its input on, in the kind of output that the layer's own has."""
    forward = layer.forward

    def passing(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if layer not in _PLAIN:
            output = forward(hidden, *args, **kwargs)
            if not isinstance(output, Tensor):
                return with_hidden(output, hidden)
            _PLAIN.add(layer)
        return hidden

    return passing

"""AdamW over host memory: the copy of a parameter there, its update, and the update undone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adept_fast.optim.adamw import AdamW
from adept_fast.optim.transfers import Copied, Transfers
from adept_fast.optim.update_collection import StepUpdates

BUCKET = 2**26  # bytes of gradients, at least, that one call updates: it costs a look at every parameter


@dataclass(eq=False)
class HostCopy:
    """A parameter and its gradient in host memory.

    param: the parameter, on its device.
    states: the state of each parameter of the optimizer, in host memory.
    weight: the parameter as of its last update or edit.
    grad: memory of the gradient, which holds it once `copied` is complete.
    arrived, expected: how many gradients backward has added since the last step, and how many it had before that step.
    stamp: version and address of `param` when `weight` was equal to it.
    ahead: whether weight and state are updated before step().
    kept: each tensor that was updated ahead, and what it was.
    """

    param: Tensor
    states: defaultdict[Any, Any]
    transfers: Transfers
    weight: Tensor
    grad: Tensor
    copied: Copied | None = None
    arrived: int = 0
    expected: int = 0
    stamp: tuple[int, int] = (-1, -1)
    ahead: bool = False
    kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, param: Tensor, states: defaultdict[Any, Any], transfers: Transfers) -> HostCopy:
        weight = transfers.host_like(param, param.dtype)
        if hasattr(weight, "grad_dtype"):  # torch 2.9: a gradient may have a dtype of its own
            weight.requires_grad_().grad_dtype = None
        return cls(param, states, transfers, weight, torch.empty(0, dtype=torch.bool))

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.states[self.param]
        return found

    def download(self, grad: Tensor) -> tuple[Tensor, Copied]:
        """Copy a gradient into `self.grad`, or into other memory if that holds earlier ones. Returns the memory and its event."""
        if self.arrived or self.grad.dtype != grad.dtype:
            memory = self.transfers.host_like(self.param, grad.dtype)
            self.grad = self.grad if self.arrived else memory
        else:
            memory = self.grad
        return memory, self.transfers.download(memory, grad)

    def edited(self) -> bool:
        """Whether the parameter was edited or moved since `weight` was equal to it. An edit through `.data` is not seen."""
        return self.stamp != (self.param._version, self.param.data_ptr())

    def note_equal(self) -> None:
        self.stamp = (self.param._version, self.param.data_ptr())

    def take_edit(self) -> None:
        """Copy an edited parameter to the host. One that only moved keeps its remainder, which an edit of `weight` resets."""
        target = self.weight if self.param._version != self.stamp[0] else self.weight.data
        self.transfers.download(target, self.param).synchronize()
        self.note_equal()

    def keep(self) -> None:
        """Keep weight and state for `undo`, in memory that later steps use again."""
        now = {key: value for key, value in self.state.items() if isinstance(value, Tensor)} | {"weight": self.weight.data}
        earlier, self.kept = self.kept, {}
        for key, tensor in now.items():
            memory = earlier[key][1] if key in earlier else None
            if memory is None or (memory.dtype, memory.shape) != (tensor.dtype, tensor.shape):
                memory = torch.empty_like(tensor)
            self.kept[key] = tensor, memory.copy_(tensor)
        self.ahead = True

    def undo(self) -> None:
        """Restore what `keep` kept, if the update ran ahead."""
        if self.ahead:
            for tensor, before in self.kept.values():
                tensor.copy_(before)
            for key in self.state.keys() - self.kept.keys():
                del self.state[key]
            self.ahead = False

    def replaced(self) -> bool:
        """Whether the update ran ahead with a state tensor that has been exchanged since."""
        return self.ahead and any(self.state.get(key) is not tensor for key, (tensor, _) in self.kept.items() if key != "weight")

    def upload(self) -> None:
        """Copy the updated weight to the device. The gradients are used up."""
        self.transfers.upload(self.param, self.weight)
        self.note_equal()
        self.expected, self.arrived, self.ahead = self.arrived, 0, False


class HostAdamW(AdamW):
    """AdamW over the weights of host copies: of some at a time, with gradients scaled by what is given."""

    given_scale: Tensor | None = None

    def __init__(self) -> None:
        super().__init__([{"params": []}])
        self._no_weight = torch.empty(0)

    def _scale(self, updates: StepUpdates) -> Tensor | None:
        return self.given_scale

    def follow(self, optimizer: AdamW, copies: dict[Tensor, HostCopy]) -> None:
        """Take the groups and settings of the optimizer over the parameters. Positions stay: they seed stochastic rounding."""
        self.state_dtype, self.master_weights, self.backend = optimizer.state_dtype, optimizer.master_weights, optimizer.backend
        self.param_groups = [
            {key: value.to("cpu", copy=True) if isinstance(value, Tensor) else value for key, value in group.items()}
            | {"params": [copies[param].weight if param in copies else self._no_weight for param in group["params"]]}
            for group in optimizer.param_groups
        ]

    def update(self, copies: Sequence[HostCopy], scale: Tensor | None, check_only: bool = False) -> None:
        """Update weights and states of `copies` by their gradients times `scale`.

        check_only: create missing states, and raise the error of a state that does not fit; update nothing.
        """
        self.given_scale, self.found_inf = scale, torch.ones(()) if check_only else None
        for copy in copies:
            copy.weight.grad, self.state[copy.weight] = copy.grad, copy.state
        try:
            self.step()
        finally:
            for copy in copies:
                copy.weight.grad = None


def is_bucket(copies: Sequence[HostCopy]) -> bool:
    return sum(copy.grad.nbytes for copy in copies) >= BUCKET


def buckets(copies: Sequence[HostCopy]) -> Iterator[list[HostCopy]]:
    """Divide copies into buckets, and a rest."""
    bucket: list[HostCopy] = []
    for copy in copies:
        bucket.append(copy)
        if is_bucket(bucket) or copy is copies[-1]:
            yield bucket
            bucket = []

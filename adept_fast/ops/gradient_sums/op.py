"""Sums of gradients, taken by hooks while backward runs. Each gradient is freed as soon as it is summed.

    per backward   sum g^2, sum |theta g|, sum theta g     for each index of a dimension, over all others; accumulated in fp64
    running        sum of the gradients themselves, fp32, if asked for

At any time one gradient is in memory, beside the running sums. Nothing waits for the device until `read`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adept_fast.errors import InputError
from adept_fast.ops import dispatch
from adept_fast.ops.number_formats import accumulator
from adept_fast.runtime import distributed
from adept_fast.runtime.dtensor import all_reduced, local, shard_of

if TYPE_CHECKING:
    from adept_fast.ops.gradient_sums.cpu import NativeGradientSums

Sums = tuple[Tensor, Tensor, Tensor]
"""sum g^2, sum |theta g| and sum theta g, [indices] each."""
NATIVE_DTYPES = {torch.float32, torch.bfloat16, torch.float16}  # of C++ and of the kernel for vectors
Dims = int | tuple[int, int]
"""A dimension, or two adjacent ones as one: the experts and rows of [experts, rows, columns]."""


@dataclass
class _ParameterSums:
    """The sums of one parameter.

    shape: of this process's part.
    sums: dimension -> fp64 [kinds, indices], kinds being 1 (g^2) or 3 (g^2, |theta g|, theta g).
    running: sum of its gradients.
    seen: whether the current backward has produced its gradient.
    small: gradient of a vector, summed with those of all others after the backward.
    """

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    sums: dict[Dims, Tensor]
    running: Tensor | None
    native: NativeGradientSums | None
    seen: bool = False
    small: Tensor | None = field(default=None, repr=False)

    def take(self, parameter: nn.Parameter) -> None:
        """Sum the gradient: the hook. It is short because Python runs six times slower after a matrix product has evicted its caches."""
        gradient, parameter.grad = parameter.grad, None
        if self.seen:
            raise InputError(
                f"{self.name}: backward produced its gradient in several parts, as reentrant activation checkpointing does; "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        self.seen = True
        assert gradient is not None
        gradient, theta = _part(gradient, parameter), _part(parameter)
        _require_same_shape(self.name, self.shape, theta, gradient)
        if self.native is not None:
            self.native.add(theta, gradient)
        elif gradient.ndim == 1:
            self.small = gradient
        else:
            _add(self.sums, theta, gradient, self.running)


def _part(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return this process's part; a scalar as a vector of one element."""
    part = local(tensor, like)
    return part if part.ndim else part.view(1)


def _require_same_shape(name: str, shape: Sequence[int], parameter: Tensor, gradient: Tensor) -> None:
    """Raise InputError unless shapes and devices match. A parameter's data may have been replaced, and backends check nothing."""
    if not (parameter.shape == gradient.shape == shape and parameter.device == gradient.device and not parameter.is_meta):
        wanted = f"a parameter and a gradient of shape {tuple(shape)} on one device that is not meta"
        found = " and ".join(f"{tuple(x.shape)} on {x.device}" for x in (parameter, gradient))
        raise InputError(f"{name}: expected {wanted}, found {found}")


def gradient_sums(parameter: Tensor, gradient: Tensor, dim: int) -> Sums:
    """Sum over all dimensions but `dim`, by the backend of the device: sum g^2, sum |theta g|, sum theta g, fp32 [parameter.shape[dim]].

    Raises InputError for dtypes, shapes or devices that do not match.
    """
    if not (parameter.is_floating_point() and gradient.is_floating_point() and -parameter.ndim <= dim < parameter.ndim):
        found = f"{parameter.dtype} of shape {tuple(parameter.shape)}, {gradient.dtype} and {dim}"
        raise InputError(f"expected a floating-point parameter and gradient, and one of their dimensions, found {found}")
    _require_same_shape("parameter", parameter.shape, parameter, gradient)
    chosen = dispatch.resolve("gradient_sums", parameter.device)
    if chosen == "cpu" and not {parameter.dtype, gradient.dtype} <= NATIVE_DTYPES:
        chosen = "torch"
    sums: Sums = dispatch.implementation("gradient_sums", chosen).gradient_sums(parameter, gradient, dim)
    return sums


class GradientSums:
    """Sums gradients of parameters by hooks, which are active inside `with`. To be used inside `only_these_require_grad`.

    parameters: by name.
    dims: name -> dimensions whose indices get a sum each.
    products: whether to sum |theta g| and theta g too.
    running: whether to sum the gradients themselves.

    Of a DTensor each process sums its own part, and `read` combines them. All processes must then run the same batches, because FSDP
    averages gradients over processes.
    """

    @torch.no_grad()
    def __init__(self, parameters: Mapping[str, nn.Parameter], dims: Mapping[str, Sequence[Dims]], products: bool, running: bool) -> None:
        self._sums: list[_ParameterSums] = []
        for name, parameter in parameters.items():
            part = _part(parameter.detach())
            kinds = 3 if products else 1
            sums = {dim: torch.zeros(kinds, _length(part.shape, dim), dtype=torch.float64, device=part.device) for dim in dims[name]}
            total = torch.zeros_like(part, dtype=accumulator(part), memory_format=torch.contiguous_format) if running else None
            self._sums.append(_ParameterSums(name, parameter, part.shape, sums, total, _native(part, sums, total)))
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> GradientSums:
        for entry in self._sums:
            self._handles.append(entry.parameter.register_post_accumulate_grad_hook(entry.take))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def backward(self, loss: Tensor) -> None:
        for sums in self._sums:
            sums.seen = False
        loss.backward()
        self._add_vectors()

    @torch.no_grad()
    def _add_vectors(self) -> None:
        """Sum the gradients of all vectors at once: a launch for each would take longer than its work."""
        waiting: dict[torch.device, list[tuple[_ParameterSums, Tensor]]] = {}
        for entry in self._sums:
            if entry.small is not None:
                waiting.setdefault(entry.small.device, []).append((entry, entry.small))
        for device, small in waiting.items():
            if dispatch.resolve("gradient_sums", device) == "triton" and all(_is_plain(each, gradient) for each, gradient in small):
                kernels = dispatch.implementation("gradient_sums", "triton")
                vectors = [(_part(each.parameter.detach()), gradient, each.sums[0], each.running) for each, gradient in small]
                kernels.add_vectors([kernels.Vector(*vector) for vector in vectors])
            else:
                _add_small(small)
            for entry, _ in small:
                entry.small = None

    @torch.no_grad()
    def read(self, tokens: int, shared: bool = False) -> dict[tuple[str, Dims], tuple[Tensor, Tensor]]:
        """Return the sums over all backwards, on the CPU.

        tokens: number that the running sum is divided by.
        shared: the backwards were distributed over processes; every process gets the sums over all.

        Returns (name, dimension) -> (fp64 [kinds, indices], sum |theta g| of the running sum / tokens, fp64 [indices]).
        Without a running sum the second is 0.
        """
        if shared:
            self._sum_over_processes()
        keys, parts = [], []
        for entry in self._sums:
            theta = _part(entry.parameter.detach())
            if entry.running is not None:
                _require_same_shape(entry.name, entry.shape, theta, entry.running)
            taylor = {dim: torch.zeros(3, sums.shape[1], dtype=torch.float64, device=sums.device) for dim, sums in entry.sums.items()}
            if entry.running is not None:
                native = _native(theta, taylor, None)
                _add(taylor, theta, entry.running, None) if native is None else native.add(theta, entry.running)
            for dim, sums in entry.sums.items():
                keys.append((entry.name, dim))
                parts.append(whole_sums(torch.cat([sums, taylor[dim][1:2] / tokens]), entry.parameter, dim))
        flat = torch.cat([part.flatten().to(parts[0].device) for part in parts]).cpu()  # the only synchronisation
        host = [values.view(part.shape) for values, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True)]
        return {key: (values[:-1], values[-1]) for key, values in zip(keys, host, strict=True)}

    @torch.no_grad()
    def against(self, others: Mapping[str, Tensor]) -> dict[tuple[str, Dims], Tensor]:
        """Compare the running sums g with tensors m: return (name, dimension) -> sums of m g, m^2 and g^2, fp64 [3, indices].

        others: parameter name -> m. To be called after `read`, which sums over processes.
        """
        found = {}
        for entry in self._sums:
            if entry.name in others and entry.running is not None:
                other = _part(others[entry.name])
                _require_same_shape(entry.name, entry.shape, other, entry.running)
                for dim, sums in entry.sums.items():
                    both, own = (torch.zeros(3, sums.shape[1], dtype=torch.float64, device=sums.device) for _ in range(2))
                    _add({dim: both}, other, entry.running, None)
                    _add({dim: own}, other, other, None)
                    parts = torch.stack([both[2], own[0], both[0]])
                    found[entry.name, dim] = whole_sums(parts, entry.parameter, dim)
        return {key: parts.cpu() for key, parts in found.items()}

    def _sum_over_processes(self) -> None:
        for entry in self._sums:
            if entry.running is not None:
                entry.running.copy_(distributed.total(entry.running))
        sums = [sums for entry in self._sums for sums in entry.sums.values()]
        flat = distributed.total(torch.cat([values.flatten() for values in sums]))
        for values, found in zip(sums, flat.split([values.numel() for values in sums]), strict=True):
            values.copy_(found.view_as(values))


def _add_small(small: Sequence[tuple[_ParameterSums, Tensor]]) -> None:
    """Sum the gradients of vectors on one device, in plain torch."""
    sizes = [part.numel() for _, part in small]
    gradient = torch.cat([part.double() for _, part in small])
    theta = torch.cat([_part(entry.parameter.detach()).double() for entry, _ in small])
    found = torch.stack([gradient.square(), (theta * gradient).abs(), theta * gradient]).split(sizes, 1)
    for (entry, part), values in zip(small, found, strict=True):
        entry.sums[0] += values[: len(entry.sums[0])]
        if entry.running is not None:
            entry.running += part


def _length(shape: Sequence[int], dim: Dims) -> int:
    return shape[dim] if isinstance(dim, int) else shape[dim[0]] * shape[dim[1]]


def _is_plain(entry: _ParameterSums, gradient: Tensor) -> bool:
    """Whether the kernel for vectors supports this parameter and its gradient."""
    tensors = (_part(entry.parameter.detach()), gradient)
    return all(tensor.is_contiguous() and tensor.dtype in NATIVE_DTYPES for tensor in tensors)


def _native(parameter: Tensor, sums: Mapping[Dims, Tensor], running: Tensor | None) -> NativeGradientSums | None:
    """Prepare native code for a parameter's gradients, or return None if it does not support them."""
    supported = parameter.dtype in NATIVE_DTYPES and all(isinstance(dim, int) for dim in sums)
    if not supported or dispatch.resolve("gradient_sums", parameter.device) != "cpu":
        return None
    native: NativeGradientSums = dispatch.implementation("gradient_sums", "cpu").NativeGradientSums(sums, parameter.shape, running)
    return native


def _add(sums: Mapping[Dims, Tensor], parameter: Tensor, gradient: Tensor, running: Tensor | None) -> None:
    """Add a gradient to `sums` (dimension -> fp64 [1 or 3, indices]) and to `running`."""
    for dim, total in sums.items():
        if isinstance(dim, int):
            theta, g, axis = parameter, gradient, dim
        else:
            theta, g, axis = parameter.flatten(*dim), gradient.flatten(*dim), dim[0]
        for kind, found in zip(total, gradient_sums(theta, g, axis), strict=False):
            kind += found
    if running is not None:
        running += gradient


def whole_sums(values: Tensor, parameter: Tensor, dim: Dims) -> Tensor:
    """Reduce sums [kinds, local indices] over the processes that hold parts of a DTensor: [kinds, global indices]."""
    shard = shard_of(parameter)
    if shard is None or shard.mesh is None:
        return values
    axes = (dim,) if isinstance(dim, int) else dim
    total = values.new_zeros(len(values), *(parameter.shape[axis] for axis in axes))
    held = tuple(slice(first, first + count) for first, count in (shard.held[axis] for axis in axes))
    total[:, *held] = values.view(len(values), *(shard.held[axis][1] for axis in axes))
    return all_reduced(total, shard.mesh).flatten(1).to(values.device)

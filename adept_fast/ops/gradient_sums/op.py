"""Sums of gradients along dimensions of their parameters, taken by hooks as backward produces each gradient, which is then freed.

    per backward   sum g^2, sum |theta g|, sum theta g     for each index of a dimension, over all others; added up in fp64
    running        the sum of the gradients themselves, fp32, where asked for

So a backward holds one parameter's gradient at a time, beside the running sums. Nothing waits for the device until `read`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from adept_fast.errors import InputError
from adept_fast.ops import dispatch
from adept_fast.ops.accumulator import accumulator
from adept_fast.runtime import distributed
from adept_fast.runtime.dtensor import local, shard_of

if TYPE_CHECKING:
    from adept_fast.ops.gradient_sums.cpu import SaliencyPass

Sums = tuple[Tensor, Tensor, Tensor]
"""sum g^2, sum |theta g| and sum theta g, one number an index."""
NARROW = {torch.float32, torch.bfloat16, torch.float16}  # what C++ and the kernel of vectors read
Dims = int | tuple[int, int]
"""A dimension, or two adjacent ones taken as one: the experts and rows of [experts, rows, columns]."""


@dataclass
class _Gathered:
    """The sums of one parameter.

    sums: dimension -> fp64 [kinds, indices held here]. running: the sum of its gradients. seen: whether this backward gave one.
    """

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    sums: dict[Dims, Tensor]
    running: Tensor | None
    native: SaliencyPass | None
    seen: bool = False
    small: Tensor | None = field(default=None, repr=False)  # a vector's gradient, until the backward is over

    def take(self, parameter: nn.Parameter) -> None:
        """The hook. As short as can be: behind a product of matrices Python's own code lies in no cache, and takes six times its time."""
        gradient, parameter.grad = parameter.grad, None
        if self.seen:
            raise InputError(
                f"{self.name}: backward handed its gradient on in parts: reentrant activation checkpointing hides how they add up; "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        self.seen = True
        assert gradient is not None
        gradient, theta = _part(gradient, parameter), _part(parameter)
        _require_alike(self.name, self.shape, theta, gradient)
        if self.native is not None:
            self.native.add(theta, gradient)
        elif gradient.ndim == 1:
            self.small = gradient
        else:
            _add(self.sums, theta, gradient, self.running)


def _part(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The part that this process holds; a scalar becomes a vector of one element."""
    part = local(tensor, like)
    return part if part.ndim else part.view(1)


def _require_alike(name: str, shape: Sequence[int], parameter: Tensor, gradient: Tensor) -> None:
    """Raise InputError for a shape or device that differs: backends check nothing, and a parameter's data may have been replaced."""
    if not (parameter.shape == gradient.shape == shape and parameter.device == gradient.device and not parameter.is_meta):
        wanted = f"a parameter and a gradient of shape {tuple(shape)} on one device, with their values"
        found = " and ".join(f"{tuple(x.shape)} on {x.device}" for x in (parameter, gradient))
        raise InputError(f"{name}: expected {wanted}, found {found}")


def saliency_sums(parameter: Tensor, gradient: Tensor, dim: int) -> Sums:
    """sum g^2, sum |theta g| and sum theta g for each index of `dim`, fp32 [parameter.shape[dim]], by the backend that fits the device."""
    if not (parameter.is_floating_point() and gradient.is_floating_point() and -parameter.ndim <= dim < parameter.ndim):
        found = f"{parameter.dtype} of shape {tuple(parameter.shape)}, {gradient.dtype} and {dim}"
        raise InputError(f"sums need a parameter and a gradient of floating point, and one of their dimensions, found {found}")
    _require_alike("parameter", parameter.shape, parameter, gradient)
    chosen = dispatch.resolve("gradient_sums", parameter.device)
    if chosen == "cpu" and not {parameter.dtype, gradient.dtype} <= NARROW:
        chosen = "torch"
    sums: Sums = dispatch.implementation("gradient_sums", chosen).saliency_sums(parameter, gradient, dim)
    return sums


class GradientSums:
    """Hooks on parameters: name -> dimensions. A context manager, which removes them; for use within `only_these_require_grad`.

    products: whether to take |theta g| and theta g too; running: whether to keep the sum of gradients.
    Sharded (DTensor) parameters give the sums of this process's part; every process must run the same sequences, because engines hand on
    gradients averaged over processes. `read` puts the parts together.
    """

    @torch.no_grad()
    def __init__(self, parameters: Mapping[str, nn.Parameter], dims: Mapping[str, Sequence[Dims]], products: bool, running: bool) -> None:
        self._gathered: list[_Gathered] = []
        for name, parameter in parameters.items():
            part = _part(parameter.detach())
            kinds = 3 if products else 1
            sums = {dim: torch.zeros(kinds, _length(part.shape, dim), dtype=torch.float64, device=part.device) for dim in dims[name]}
            kept = torch.zeros_like(part, dtype=accumulator(part), memory_format=torch.contiguous_format) if running else None
            self._gathered.append(_Gathered(name, parameter, part.shape, sums, kept, _native(part, sums, kept)))
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> GradientSums:
        for gathered in self._gathered:
            self._handles.append(gathered.parameter.register_post_accumulate_grad_hook(gathered.take))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def backward(self, loss: Tensor) -> None:
        for gathered in self._gathered:
            gathered.seen = False
        loss.backward()
        self._take_small()

    @torch.no_grad()
    def _take_small(self) -> None:
        """Add the gradients of all vectors at once: a launch for each would take longer than its work."""
        waiting: dict[torch.device, list[tuple[_Gathered, Tensor]]] = {}
        for gathered in self._gathered:
            if gathered.small is not None:
                waiting.setdefault(gathered.small.device, []).append((gathered, gathered.small))
        for device, small in waiting.items():
            if dispatch.resolve("gradient_sums", device) == "triton" and all(_is_plain(each, gradient) for each, gradient in small):
                kernels = dispatch.implementation("gradient_sums", "triton")
                vectors = [(_part(each.parameter.detach()), gradient, each.sums[0], each.running) for each, gradient in small]
                kernels.add_vectors([kernels.Vector(*vector) for vector in vectors])
            else:
                _add_small(small)
            for gathered, _ in small:
                gathered.small = None

    @torch.no_grad()
    def read(self, tokens: int, shared: bool = False) -> dict[tuple[str, Dims], tuple[Tensor, Tensor]]:
        """(name, dimension) -> (sums over all backwards, fp64 [kinds, indices]; sum |theta g| of the running sum / tokens), on the host.

        Without a running sum the second is 0.
        shared: the backwards were shared out over processes, each of which gets the sums over all.
        """
        if shared:
            self._sum_over_processes()
        keys, parts = [], []
        for gathered in self._gathered:
            theta = _part(gathered.parameter.detach())
            if gathered.running is not None:
                _require_alike(gathered.name, gathered.shape, theta, gathered.running)
            taylor = {dim: torch.zeros(3, sums.shape[1], dtype=torch.float64, device=sums.device) for dim, sums in gathered.sums.items()}
            if gathered.running is not None:
                native = _native(theta, taylor, None)
                _add(taylor, theta, gathered.running, None) if native is None else native.add(theta, gathered.running)
            for dim, sums in gathered.sums.items():
                keys.append((gathered.name, dim))
                parts.append(whole_sums(torch.cat([sums, taylor[dim][1:2] / tokens]), gathered.parameter, dim))
        flat = torch.cat([part.flatten().to(parts[0].device) for part in parts]).cpu()  # the one wait for a device
        host = [values.view(part.shape) for values, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True)]
        return {key: (values[:-1], values[-1]) for key, values in zip(keys, host, strict=True)}

    @torch.no_grad()
    def against(self, others: Mapping[str, Tensor]) -> dict[tuple[str, Dims], Tensor]:
        """(name, dimension) -> sums of m g, m^2 and g^2, fp64 [3, indices], g the running sum and m the tensor of that name in `others`.

        To be read after `read`, which sums over processes.
        """
        found = {}
        for gathered in self._gathered:
            if gathered.name in others and gathered.running is not None:
                other = _part(others[gathered.name])
                _require_alike(gathered.name, gathered.shape, other, gathered.running)
                for dim, sums in gathered.sums.items():
                    both, own = (torch.zeros(3, sums.shape[1], dtype=torch.float64, device=sums.device) for _ in range(2))
                    _add({dim: both}, other, gathered.running, None)
                    _add({dim: own}, other, other, None)
                    parts = torch.stack([both[2], own[0], both[0]])
                    found[gathered.name, dim] = whole_sums(parts, gathered.parameter, dim)
        return {key: parts.cpu() for key, parts in found.items()}

    def _sum_over_processes(self) -> None:
        for gathered in self._gathered:
            if gathered.running is not None:
                gathered.running.copy_(distributed.total(gathered.running))
        sums = [sums for gathered in self._gathered for sums in gathered.sums.values()]
        flat = distributed.total(torch.cat([values.flatten() for values in sums]))
        for values, found in zip(sums, flat.split([values.numel() for values in sums]), strict=True):
            values.copy_(found.view_as(values))


def _add_small(small: Sequence[tuple[_Gathered, Tensor]]) -> None:
    """Add the terms of vectors on one device in plain torch."""
    sizes = [part.numel() for _, part in small]
    gradient = torch.cat([part.double() for _, part in small])
    theta = torch.cat([_part(gathered.parameter.detach()).double() for gathered, _ in small])
    found = torch.stack([gradient.square(), (theta * gradient).abs(), theta * gradient]).split(sizes, 1)
    for (gathered, part), values in zip(small, found, strict=True):
        gathered.sums[0] += values[: len(gathered.sums[0])]
        if gathered.running is not None:
            gathered.running += part


def _length(shape: Sequence[int], dim: Dims) -> int:
    return shape[dim] if isinstance(dim, int) else shape[dim[0]] * shape[dim[1]]


def _is_plain(gathered: _Gathered, gradient: Tensor) -> bool:
    """Whether a kernel reads this vector and its gradient as they lie in memory."""
    tensors = (_part(gathered.parameter.detach()), gradient)
    return all(tensor.is_contiguous() and tensor.dtype in NARROW for tensor in tensors)


def _native(parameter: Tensor, sums: Mapping[Dims, Tensor], running: Tensor | None) -> SaliencyPass | None:
    """The native pass over a parameter's gradients, or None where it does not serve them."""
    if dispatch.resolve("gradient_sums", parameter.device) != "cpu" or parameter.dtype not in NARROW or any(map(_is_pair, sums)):
        return None
    native: SaliencyPass = dispatch.implementation("gradient_sums", "cpu").SaliencyPass(sums, parameter.shape, running)
    return native


def _is_pair(dim: Dims) -> TypeGuard[tuple[int, int]]:
    return not isinstance(dim, int)


def _add(sums: Mapping[Dims, Tensor], parameter: Tensor, gradient: Tensor, running: Tensor | None) -> None:
    """Add a gradient's sums along dimensions to `sums`: fp64 [1 or 3, parameter.shape[dimension]] each; and the gradient to `running`."""
    pairs = [*filter(_is_pair, sums)]
    for pair in pairs:
        _add({pair[0]: sums[pair]}, parameter.flatten(*pair), gradient.flatten(*pair), None)
    for dim, total in sums.items():
        if not isinstance(dim, int):
            continue
        for kind, found in zip(total, saliency_sums(parameter, gradient, dim), strict=False):
            kind += found
    if running is not None:
        running += gradient


def whole_sums(values: Tensor, parameter: Tensor, dim: Dims) -> Tensor:
    """Sums of this process's part of a sharded parameter -> of all of it."""
    shard = shard_of(parameter)
    if shard is None or shard.mesh is None:
        return values
    axes = (dim,) if isinstance(dim, int) else dim
    total = values.new_zeros(len(values), *(parameter.shape[axis] for axis in axes))
    held = tuple(slice(first, first + count) for first, count in (shard.held[axis] for axis in axes))
    total[:, *held] = values.view(len(values), *(shard.held[axis][1] for axis in axes))
    kind = shard.mesh.device_mesh.device_type
    if total.device.type != kind:  # offloaded to the CPU, while the collectives may be NCCL's
        total = total.to(kind)
    for mesh_dim in shard.mesh.dims:
        torch.distributed.all_reduce(total, group=shard.mesh.device_mesh.get_group(mesh_dim))
    return total.flatten(1).to(values.device)

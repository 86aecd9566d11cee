"""DTensors: the local part of this process, its place in the global tensor, and sums over the mesh."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from adept_fast.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as ShardPlacement
    from torch.distributed.tensor.placement_types import Placement


class Mesh(NamedTuple):
    """The dimensions of a device mesh over which local sums must be reduced."""

    device_mesh: DeviceMesh
    dims: tuple[int, ...]


class Shard(NamedTuple):
    """The part of a global tensor that this process holds.

    held: (first index, count) for each dimension of the global shape.
    first_index: number of the part's first element, for stochastic rounding. A range of rows, as in FSDP2, has its number in the
        global row-major tensor, so that rounding does not depend on the number of processes. Other parts have k times the global
        number of elements, k being the part's row-major number in the sharding mesh dimensions.
    mesh: the mesh that the tensor is sharded over; None if every process holds all of it.
    """

    held: tuple[tuple[int, int], ...]
    first_index: int
    mesh: Mesh | None

    def multipliers(self, rates: Tensor, dim: int) -> Tensor:
        """Return this part of `rates`, one per index of the global dimensions dim, dim + 1, ..., as a view."""
        for axis in range(rates.ndim):
            rates = rates.narrow(axis, *self.held[dim + axis])
        return rates


_PLAIN = (Parameter, Tensor)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether `tensor` is a DTensor, whatever its placements. Does not import torch.distributed.tensor."""
    module = sys.modules.get("torch.distributed.tensor")  # a DTensor cannot exist without it
    return module is not None and isinstance(tensor, module.DTensor)


def in_shards(model: Module) -> bool:
    """Whether a parameter of the model is a DTensor."""
    return any(map(is_sharded, model.parameters()))


def local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return the local tensor of a DTensor, and other tensors unchanged.

    like: redistribute to the placements of this DTensor first. Tensor parallelism gives a replicated parameter a Partial gradient.
    """
    if type(tensor) in _PLAIN or not is_sharded(tensor):
        return tensor
    if torch.is_grad_enabled():
        raise InputError("differentiable=True: sharded (DTensor) parameters are not supported; use torch.optim.AdamW for them")
    if like is not None and is_sharded(like) and tensor.placements != like.placements:
        tensor = tensor.redistribute(like.device_mesh, like.placements)
    part = tensor._local_tensor
    return part.wait() if hasattr(part, "wait") else part  # an asynchronous collective


def whole(part: Tensor, param: Tensor) -> Tensor:
    """Gather the global tensor from the parts of all processes, sharded as the DTensor `param`. If `param` is none, return `part`."""
    if not is_sharded(param):
        return part
    return cast("DTensor", like(part.to(param.device_mesh.device_type), param)).full_tensor().to(part.device)


def like(part: Tensor, param: Tensor) -> Tensor:
    """Make a DTensor of a local part of the shape of that of `param`; return `part` if `param` is none."""
    if not is_sharded(param):
        return part
    from torch.distributed.tensor import DTensor

    mesh = param.device_mesh
    return DTensor.from_local(part, mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride())


def shard_of(param: Tensor) -> Shard | None:
    """Locate this process's part of a DTensor; None for a plain tensor.

    Raises InputError if the part is no block of the global tensor, or the local tensor has another shape than its placements give.
    """
    if type(param) in _PLAIN or not is_sharded(param):
        return None
    mesh = param.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise InputError(f"a parameter of shape {tuple(param.shape)} is sharded over a mesh that this process is not in")
    held, first_index, dims = _layout(param.shape, param._local_tensor.shape, param.placements, tuple(mesh.shape), tuple(coordinate))
    return Shard(held, first_index, Mesh(mesh, dims) if dims else None)


def total(sum_of_squares: Callable[[Sequence[Tensor]], Tensor], grads: Sequence[Tensor], meshes: Sequence[Mesh | None]) -> Tensor:
    """Sum the squares of all elements of the global tensors: fp64, 0-d, the same in all processes.

    sum_of_squares: of local tensors, fp64, 0-d.
    grads: local parts, which may be empty.
    meshes: what each gradient is sharded over. All processes must pass the same meshes in the same order.

    Takes one all-reduce per distinct mesh and mesh dimension, in the order of first appearance, on the mesh's type of device.
    """
    if all(mesh is None for mesh in meshes):
        return sum_of_squares(grads)
    parts: dict[Mesh | None, list[Tensor]] = {}
    for grad, mesh in zip(grads, meshes, strict=True):
        parts.setdefault(mesh, []).append(grad)
    sums = [all_reduced(sum_of_squares(of_one), mesh) for mesh, of_one in parts.items()]
    return torch.stack([x.to(sums[0].device) for x in sums]).sum()


def all_reduced(values: Tensor, mesh: Mesh | None) -> Tensor:
    """Sum over a mesh, in place if `values` is on its type of device. A tensor offloaded to the CPU is moved, as NCCL needs it."""
    if mesh is None:
        return values
    if values.device.type != mesh.device_mesh.device_type:
        values = values.to(mesh.device_mesh.device_type)
    for dim in mesh.dims:
        torch.distributed.all_reduce(values, group=mesh.device_mesh.get_group(dim))
    return values


# Cached by value, because weak references to a DTensor parameter would break Module.to, which swaps such tensors.
@cache
def _layout(
    shape: tuple[int, ...],
    local_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
) -> tuple[tuple[tuple[int, int], ...], int, tuple[int, ...]]:
    """Return held and first_index of Shard, and the mesh dimensions that shard."""
    held = [(0, size) for size in shape]
    for dim, cuts in _cuts(shape, placements, mesh_shape).items():
        for mesh_dim in cuts:
            first, count = held[dim]
            chunk = -(-count // mesh_shape[mesh_dim])
            start = min(coordinate[mesh_dim] * chunk, count)
            held[dim] = first + start, min(chunk, count - start)
    if tuple(count for _, count in held) != local_shape:
        raise InputError(
            f"a parameter of shape {tuple(shape)} with placements {placements} on a mesh of shape {mesh_shape} has a local shape of "
            f"{tuple(local_shape)}, and must have {tuple(count for _, count in held)}; shard it with fully_shard or distribute_tensor"
        )
    dims = tuple(i for i, placement in enumerate(placements) if not placement.is_replicate() and mesh_shape[i] > 1)
    if tuple(local_shape[1:]) == tuple(shape[1:]):
        return tuple(held), held[0][0] * prod(shape[1:]) if shape else 0, dims
    number = 0
    for i in dims:
        number = number * mesh_shape[i] + coordinate[i]
    return tuple(held), number * prod(shape), dims


def _cuts(shape: tuple[int, ...], placements: tuple[Placement, ...], mesh_shape: tuple[int, ...]) -> dict[int, list[int]]:
    """Map each sharded dimension to the mesh dimensions that split it, in the order of the splits.

    The order is from left to right. A _StridedShard, which FSDP makes of a dimension that tensor parallelism has split, is an exception: it
    comes after the mesh dimensions to its right that make `split_factor` chunks.
    """
    result: dict[int, list[int]] = {}
    for i in reversed(range(len(placements))):
        placement = placements[i]
        if placement.is_replicate():
            continue
        if placement.is_partial():
            raise InputError(f"a parameter of shape {tuple(shape)} is {placement}; a parameter must be Shard or Replicate")
        cuts = result.setdefault(cast("ShardPlacement", placement).dim, [])
        factor, before, chunks = getattr(placement, "split_factor", 1), 0, 1
        while chunks < factor and before < len(cuts):
            chunks *= mesh_shape[cuts[before]]
            before += 1
        if chunks != factor:
            raise InputError(
                f"a parameter of shape {tuple(shape)} with placements {placements} on a mesh of shape {mesh_shape} is not cut into blocks: "
                f"no mesh dimensions right of {placement} make {factor} chunks"
            )
        cuts.insert(before, i)
    return result

"""The part of a sharded (DTensor) parameter that this process holds: local tensors, the multipliers and element numbers of that part."""

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
    """What a local sum must be reduced over: these dimensions of a device mesh."""

    device_mesh: DeviceMesh
    dims: tuple[int, ...]


class Shard(NamedTuple):
    """The part of a global tensor that this process holds.

    held: (first index, count) per dimension of the global shape.
    first_index: number of the part's first element in the global row-major tensor where the part is a range of rows, as FSDP2's are, so
        that stochastic rounding does not depend on the number of processes. Otherwise k times the global number of elements for part k,
        counted row-major over the mesh dimensions that shard: no two parts share a number, and one layout always gives the same.
    mesh: what it is sharded over; None where every process holds all of it.
    """

    held: tuple[tuple[int, int], ...]
    first_index: int
    mesh: Mesh | None

    def multipliers(self, rates: Tensor, dim: int) -> Tensor:
        """The part, as a view, of `rates` (one per index of the global dimensions dim, dim + 1, ...; 0-d for the whole parameter)."""
        for axis in range(rates.ndim):
            rates = rates.narrow(axis, *self.held[dim + axis])
        return rates


_PLAIN = (Parameter, Tensor)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether `tensor` is a DTensor, of whatever placements; imports nothing to find out."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has a DTensor without it
    return module is not None and isinstance(tensor, module.DTensor)


def in_shards(model: Module) -> bool:
    """Whether processes hold parts of a model."""
    return any(map(is_sharded, model.parameters()))


def local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The plain tensor that holds this process's part of a DTensor; other tensors as they are.

    With `like`, a DTensor of other placements is redistributed to those of `like` first: tensor parallelism leaves the gradient of a
    replicated parameter Partial.
    """
    if type(tensor) in _PLAIN or not is_sharded(tensor):
        return tensor
    if torch.is_grad_enabled():
        raise InputError("differentiable=True: sharded (DTensor) parameters are not supported; use torch.optim.AdamW for them")
    if like is not None and is_sharded(like) and tensor.placements != like.placements:
        tensor = tensor.redistribute(like.device_mesh, like.placements)
    part = tensor._local_tensor
    return part.wait() if hasattr(part, "wait") else part  # an unfinished collective


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The global tensor of which this process holds `part`, cut as the DTensor `like` is; any other `like`: `part` itself. Collective."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    mesh = like.device_mesh
    there = part.to(mesh.device_type)
    made = DTensor.from_local(there, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
    return made.full_tensor().to(part.device)


def shard_of(param: Tensor) -> Shard | None:
    """Which part of `param` this process holds; None for a plain tensor.

    Raises InputError for a placement that gives no block of the global tensor, and for a local tensor that is not the block its placements
    give.
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
    """The sum of the squares of all elements of the global tensors of which `grads` are the local parts: fp64, 0-d, the same everywhere.

    meshes: per gradient, what it is sharded over. One all-reduce per distinct mesh and mesh dimension, in the order of first appearance, on
    the mesh's kind of device. Every process must give the same meshes in the same order; its parts may be empty.
    """
    if all(mesh is None for mesh in meshes):
        return sum_of_squares(grads)
    parts: dict[Mesh | None, list[Tensor]] = {}
    for grad, mesh in zip(grads, meshes, strict=True):
        parts.setdefault(mesh, []).append(grad)
    sums = [_reduced(sum_of_squares(of_one), mesh) for mesh, of_one in parts.items()]
    return torch.stack([x.to(sums[0].device) for x in sums]).sum()


def _reduced(squares: Tensor, mesh: Mesh | None) -> Tensor:
    if mesh is None:
        return squares
    kind = mesh.device_mesh.device_type
    if squares.device.type != kind:  # offloaded to the CPU, while the collectives may be NCCL's
        squares = squares.to(kind)
    for dim in mesh.dims:
        torch.distributed.all_reduce(squares, group=mesh.device_mesh.get_group(dim))
    return squares


# By value: a weak reference to a DTensor parameter would forbid Module.to, which swaps such tensors.
@cache
def _layout(
    shape: tuple[int, ...],
    local_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
) -> tuple[tuple[tuple[int, int], ...], int, tuple[int, ...]]:
    """(held and first_index of Shard, the mesh dimensions that shard)."""
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
            f"{tuple(local_shape)} where chunks give {tuple(count for _, count in held)}; shard it with fully_shard or distribute_tensor"
        )
    dims = tuple(i for i, placement in enumerate(placements) if not placement.is_replicate() and mesh_shape[i] > 1)
    if tuple(local_shape[1:]) == tuple(shape[1:]):
        return tuple(held), held[0][0] * prod(shape[1:]) if shape else 0, dims
    number = 0
    for i in dims:
        number = number * mesh_shape[i] + coordinate[i]
    return tuple(held), number * prod(shape), dims


def _cuts(shape: tuple[int, ...], placements: tuple[Placement, ...], mesh_shape: tuple[int, ...]) -> dict[int, list[int]]:
    """Per sharded dimension the mesh dimensions that cut it, in the order in which they do.

    That is from left to right, except that a _StridedShard, which FSDP leaves of what tensor parallelism had cut before it, comes after
    the `split_factor` chunks of mesh dimensions to its right.
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

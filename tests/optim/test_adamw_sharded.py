"""AdamW on sharded parameters: FSDP2, HSDP, tensor parallelism and DDP give what one process gives, and checkpoints keep all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from adept_fast import AdamW, InputError
from adept_fast.ops import dispatch as backends
from adept_fast.ops.adamw.op import sum_of_squares
from adept_fast.runtime.dtensor import local, shard_of, total
from tests.support.sharded_worker import (
    FROZEN_ROW,
    HYPER,
    Net,
    assert_same,
    bits_of_one_process,
    in_processes,
    mesh_of,
    replace_parameters,
    set_rates,
    shard,
    sharded_pair,
    train,
    weights,
    whole,
)

BACKENDS = [name for name in ("torch", "cpu") if backends.status()[name].found]
VARIANTS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {"amsgrad": True}),
    (torch.bfloat16, {"master_weights": "copy", "maximize": True}),
    (torch.bfloat16, {"master_weights": "remainder", "amsgrad": True, "state_dtype": torch.float32}),
    (torch.bfloat16, {"master_weights": "kahan"}),
    (torch.bfloat16, {"master_weights": "stochastic"}),
    (torch.float32, {"state_dtype": "int8"}),
    (torch.bfloat16, {"state_dtype": "int8", "master_weights": "remainder8", "maximize": True}),
]
EVERY = [(dtype, options | {"backend": name}) for name in BACKENDS for dtype, options in VARIANTS]


def single(dtype: torch.dtype, steps: int, **options: Any) -> Net:
    net = Net(dtype)
    optimizer = AdamW(net.parameters(), **HYPER | options)
    set_rates(optimizer, net)
    train(net, optimizer, 0, steps)
    return net


def fully_sharded(shape: tuple[int, ...]) -> None:
    mesh = mesh_of(*shape)
    for dtype, options in EVERY:
        net, optimizer = sharded_pair(mesh, dtype, **options)
        set_rates(optimizer, net)
        train(net, optimizer, 0, 5)
        found = weights(net)
        assert_same(found, weights(single(dtype, 5, **options)), options)
        assert torch.equal(found["first.weight"][FROZEN_ROW], Net(dtype).first.weight[FROZEN_ROW])
        assert not torch.equal(found["first.weight"], Net(dtype).first.weight)


def three_processes() -> None:
    """The mean of three gradients has not the bits of one: they are set here. Rows 3, 3 and 1 of 7, and 2, 2 and 1 of 5."""
    mesh = mesh_of(3)
    for dtype, options in EVERY:
        nets = [Net(dtype), shard(Net(dtype), mesh)]
        optimizers = [AdamW(net.parameters(), **HYPER | options) for net in nets]
        for net, optimizer in zip(nets, optimizers, strict=True):
            set_rates(optimizer, net)
        for step in range(4):
            for params in zip(*(net.parameters() for net in nets), strict=True):
                grad = torch.randn(params[0].shape, generator=torch.Generator().manual_seed(step)).to(dtype)
                for p in params:
                    p.grad = in_layout(grad, p)
            for optimizer in optimizers:
                optimizer.step()
        assert_same(weights(nets[1]), weights(nets[0]), options)
        for p, q in zip(*(net.parameters() for net in nets), strict=True):
            alone, sharded = (optimizer.state[x] for optimizer, x in zip(optimizers, (p, q), strict=True))
            assert alone.keys() == sharded.keys()
            for key, value in alone.items():
                if value.dtype != torch.int16:  # which gloo does not gather
                    assert torch.equal(whole(sharded[key]), value), (options, key)


def test_three_processes_equal_one(tmp_path: Path) -> None:
    in_processes(3, tmp_path, three_processes)


@bits_of_one_process
@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2)], ids=str)
def test_fsdp_and_hsdp_equal_one_process(shape: tuple[int, ...], tmp_path: Path) -> None:
    in_processes(torch.Size(shape).numel(), tmp_path, fully_sharded, shape)


def clipped() -> None:
    mesh = mesh_of(2, 2)
    options = {"max_grad_norm": 0.02, "eps": 1e-3}
    net, optimizer = sharded_pair(mesh, torch.float32, **options)
    set_rates(optimizer, net)
    train(net, optimizer, 0, 5)
    clipped_alone = weights(single(torch.float32, 5, **options))
    assert_same(weights(net), clipped_alone, "clipped", rtol=1e-6)
    assert not torch.equal(clipped_alone["last.bias"], weights(single(torch.float32, 5, eps=1e-3))["last.bias"])
    plain = [p.detach() for p in Net(torch.float32).parameters()]
    sharded = [*shard(Net(torch.float32), mesh).parameters()]
    with torch.no_grad():
        parts = [local(p) for p in sharded]
    meshes = [shard_of(p).mesh for p in sharded]
    extra = torch.tensor([3.0, 4.0])  # on every process alike: counted once
    found = total(sum_of_squares, [extra, *parts], [None, *meshes])
    torch.testing.assert_close(found, sum_of_squares([extra, *plain]), rtol=1e-14, atol=0)
    assert found.dtype == torch.float64 and found.ndim == 0


@bits_of_one_process
def test_clipping_by_the_global_norm(tmp_path: Path) -> None:
    in_processes(4, tmp_path, clipped)


def swapped() -> None:
    mesh = mesh_of(2)
    for dtype, mode in ((torch.float32, None), (torch.bfloat16, "kahan")):
        net = Net(dtype)
        optimizer = AdamW(net.parameters(), **HYPER, master_weights=mode)
        set_rates(optimizer, net)
        before = [*net.parameters()]
        shard(net, mesh)
        replace_parameters(optimizer, before, [*net.parameters()])
        rates, dim = optimizer.unit_lr(net.last.weight)
        assert rates.shape == (7,) and dim == 1
        train(net, optimizer, 0, 5)
        assert_same(weights(net), weights(single(dtype, 5, master_weights=mode)), mode)
        net.to(torch.float64)  # torch swaps the contents of DTensor parameters, which a weak reference to one would forbid


@bits_of_one_process
def test_rates_outlive_the_swap_to_sharded_parameters(tmp_path: Path) -> None:
    in_processes(2, tmp_path, swapped)


def layouts(mesh: DeviceMesh) -> list[tuple[tuple[int, ...], list[Placement]]]:
    return [
        ((7, 5), [Shard(0), Replicate()]),
        ((5, 7), [Replicate(), Shard(1)]),
        ((5, 7), [Shard(0), Shard(1)]),
        ((5, 7), [Shard(1), Shard(0)]),
        ((3, 2), [Shard(0), Shard(0)]),
        ((9, 3), [Shard(0), Shard(0)]),
        ((2, 5, 3), [Shard(2), Shard(2)]),
        ((8, 3), [_StridedShard(0, split_factor=2), Shard(0)]),
        ((7, 3), [_StridedShard(0, split_factor=2), Shard(0)]),
    ]


def shard_facts() -> None:
    mesh = mesh_of(2, 2)
    for shape, placements in layouts(mesh):
        numbers = torch.arange(torch.Size(shape).numel()).view(shape)
        param = distribute_tensor(numbers, mesh, placements, src_data_rank=None)
        fact = shard_of(param)
        for dim in range(len(shape)):
            rates = numbers.movedim(dim, 0).flatten(1)[:, 0].float()
            expected = param.to_local().movedim(dim, 0)
            assert fact.multipliers(rates, dim).shape[0] == expected.shape[0]
            if param.to_local().numel():
                at_zero = numbers[tuple(slice(*(0, None) if d == dim else (first, None)) for d, (first, _) in enumerate(fact.held))]
                assert torch.equal(fact.multipliers(at_zero.movedim(dim, 0).flatten(1)[:, 0], dim), expected.flatten(1)[:, 0])
        assert torch.equal(fact.multipliers(numbers, 0), param.to_local())
        everyone: list[Any] = [None] * 4
        own = (fact.first_index, param.to_local().numel(), tuple(param.to_local().flatten().tolist()))
        dist.all_gather_object(everyone, own)
        ranges = {(first, first + count): part for first, count, part in everyone if count}
        assert all((a == b) == (ranges[a] == ranges[b]) for a in ranges for b in ranges)
        ordered = sorted(ranges)
        assert all(a[1] <= b[0] for a, b in zip(ordered, ordered[1:], strict=False)), (shape, placements, ordered)
        if all(p.is_replicate() or p.dim == 0 for p in placements):
            assert all(part == tuple(range(first, last)) for (first, last), part in ranges.items())
        assert fact.mesh == shard_of(param).mesh and hash(fact.mesh) == hash(shard_of(param).mesh)
    assert shard_of(distribute_tensor(torch.ones(3), mesh, [Replicate(), Replicate()])).mesh is None


def test_shards_hold_what_torch_gives_them(tmp_path: Path) -> None:
    in_processes(4, tmp_path, shard_facts)


def parallel_net(mesh: DeviceMesh, dtype: torch.dtype) -> Net:
    """`first` cut by rows and `last` by columns over the tensor-parallel processes, both by rows over the data-parallel ones."""
    net = Net(dtype)
    for module, name, dim in ((net.first, "weight", 0), (net.first, "bias", 0), (net.last, "weight", 1)):
        param = distribute_tensor(getattr(module, name).detach(), mesh["tp"], [Shard(dim)])
        setattr(module, name, nn.Parameter(param))
    fully_shard(net, mesh=mesh["dp"])
    return net


def tensor_parallel() -> None:
    mesh = mesh_of(2, 2)
    for dtype, options in EVERY:
        nets = [Net(dtype), parallel_net(mesh, dtype), parallel_net(mesh, dtype)]
        optimizers = [AdamW(net.parameters(), **HYPER | options) for net in nets]
        for net, optimizer in zip(nets, optimizers, strict=True):
            set_rates(optimizer, net)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            for params in zip(*(net.parameters() for net in nets), strict=True):
                grad = torch.randn(params[0].shape, generator=generator).to(dtype)
                for p in params:
                    p.grad = in_layout(grad, p)
            for optimizer in optimizers:
                optimizer.step()
        alone, first, again = (weights(net) for net in nets)
        assert_same(again, first, options)
        if options.get("master_weights") == "stochastic":  # column shards have noise of their own
            alone.pop("last.weight"), first.pop("last.weight")
        assert_same(first, alone, options)
    assert any(isinstance(p, _StridedShard) for p in nets[1].first.weight.placements)


def in_layout(grad: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return grad
    part = grad
    for axis, (first, count) in enumerate(shard_of(like).held):
        part = part.narrow(axis, first, count)
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def test_tensor_parallel_under_fsdp_equals_one_process(tmp_path: Path) -> None:
    in_processes(4, tmp_path, tensor_parallel)


def other_gradients() -> None:
    mesh = mesh_of(2)
    start = torch.randn(6, generator=torch.Generator().manual_seed(1))
    grad = torch.randn(6, generator=torch.Generator().manual_seed(2))
    plain = nn.Parameter(start.clone())
    plain.grad = grad * 3
    AdamW([plain], **HYPER).step()
    partial = DTensor.from_local(grad * (1 + dist.get_rank()), mesh, [Partial()], run_check=False)
    for placement in (Replicate(), Shard(0)):
        param = nn.Parameter(distribute_tensor(start.clone(), mesh, [placement]))
        param.grad = partial.redistribute(mesh, [Replicate()]) if placement.is_shard() else partial
        AdamW([param], **HYPER).step()
        assert torch.equal(param.full_tensor(), plain)


def test_gradients_of_other_placements_are_redistributed(tmp_path: Path) -> None:
    in_processes(2, tmp_path, other_gradients)


def refusals() -> None:
    mesh = mesh_of(2)
    part = torch.ones(3)
    for placement, local_part, text in (
        (Partial(), part, "must be Shard or Replicate"),
        (_StridedShard(0, split_factor=3), part, "not cut into blocks"),
        (Shard(0), torch.ones(1 + 3 * dist.get_rank()), "and must have"),
    ):
        param = DTensor.from_local(local_part, mesh, [placement], run_check=False, shape=torch.Size([6]), stride=(1,))
        with pytest.raises(InputError, match=text):
            shard_of(param)
    for shape, dim in (((4, 128), 1), ((4, 8, 10), 1), ((4, 2, 64), 2)):
        cut = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(dim)]))
        cut.grad = torch.ones_like(cut)
        text = rf"^group 0, parameter 0 of shape \({shape[0]}, .* is cut by S.*\(.*{dim}\) within its rows, .* another state_dtype$"
        eight, wide = AdamW([cut], state_dtype="int8"), AdamW([cut])
        with pytest.raises(InputError, match=text):
            eight.step()
        wide.step()
        with pytest.raises(InputError, match=text):
            eight.load_state_dict(wide.state_dict())
    param = nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Shard(0)]))
    param.grad = torch.ones_like(param)
    with pytest.raises(InputError, match="differentiable"):
        AdamW([param], differentiable=True).step()


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    in_processes(2, tmp_path, refusals)


def data_parallel() -> None:
    net = Net(torch.float32)
    optimizer = AdamW(net.parameters(), **HYPER, max_grad_norm=5.0)
    set_rates(optimizer, net)
    train(DistributedDataParallel(net), optimizer, 0, 5)
    assert_same(weights(net), weights(single(torch.float32, 5, max_grad_norm=5.0)), "DDP")


def test_ddp_equals_one_process(tmp_path: Path) -> None:
    in_processes(2, tmp_path, data_parallel)

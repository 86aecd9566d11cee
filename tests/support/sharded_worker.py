"""What the processes of test_adamw_sharded.py run: models, sharded optimizers and their single-process counterparts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from adept_fast import AdamW

HYPER = {"lr": 3e-2, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": 0.13}
FROZEN_ROW = 2
bits_of_one_process = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9"), reason="torch 2.8: gradients of a sharded model are not the bits of one process"
)
MASTERS = {"copy": ("master", torch.float32), "remainder": ("remainder", torch.int16), "kahan": ("compensation", torch.bfloat16)}
MASTERS["remainder8"] = ("remainder8", torch.int8)


class Net(nn.Module):
    """Row counts 7, 3, 5 and 1: uneven on 2 and 4 processes, some of which hold nothing of `scale` and of the last layer.

    `first.weight` (two blocks a row) and `experts` can have 8-bit moments, the others cannot.
    """

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(70, 7), nn.Linear(7, 3)
        self.experts = nn.Parameter(torch.randn(5, 3, 7))
        self.scale = nn.Parameter(torch.rand(1) + 0.5)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.last(hidden + torch.einsum("erh,bh->bh", self.experts, hidden) * self.scale)


def set_rates(optimizer: AdamW, net: Net, factor: float = 1.0) -> None:
    rows = torch.tensor([0.1, 0.7, 0.0, 1.3, 1.9, 0.3333333, 1.0])
    optimizer.set_unit_lr(net.first.weight, factor * rows)
    optimizer.set_unit_lr(net.first.bias, factor * rows.flip(0))
    optimizer.set_unit_lr(net.last.weight, factor * rows, dim=1)
    optimizer.set_unit_lr(net.experts, factor * torch.linspace(0.2, 1.7, 15).view(5, 3))
    optimizer.set_unit_lr(net.scale, factor * 0.6)


def train(net: nn.Module, optimizer: AdamW, first: int, last: int) -> None:
    """All processes see the same batch, so that the mean of their gradients over 2 or 4 has the bits of one."""
    dtype = next(net.parameters()).dtype
    for step in range(first, last):
        x = torch.randn(6, 70, generator=torch.Generator().manual_seed(step)).to(dtype)
        net(x).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(net: Net) -> dict[str, Tensor]:
    return {name: whole(p.detach()).clone() for name, p in net.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], what: object, rtol: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=0, msg=lambda text, at=(what, name): f"{at}: {text}")


def shard(net: Net, mesh: DeviceMesh) -> Net:
    for module in (net.first, net.last, net):
        fully_shard(module, mesh=mesh)
    return net


def sharded_pair(mesh: DeviceMesh, dtype: torch.dtype, seed: int = 0, **options: Any) -> tuple[Net, AdamW]:
    net = shard(Net(dtype, seed), mesh)
    optimizer = AdamW(net.parameters(), **HYPER | options)
    return net, optimizer


def replace_parameters(optimizer: AdamW, before: list[Tensor], after: list[Tensor]) -> None:
    """What accelerate does once FSDP2 has sharded the parameters of an optimizer that was built before."""
    positions = {id(p): i for i, p in enumerate(before)}
    for group in optimizer.param_groups:
        group["params"] = [after[positions[id(p)]] for p in group["params"]]


def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])


def start(rank: int, world: int, store: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        work(*arguments)
    finally:
        dist.destroy_process_group()


PRELOAD = [
    *("torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch.distributed.tensor"),
    *("transformers.models.llama.modeling_llama", "adept_fast.tuning.tune_checkpoint", "tests.support.tiny_models"),
]


def in_processes(world: int, folder: Path, work: Callable[..., None], *arguments: Any) -> None:
    """Run work(*arguments) in `world` processes of one gloo group; the first failure is raised here."""
    import torch.multiprocessing as processes

    # Forked from a server that has imported torch once: faster than spawn, and safe where this process has used autograd's threads.
    context = processes.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = folder / f"store{len(list(folder.iterdir()))}"
    entry = partial(start, world=world, store=str(store), work=work, arguments=arguments)
    processes.start_processes(entry, nprocs=world, start_method="forkserver")

"""AdamW's state through torch.distributed.checkpoint, full state dicts, files of shards and accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from adept_fast import AdamW
from adept_fast.ops.adamw.checks import CODES, SCALES
from adept_fast.ops.adamw.eight_bit import scale_shape
from tests.support.sharded_worker import (
    HYPER,
    MASTERS,
    Net,
    assert_same,
    bits_of_one_process,
    in_processes,
    mesh_of,
    set_rates,
    sharded_pair,
    train,
    weights,
)

MODES = ["copy", "remainder", "remainder8", "kahan", "stochastic"]
EXPERTS = torch.linspace(0.2, 1.7, 15).view(5, 3)


def pair(mode: str, seed: int = 0) -> tuple[Net, AdamW]:
    """A master of 24 bits is beside moments of 8 bits, the others beside fp32."""
    mesh, eight_bit = mesh_of(dist.get_world_size()), mode == "remainder8"
    moments = {"state_dtype": "int8"} if eight_bit else {"state_dtype": torch.float32, "amsgrad": True}
    return sharded_pair(mesh, torch.bfloat16, seed, master_weights=mode, **moments, backend="torch")


def check_state(net: Net, optimizer: AdamW, mode: str) -> None:
    """Rates and dtypes are those that set_rates and pair give."""
    fresh, reference = pair(mode)
    set_rates(reference, fresh)
    for p, q in zip(net.parameters(), fresh.parameters(), strict=True):
        rates, expected = optimizer.unit_lr(p), reference.unit_lr(q)
        assert (rates is None) == (expected is None)
        assert rates is None or (rates[1] == expected[1] and rates[0].dtype == torch.float32 and torch.equal(rates[0], expected[0]))
    own = dict([MASTERS[mode]] if mode in MASTERS else [])
    wide = dict.fromkeys(("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"), torch.float32) | own
    if mode == "remainder8":
        wide.pop("max_exp_avg_sq")
    short = dict.fromkeys(("step", *SCALES), torch.float32) | dict.fromkeys(CODES, torch.uint8) | own
    for p in net.parameters():
        eight_bit = mode == "remainder8" and any(p is each for each in (net.first.weight, net.experts))
        assert {key: value.dtype for key, value in optimizer.state[p].items()} == (short if eight_bit else wide)
        assert not eight_bit or optimizer.state[p]["exp_avg_scale"].shape == scale_shape(p.shape)


def continue_and_compare(net: Net, optimizer: AdamW, mode: str) -> None:
    check_state(net, optimizer, mode)
    train(net, optimizer, 3, 6)
    straight, straight_optimizer = pair(mode)
    set_rates(straight_optimizer, straight)
    train(straight, straight_optimizer, 0, 6)
    assert_same(weights(net), weights(straight), mode)


def save(folder: Path, modes: list[str]) -> None:
    for mode in modes:
        net, optimizer = pair(mode)
        set_rates(optimizer, net)
        train(net, optimizer, 0, 3)
        state = {"net": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
        assert state["optimizer"]["state"]["experts"]["unit_lr"].dtype == torch.float32
        dcp.save(state, checkpoint_id=folder / mode)


def load(folder: Path, modes: list[str]) -> None:
    for mode in modes:
        net, optimizer = pair(mode, seed=1)
        set_rates(optimizer, net, factor=0.5)
        before = weights(net)
        state = {"net": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
        assert_same(weights(net), before, "a step with lr = 0")
        assert optimizer.param_groups[0]["lr"] == HYPER["lr"]
        dcp.load(state, checkpoint_id=folder / mode)
        set_model_state_dict(net, state["net"])
        set_optimizer_state_dict(net, optimizer, state["optimizer"])
        continue_and_compare(net, optimizer, mode)


@bits_of_one_process
@pytest.mark.parametrize(
    ("before", "after", "modes"), [(2, 4, ["copy", "remainder", "remainder8"]), (4, 1, ["kahan", "stochastic", "remainder8"])]
)
def test_distributed_checkpoint_at_another_world_size(before: int, after: int, modes: list[str], tmp_path: Path) -> None:
    in_processes(before, tmp_path, save, tmp_path, modes)
    in_processes(after, tmp_path, load, tmp_path, modes)


def full(folder: Path, load_options: dict[str, Any]) -> None:
    for mode in ("copy", "remainder", "remainder8"):
        net, optimizer = pair(mode)
        set_rates(optimizer, net)
        train(net, optimizer, 0, 3)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        saved = {"net": get_model_state_dict(net, options=options), "optimizer": get_optimizer_state_dict(net, optimizer, options=options)}
        if dist.get_rank() == 0:
            state = saved["optimizer"]["state"]["experts"]
            moment = state[CODES[0] if mode == "remainder8" else "exp_avg"]
            assert moment.shape == (5, 3, 7) and torch.equal(state["unit_lr"], EXPERTS) and state["unit_dim"] == 0
            torch.save(saved, folder / mode)
        dist.barrier()
        loaded = torch.load(folder / mode, weights_only=True)
        other, fresh = pair(mode, seed=1)
        set_rates(fresh, other, factor=0.5)
        options = StateDictOptions(full_state_dict=True, **load_options)
        mine = loaded if dist.get_rank() == 0 or not load_options else {"net": {}, "optimizer": {}}
        set_model_state_dict(other, mine["net"], options=options)
        set_optimizer_state_dict(other, fresh, mine["optimizer"], options=options)
        continue_and_compare(other, fresh, mode)


@pytest.mark.parametrize("load_options", [{}, {"broadcast_from_rank0": True}], ids=str)
def test_full_state_dict(load_options: dict[str, Any], tmp_path: Path) -> None:
    in_processes(2, tmp_path, full, tmp_path, load_options)


def files_of_shards(folder: Path) -> None:
    for mode in MODES:
        net, optimizer = pair(mode)
        set_rates(optimizer, net)
        train(net, optimizer, 0, 3)
        path = folder / f"{mode}{dist.get_rank()}"
        torch.save([net.state_dict(), optimizer.state_dict()], path)
        saved_net, saved_optimizer = torch.load(path, weights_only=True)
        other, fresh = pair(mode, seed=1)
        other.load_state_dict(saved_net)
        fresh.load_state_dict(saved_optimizer)
        continue_and_compare(other, fresh, mode)
    net, eight = pair("remainder8")
    train(net, eight, 0, 3)
    wide, again = (AdamW(net.parameters(), state_dtype=dtype) for dtype in (torch.float32, "int8"))
    wide.load_state_dict(eight.state_dict())
    again.load_state_dict(wide.state_dict())
    for p in (net.first.weight, net.experts):
        assert "exp_avg" in wide.state[p] and again.state[p].keys() == eight.state[p].keys() - {"remainder8"}
        for key in CODES:
            assert torch.equal(again.state[p][key].to_local(), eight.state[p][key].to_local()), key


def test_file_per_process(tmp_path: Path) -> None:
    in_processes(2, tmp_path, files_of_shards, tmp_path)


def accelerated(folder: Path) -> None:
    from accelerate import Accelerator

    def build(seed: int) -> tuple[Net, AdamW]:
        net = Net(torch.bfloat16, seed)
        optimizer = AdamW(net.parameters(), **HYPER, master_weights="remainder")
        return net, optimizer

    plain, plain_optimizer = build(0)
    set_rates(plain_optimizer, plain)
    train(plain, plain_optimizer, 0, 6)
    accelerator = Accelerator(cpu=True)
    net, optimizer = build(0)
    set_rates(optimizer, net)
    net, optimizer = accelerator.prepare(net, optimizer)
    train(net, optimizer, 0, 3)
    accelerator.save_state(str(folder))
    accelerator.free_memory()
    net, optimizer = accelerator.prepare(*build(1))
    accelerator.load_state(str(folder))
    rates, dim = optimizer.optimizer.unit_lr(net.experts)
    assert dim == 0 and torch.equal(rates, EXPERTS)
    assert optimizer.state[net.experts]["remainder"].dtype == torch.int16
    train(net, optimizer, 3, 6)
    assert_same(weights(net), weights(plain), "accelerate")


def test_accelerate_prepares_saves_and_loads(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    in_processes(1, tmp_path, accelerated, tmp_path / "state")

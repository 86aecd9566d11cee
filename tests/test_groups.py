"""Whole-tensor rates through parameter groups give what AdamW's unit rates give, under FSDP1 and where groups are flattened (ZeRO)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from sharded_worker import in_processes
from torch import Tensor, nn

from adept_fast import AdamW
from adept_fast.errors import InputError
from adept_fast.expansion import expand_model, freeze_original
from adept_fast.tuning import AdeptCallback, apply_rates, rate_groups
from adept_fast.tuning.groups import refuse_flattened
from adept_fast.units import Units

HYPER = {"betas": (0.85, 0.97), "eps": 1e-6, "weight_decay": 0.13}
RATE = 3e-2


def made(family: str = "llama") -> tuple[nn.Module, Units, Tensor]:
    model = expand_model(tiny_models.model(family, dtype=torch.float64), [0, 2])
    freeze_original(model)
    units = Units.of(model)
    return model, units, torch.linspace(0, 1.9, len(units), dtype=torch.float64)


def backward(model: nn.Module, step: int) -> None:
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(step))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def expected() -> dict[str, Tensor]:
    model, units, rates = made()
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=RATE, **HYPER)
    apply_rates(optimizer, model, units, rates)
    for step in range(5):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: model.get_parameter(name).detach() for name in units.slices}


def test_flattened_groups_step_as_unit_rates_do() -> None:
    """As ZeRO does it: the parameters of a group are one flat tensor, and the optimizer knows no other."""
    model, units, rates = made()
    groups = rate_groups(model, units, rates, RATE)
    assert len(groups) == len(units) and sorted(name for group in groups for name in group["names"]) == sorted(units.slices)
    flat = [nn.Parameter(nn.utils.parameters_to_vector(group["params"]).detach()) for group in groups]
    optimizer = torch.optim.AdamW([{"params": [one], "lr": group["lr"]} for one, group in zip(flat, groups, strict=True)], **HYPER)
    for step in range(5):
        backward(model, step)
        for one, group in zip(flat, groups, strict=True):
            one.grad = torch.cat([parameter.grad.flatten() for parameter in group["params"]])
        model.zero_grad()
        optimizer.step()
        for one, group in zip(flat, groups, strict=True):
            nn.utils.vector_to_parameters(one.detach(), group["params"])
    for name, tensor in expected().items():
        torch.testing.assert_close(model.get_parameter(name).detach(), tensor, rtol=1e-9, atol=1e-12)


def under_fsdp1() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, units, rates = made()
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(InputError, match="FSDP1 flattens parameters: unit-wise rates need DDP or FSDP2"):
        refuse_flattened(wrapped)
    optimizer = torch.optim.AdamW(rate_groups(wrapped, units, rates, RATE), **HYPER)
    for step in range(5):
        backward(wrapped, step)
        optimizer.step()
        optimizer.zero_grad()
    wanted = expected()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        for name, tensor in wanted.items():
            torch.testing.assert_close(model.get_parameter(name).detach(), tensor, rtol=1e-9, atol=1e-12)
    merged = FullyShardedDataParallel(made()[0].requires_grad_(True), use_orig_params=False, device_id=torch.device("cpu"))
    with pytest.raises(InputError, match="an engine has merged them"):
        rate_groups(merged, units, rates, RATE)


def test_fsdp1_takes_the_groups(tmp_path: Path) -> None:
    in_processes(2, tmp_path, under_fsdp1)


def test_row_wise_rates_are_refused() -> None:
    model, _, _ = made("phi3")
    for granularity in ("tensor", "head"):  # phi3's q, k and v are one tensor
        units = Units.of(model, granularity)
        with pytest.raises(InputError, match=r"_proj.weight: cut into several units; parameter groups have one rate a tensor"):
            rate_groups(model, units, torch.ones(len(units)), RATE)


def test_zero_is_told_by_its_parameters_and_its_optimizer() -> None:
    model, _, _ = made()
    refuse_flattened(model, AdamW(model.parameters()))
    callback, state = AdeptCallback(tiny_models.items(1), quiet=True), SimpleNamespace(global_step=0, is_world_process_zero=True)
    optimizer = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    with pytest.raises(InputError, match="DeepSpeed ZeRO flattens parameters"):
        callback.on_train_begin(None, state, None, model=model, optimizer=SimpleNamespace(optimizer=optimizer))
    next(model.parameters()).ds_id = 0
    with pytest.raises(InputError, match=r"rate_groups"):
        refuse_flattened(model)

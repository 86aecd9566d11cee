"""Whole-tensor rates through parameter groups give what AdamW's unit rates give, under FSDP1 and where groups are flattened (ZeRO)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from transformers import Trainer

from adept_fast import AdamW
from adept_fast.errors import InputError
from adept_fast.expansion.expand_model import expand_model, freeze_original
from adept_fast.scoring.units import Units
from adept_fast.tuning.adept_callback import AdeptCallback
from adept_fast.tuning.param_group_rates import rate_groups, refuse_flattened
from adept_fast.tuning.trainer_log import TrainerLog
from adept_fast.tuning.unit_rates import RateRule, apply_rates
from tests.support import tiny_models
from tests.support.sharded_worker import in_processes
from tests.tuning.test_adept_trainer import Stop, arguments, blocks

HYPER = {"betas": (0.85, 0.97), "eps": 1e-6, "weight_decay": 0.13}
RATE = 3e-2
STEPS = 6


def made(family: str = "llama") -> tuple[nn.Module, Units]:
    model = expand_model(tiny_models.model(family, dtype=torch.float64), [0, 2])
    freeze_original(model)
    return model, Units.of(model)


def refreshed(optimizer: Optimizer, model: nn.Module, units: Units) -> Iterator[int]:
    """The steps of a run whose scheduler writes learning rates of its own into every group; rates change in its middle, one from 0."""
    schedule = OneCycleLR(optimizer, max_lr=RATE, total_steps=STEPS + 1)
    rates = torch.linspace(0, 1.9, len(units), dtype=torch.float64)
    for step in range(STEPS):
        if step % 3 == 0:
            apply_rates(optimizer, model, units, rates if step == 0 else rates.flip(0) + 0.1)
        yield step
        schedule.step()


def backward(model: nn.Module, step: int) -> None:
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(step))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def expected() -> dict[str, Tensor]:
    model, units = made()
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=RATE, **HYPER)
    for step in refreshed(optimizer, model, units):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: model.get_parameter(name).detach() for name in units.slices}


def test_flattened_groups_step_as_unit_rates_do() -> None:
    """As ZeRO does it: the parameters of a group are one flat tensor, and the optimizer knows no other."""
    model, units = made()
    groups = rate_groups(model, units)
    assert len(groups) == len(units) and sorted(name for group in groups for name in group["names"]) == sorted(units.slices)
    whole = [group["params"] for group in groups]
    flat = [nn.Parameter(nn.utils.parameters_to_vector(parameters).detach()) for parameters in whole]
    optimizer = torch.optim.AdamW([{**group, "params": [one]} for group, one in zip(groups, flat, strict=True)], lr=RATE, **HYPER)
    for step in refreshed(optimizer, model, units):
        backward(model, step)
        for one, parameters in zip(flat, whole, strict=True):
            one.grad = torch.cat([parameter.grad.flatten() for parameter in parameters])
        model.zero_grad()
        optimizer.step()
        for one, parameters in zip(flat, whole, strict=True):
            nn.utils.vector_to_parameters(one.detach(), parameters)
    assert len({group["lr"] for group in optimizer.param_groups}) == 1
    for name, tensor in expected().items():
        torch.testing.assert_close(model.get_parameter(name).detach(), tensor, rtol=1e-9, atol=1e-12)


def under_fsdp1() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, units = made()
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(InputError, match="FSDP1 flattens parameters: unit-wise rates, and .*, need DDP or FSDP2"):
        refuse_flattened(wrapped)
    optimizer = torch.optim.AdamW(rate_groups(wrapped, units), lr=RATE, **HYPER)
    for step in refreshed(optimizer, model, units):
        backward(wrapped, step)
        optimizer.step()
        optimizer.zero_grad()
    wanted = expected()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        for name, tensor in wanted.items():
            torch.testing.assert_close(model.get_parameter(name).detach(), tensor, rtol=1e-9, atol=1e-12)
    merged = FullyShardedDataParallel(made()[0].requires_grad_(True), use_orig_params=False, device_id=torch.device("cpu"))
    with pytest.raises(InputError, match="an engine has merged them"):
        rate_groups(merged, units)


def test_fsdp1_takes_the_groups(tmp_path: Path) -> None:
    in_processes(2, tmp_path, under_fsdp1)


def trained(
    folder: Path, groups: bool, stop: int = 0, resume: str | None = None, average: float = 0.5
) -> tuple[dict[str, Tensor], list[dict]]:
    """Weights and log of a Trainer with torch's AdamW over rate groups, or with AdamW's unit rates."""
    model = expand_model(tiny_models.model(), [0, 2])
    freeze_original(model)
    options = {"lr": 1e-2, **HYPER}
    if groups:
        optimizer: Optimizer = torch.optim.AdamW(rate_groups(model, Units.of(model)), **options)
    else:
        optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], **options)
    log = TrainerLog(folder / "log.jsonl")
    rule = RateRule("mean_preserving", average=average, conflict=True)
    callbacks = [AdeptCallback(tiny_models.items(3), refresh_steps=2, rate_map=rule, log=log), *([Stop(stop)] if stop else [])]
    args = arguments(folder / "work", lr_scheduler_type="cosine", warmup_steps=2)
    trainer = Trainer(model, args, train_dataset=blocks(), callbacks=callbacks, optimizers=(optimizer, None))
    if stop:
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=resume)
    else:
        trainer.train(resume_from_checkpoint=resume)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return weights, [json.loads(line) for line in log.path.read_text().splitlines()]


@pytest.mark.slow
def test_the_callback_refreshes_the_groups_of_another_optimizer(tmp_path: Path) -> None:
    wanted, unit_log = trained(tmp_path / "units", groups=False)
    found, group_log = trained(tmp_path / "groups", groups=True)
    refreshes = [[entry["rates"] for entry in log if entry["event"] == "refresh"] for log in (unit_log, group_log)]
    assert len(refreshes[0]) == 3 and refreshes[0][0] != refreshes[0][2] and len(set(refreshes[0][2].values())) > 5
    for ours, theirs in zip(*refreshes, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5)
    trained(tmp_path / "cut", groups=True, stop=5)
    resumed, again = trained(tmp_path / "cut", groups=True, resume=str(tmp_path / "cut" / "work" / "checkpoint-4"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in found.items()) and again == group_log


def test_optimizers_without_a_group_for_each_unit_are_refused() -> None:
    model, units = made()
    optimizer = torch.optim.SGD(rate_groups(model, units), lr=RATE)
    heads = Units.of(model, "head")
    with pytest.raises(InputError, match="SGD's groups are not one for each unit"):
        apply_rates(optimizer, model, heads, torch.ones(len(heads)))
    callback = AdeptCallback(tiny_models.items(1), units, rate_map=RateRule(conflict=True))
    backward(model, 0)
    adagrad = torch.optim.Adagrad(rate_groups(model, units), lr=RATE)
    with pytest.raises(InputError, match="which Adagrad does not keep"):
        callback._momenta(adagrad, model)


def test_row_wise_rates_are_refused() -> None:
    model, _ = made("phi3")
    for granularity in ("tensor", "head"):  # phi3's q, k and v are one tensor
        units = Units.of(model, granularity)
        with pytest.raises(InputError, match=r"_proj.weight: cut into several units; parameter groups have one rate a tensor"):
            rate_groups(model, units)


def test_zero_is_told_by_its_parameters_and_its_optimizer() -> None:
    model, _ = made()
    refuse_flattened(model, AdamW(model.parameters()))
    callback, state = AdeptCallback(tiny_models.items(1)), SimpleNamespace(global_step=0, is_world_process_zero=True)
    optimizer = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    with pytest.raises(InputError, match="DeepSpeed ZeRO flattens parameters"):
        callback.on_train_begin(None, state, None, model=model, optimizer=SimpleNamespace(optimizer=optimizer))
    next(model.parameters()).ds_id = 0
    with pytest.raises(InputError, match=r"rate_groups"):
        refuse_flattened(model)

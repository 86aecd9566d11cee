"""Schedules by name, composed with unit rates; what cannot work is refused before the run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from adept_fast import AdamW
from adept_fast.errors import InputError
from adept_fast.tuning.tuning_settings import TuningSettings, arguments, check_settings

STEPS, WARMUP = 40, 4


def shape(name: str, step: int) -> float:
    """The share of the learning rate that optimizer step `step` (from 0) is to take."""
    if step < WARMUP:
        return step / WARMUP
    past = (step - WARMUP) / (STEPS - WARMUP)
    if name == "cosine":
        return (1 + math.cos(math.pi * past)) / 2
    if name == "linear":
        return 1 - past
    decayed = (step - 0.8 * STEPS) / (0.2 * STEPS)
    return 1 if decayed < 0 else 1 - math.sqrt(decayed)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "warmup_stable_decay"])
def test_unit_rates_multiply_the_schedule(name: str, tmp_path: Path) -> None:
    """Under a constant gradient AdamW steps by the rate itself: each unit by schedule x multiplier x learning rate."""
    settings = TuningSettings(training={"lr_scheduler_type": name, "warmup_steps": WARMUP, "learning_rate": 0.25})
    args = arguments(settings, tmp_path, STEPS)
    weight = torch.nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    optimizer = AdamW([weight], lr=args.learning_rate, weight_decay=0.0, eps=0.0)
    optimizer.set_unit_lr(weight, torch.tensor([0.5, 0.0, 1.75]), dim=0)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(STEPS), STEPS, args.lr_scheduler_kwargs)
    for step in range(STEPS):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, 3.0)
        optimizer.step()
        schedule.step()
        expected = -0.25 * shape(name, step) * torch.tensor([0.5, 0.0, 1.75], dtype=torch.float64)
        assert torch.allclose(weight.detach() - before, expected[:, None].expand(3, 5), rtol=1e-9, atol=1e-12), step


def test_settings_of_wsd_are_kept(tmp_path: Path) -> None:
    training = {"lr_scheduler_type": "wsd", "lr_scheduler_kwargs": {"num_decay_steps": 7, "min_lr_ratio": 0.1}}
    args = arguments(TuningSettings(training=training), tmp_path, STEPS)
    assert args.lr_scheduler_kwargs == {"num_decay_steps": 7, "min_lr_ratio": 0.1, "decay_type": "1-sqrt"}


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"lr_scheduler_type": "cosin"}, "cosin"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_type": "wsd", "lr_scheduler_kwargs": {"decay": 3}}, "decay"),
        ({"eval_strategy": "steps", "eval_steps": 5}, "every eval_steps"),
    ],
)
def test_schedules_that_cannot_work_are_refused_early(training: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_settings(TuningSettings(training=training))

"""Unit rates in loops that are not ours: TRL's SFTTrainer and DPOTrainer through the callback, and the plain loop of examples/."""

from __future__ import annotations

import inspect
import re
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer

from adept_fast import AdamW, AdeptCallback, Units, expand_model, freeze_original
from adept_fast.tuning.unit_rates import MAPS, RateMap
from tests.support import tiny_models

pytestmark = pytest.mark.slow

RATES = {"o_proj": 2.0, "down_proj": 1.0, "q_proj": 0.0, "up_proj": 0.0}
CALM = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "weight_decay": 0.1}
QUIET = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True, "bf16": False}


def moved(model: nn.Module, before: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the change of each kind of unit of the copies; raises where anything else changed."""
    units = Units.of(model, "tensor")
    total: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        change = float((parameter.detach() - before[name]).norm())
        if name not in units.slices:
            assert change == 0, name
        else:
            kind = units.units[int(units.slices[name].unit[0])].kind
            total[kind] = total.get(kind, 0.0) + change
    return total


def check(train: Callable[[RateMap], tuple[nn.Module, dict[str, Tensor]]]) -> None:
    """`train` gives a tuned model and its parameters before: zero, one and twice the change under RATES of that under ones."""
    found = []
    for rates in ({}, RATES):

        def chosen(values: Tensor, units: Units, rates: dict[str, float] = rates) -> Tensor:
            return torch.tensor([rates.get(unit.kind, 1.0) for unit in units])

        found.append(moved(*train(chosen)))
    ones, chosen = found
    assert ones["q_proj"] > 0 and chosen["q_proj"] == 0 == chosen["up_proj"]
    assert 1.8 <= chosen["o_proj"] / ones["o_proj"] <= 2.2
    assert 0.9 <= chosen["down_proj"] / ones["down_proj"] <= 1.1


def under_trl(make: Callable[..., Trainer], rate_map: RateMap) -> tuple[nn.Module, dict[str, Tensor]]:
    model = expand_model(tiny_models.model(), [1, 2])
    freeze_original(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    callback = AdeptCallback(tiny_models.items(2), refresh_steps=2, rate_map=rate_map)
    if "optimizer_cls_and_kwargs" in inspect.signature(make).parameters:
        optimizer = {"optimizer_cls_and_kwargs": (AdamW, {"lr": 1e-3})}
    else:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = {"optimizers": (AdamW(trained, lr=1e-3, weight_decay=0.1), None)}
    make(model, processing_class=tiny_models.tokenizer(), callbacks=[callback], **optimizer).train()
    return model, before


def test_supervised_finetuning_with_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    data = Dataset.from_list([{"prompt": text[:30], "completion": text[30:]} for text in tiny_models.SENTENCES[:6]])
    args = trl.SFTConfig(output_dir=str(tmp_path), max_length=64, **CALM, **QUIET)
    check(partial(under_trl, partial(trl.SFTTrainer, args=args, train_dataset=data)))


def test_preference_tuning_with_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    pairs = zip(tiny_models.SENTENCES[:6], tiny_models.SENTENCES[6:12], strict=True)
    data = Dataset.from_list([{"prompt": good[:20], "chosen": good[20:], "rejected": bad[30:]} for good, bad in pairs])
    args = trl.DPOConfig(output_dir=str(tmp_path), max_length=64, **CALM, **QUIET)
    reference = tiny_models.model()  # a fresh copy is silent: the base is where tuning starts
    check(partial(under_trl, partial(trl.DPOTrainer, ref_model=reference, args=args, train_dataset=data)))


def test_each_trainer_of_trl_takes_what_the_page_says() -> None:
    trl = pytest.importorskip("trl", minversion="1.16")
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "optimizer.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+Trainer`.*) \| (yes|no) \| (yes|no) \|$", page, re.MULTILINE)
    said = {name: (first, second) for names, first, second in rows for name in re.findall(r"`(\w+)`", names)}
    assert said.keys() == {name for name in dir(trl) if name.endswith("Trainer")}
    for name, expected in said.items():
        taken = inspect.signature(getattr(trl, name)).parameters
        assert tuple("yes" if each in taken else "no" for each in ("optimizers", "optimizer_cls_and_kwargs")) == expected, name


def test_the_plain_loop_of_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    folder = tiny_models.checkpoint(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(tiny_models.SENTENCES))
    script = Path(__file__).parents[2] / "examples" / "plain_loop.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(folder), str(tmp_path / "text.txt"), "11"])

    def train(rate_map: RateMap) -> tuple[nn.Module, dict[str, Tensor]]:
        monkeypatch.setitem(MAPS, "rank", (rate_map, lambda rates, units: rates))
        made = runpy.run_path(str(script), run_name="__main__")
        return made["model"], dict(expand_model(made["base"], made["layers"]).named_parameters())

    check(train)
    losses = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(losses) == 22 and losses[10] < losses[0]

"""A run moves from torchao and bitsandbytes and back, as docs/how-to/optimizer.md does it: the next update is the same on either side."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adept_fast import AdamW, InputError

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "optimizer.md"


def script_with(package: str) -> dict[str, Any]:
    """The names of the page's script that imports `package`, after it ran."""
    pytest.importorskip(package)
    scripts = re.findall(r"```python\n(.+?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    text = next(text for text in scripts if f"from {package}" in text)
    names: dict[str, Any] = {}
    exec(compile(text, str(PAGE), "exec"), names)
    return names


def update(kind: type[Optimizer], model: nn.Module, state: dict[str, Any], **given: Any) -> dict[str, Tensor]:
    """The change of each weight by a step of a copy of `model` from `state`, through a file."""
    model = copy.deepcopy(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = kind(model.parameters(), **given)
    file = io.BytesIO()
    torch.save(state, file)  # load_state_dict of torch shares the tensors
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(7)
    for p in model.parameters():
        p.grad = 1e-2 * torch.randn_like(p)
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, change in wanted.items():
        assert (found[name] - change).norm() <= 1e-4 * change.norm(), name


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_the_next_update_is_the_same_on_either_side(package: str) -> None:
    names = script_with(package)
    model, theirs = names["model"], names["AdamW8bit"]
    ours = AdamW(model.parameters(), lr=1.0, betas=(0.5, 0.5), weight_decay=1.0)
    ours.load_state_dict(names["saved"])
    group = ours.param_groups[0]
    assert (float(group["lr"]), group["betas"], group["weight_decay"]) == (pytest.approx(1e-3), (0.9, 0.999), 0.01)
    assert [state["step"] for state in ours.state.values()] == [1, 1]
    assert_near(update(AdamW, model, names["saved"]), update(theirs, model, names["before"].state_dict()))
    names["optimizer"].set_unit_lr(model.weight, None)
    assert_near(update(theirs, model, names["back"]), update(AdamW, model, names["optimizer"].state_dict()))


def test_a_state_of_bitsandbytes_as_it_is_is_refused() -> None:
    names = script_with("bitsandbytes")
    with pytest.raises(InputError, match="__bnb_optimizer_quant_state__ but no exp_avg and no exp_avg_sq"):
        AdamW(names["model"].parameters()).load_state_dict(names["before"].state_dict())


def test_moments_that_are_loaded_are_coded_in_8_bits_and_reach_torch_through_fp32() -> None:
    parameter = nn.Parameter(torch.ones(64, 64))
    ours, eight, decoded = AdamW([parameter]), AdamW([parameter], state_dtype="int8"), AdamW([parameter], state_dtype=torch.float32)
    parameter.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    ours.step()
    eight.load_state_dict(ours.state_dict())
    decoded.load_state_dict(eight.state_dict())
    for key in ("exp_avg", "exp_avg_sq"):
        exact = ours.state[parameter][key]
        assert 0 < (decoded.state[parameter][key] - exact).norm() < 0.02 * exact.norm(), key
    theirs = torch.optim.AdamW([parameter])
    theirs.load_state_dict(decoded.state_dict())
    theirs.step()
    assert theirs.state[parameter]["step"] == 2

"""Groups with and without weight decay, and rates that fall with depth."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adept_fast import AdamW, InputError, param_groups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}) for _ in range(3))
        self.head = nn.Linear(4, 5)


def names(groups: list[dict]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


def test_matrices_decay_and_vectors_do_not() -> None:
    model = Net()
    model.layers[1].requires_grad_(False)
    decaying, others = param_groups(model, weight_decay=0.1, no_decay=["embed.*"])
    assert names([decaying, others]) == [
        ["layers.0.mlp.weight", "layers.2.mlp.weight", "head.weight"],
        ["embed.weight", *(f"layers.{i}.{part}" for i in (0, 2) for part in ("mlp.bias", "norm.weight", "norm.bias")), "head.bias"],
    ]
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(AdamW([decaying, others], lr=1e-3).param_groups) == 2


def test_layers_further_down_learn_more_slowly_as_with_a_group_each() -> None:
    torch.manual_seed(1)
    model, other = Net(), Net()
    other.load_state_dict(model.state_dict())
    ours = AdamW(param_groups(model, weight_decay=0.1, layer_decay=0.5), lr=1e-2)
    scale = {"embed": 0.125, "layers.0": 0.25, "layers.1": 0.5, "layers.2": 1.0, "head": 1.0}
    lrs = {full: 1e-2 * next(rate for name, rate in scale.items() if full.startswith(name)) for full, _ in other.named_parameters()}
    groups = [{"params": [p], "lr": lrs[name], "weight_decay": 0.1 * (p.ndim > 1)} for name, p in other.named_parameters()]
    theirs = torch.optim.AdamW(groups)
    schedules = [torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.1, 5) for each in (ours, theirs)]
    for step in range(5):
        torch.manual_seed(step)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer, schedule in zip((ours, theirs), schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert len(ours.param_groups) == 2
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight_decay": -1.0}, "weight_decay must be a number of 0 or more"),
        ({"no_decay": ["embedding.*"]}, "no_decay: no trainable parameter's name matches 'embedding.*'"),
        ({"layer_decay": 0.0}, "layer_decay must be a number above 0 and at most 1"),
    ],
)
def test_wrong_arguments(wrong: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        param_groups(Net(), **wrong)


def test_a_model_without_layers_has_no_depth() -> None:
    with pytest.raises(InputError, match="layer_decay: no parameter's name has the number of a layer: leave it out"):
        param_groups(nn.Linear(2, 2), layer_decay=0.9)

"""Learning-rate multipliers per unit. The oracle splits the units into tensors and groups of their own with lr * multiplier."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adept_fast.errors import InputError
from adept_fast.ops.adamw.memory_order import in_one_order
from adept_fast.optim import AdamW

HYPER = {"lr": 3e-3, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": 0.13}
CASES = {  # shape of the parameter, shape of the multipliers, dim
    "rows": ((13, 7), (13,), 0),
    "columns": ((13, 7), (7,), -1),
    "vector": ((19,), (19,), 0),
    "experts": ((3, 5, 7), (3,), 0),
    "middle": ((3, 5, 7), (5,), 1),
    "expert_rows": ((3, 5, 7), (3, 5), 0),
    "last_two": ((3, 5, 7), (5, 7), 1),
    "whole": ((13, 7), (), 0),
    "blocks": ((131, 1031), (131,), 0),
}


def rates(shape: tuple[int, ...]) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(5)) + 0.01


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def units(shape: tuple[int, ...], multipliers: Tensor, dim: int) -> list[tuple[float, tuple]]:
    """(multiplier, index of the unit) for each unit."""
    dim %= len(shape)
    grid = [[]]
    for length in multipliers.shape:
        grid = [[*at, i] for at in grid for i in range(length)]
    return [(multipliers[tuple(at)].item(), (slice(None),) * dim + tuple(at)) for at in grid]


def whole_run(case: str, dtype: torch.dtype, steps: int = 4, **options: object) -> tuple[Tensor, AdamW, Parameter]:
    shape, wanted, dim = CASES[case]
    p = Parameter(draw(shape, 0, dtype))
    optimizer = AdamW([p], **HYPER, **options)
    optimizer.set_unit_lr(p, rates(wanted), dim)
    for step in range(1, steps + 1):
        p.grad = draw(shape, step, dtype)
        optimizer.step()
    return p.detach(), optimizer, p


def split_run(cls: type[torch.optim.Optimizer], case: str, dtype: torch.dtype, steps: int = 4, **options: object) -> Tensor:
    shape, wanted, dim = CASES[case]
    multipliers, whole = rates(wanted), draw(shape, 0, dtype)
    parts = [(Parameter(whole[at].clone()), at, m) for m, at in units(shape, multipliers, dim)]
    optimizer = cls([{"params": [p], "lr": HYPER["lr"] * m} for p, _, m in parts], **HYPER, **options)
    for step in range(1, steps + 1):
        grad = draw(shape, step, dtype)
        for p, at, _ in parts:
            p.grad = grad[at].clone()
        optimizer.step()
    for p, at, _ in parts:
        whole[at] = p.detach()
    return whole


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}], ids=str)
def test_units_equal_split_tensors(case: str, options: dict) -> None:
    ours = whole_run(case, torch.float32, **options)[0]
    assert torch.equal(ours, split_run(AdamW, case, torch.float32, **options))
    assert not torch.equal(ours, draw(CASES[case][0], 0))
    truth = split_run(torch.optim.AdamW, case, torch.float64, **options)
    theirs = split_run(torch.optim.AdamW, case, torch.float32, **options)
    assert (ours.double() - truth).abs().max() <= (theirs.double() - truth).abs().max() + 1e-8


@pytest.mark.parametrize("case", CASES)
def test_units_are_the_same_in_any_order_of_memory(case: str) -> None:
    shape, wanted, dim = CASES[case]
    backwards = tuple(reversed(range(len(shape))))
    expected = whole_run(case, torch.float32)[0]
    for start in (draw(shape, 0).permute(backwards).contiguous().permute(backwards), draw(shape, 0).repeat_interleave(2, -1)[..., ::2]):
        p = Parameter(start)
        optimizer = AdamW([p], **HYPER)
        optimizer.set_unit_lr(p, rates(wanted), dim)
        for step in range(1, 5):
            p.grad = draw(shape, step)
            optimizer.step()
        assert torch.equal(p, expected) and (p.ndim == 1 or not p.is_contiguous())


def test_what_lies_in_one_order_is_not_copied() -> None:
    tensors = [draw((4, 3), 0).t(), draw((4, 3), 2).t(), draw((4, 3), 1).t()]
    for row_major, copied in ((False, []), (True, [0, 1, 2])):
        ordered, copies = in_one_order(tensors, row_major)
        assert [next(i for i, x in enumerate(tensors) if x is original) for original, _ in copies] == copied
        assert all(torch.equal(x, y) and x.is_contiguous() == row_major for x, y in zip(ordered, tensors, strict=True))


@pytest.mark.parametrize("mode", ["copy", "remainder", "kahan"])
@pytest.mark.parametrize("case", ["rows", "columns", "expert_rows", "whole"])
def test_units_equal_split_tensors_in_bf16(case: str, mode: str) -> None:
    ours = whole_run(case, torch.bfloat16, master_weights=mode)[0]
    assert torch.equal(ours, split_run(AdamW, case, torch.bfloat16, master_weights=mode))


def test_complex_rows() -> None:
    start = torch.randn(5, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    whole, parts, multipliers = Parameter(start.clone()), [Parameter(row.clone()) for row in start], rates((5,))
    ours = AdamW([whole], **HYPER)
    ours.set_unit_lr(whole, multipliers)
    split = AdamW([{"params": [p], "lr": HYPER["lr"] * m.item()} for p, m in zip(parts, multipliers, strict=True)], **HYPER)
    for step in range(3):
        whole.grad = torch.randn(5, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(step))
        for p, row in zip(parts, whole.grad, strict=True):
            p.grad = row.clone()
        ours.step()
        split.step()
    assert torch.equal(whole, torch.stack([p.detach() for p in parts]))


def test_rates_on_the_device_path() -> None:
    """capturable keeps every scalar a tensor; the rates are the same to rounding."""
    for case in ("rows", "columns", "whole"):
        on_device, plain = whole_run(case, torch.float32, capturable=True)[0], whole_run(case, torch.float32)[0]
        torch.testing.assert_close(on_device, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", [None, "copy", "remainder", "kahan", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_multiplier_zero_freezes_bits_while_moments_move(dtype: torch.dtype, mode: str | None) -> None:
    start = draw((9, 5), 0, dtype)
    start[2, 0], start[2, 1] = -0.0, float("inf")
    p = Parameter(start.clone())
    optimizer = AdamW([p], **HYPER, master_weights=mode)
    p.grad = draw((9, 5), 1, dtype)
    optimizer.set_unit_lr(p, [0.5] * 2 + [0.0] + [0.5] * 6)
    optimizer.step()
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state[p])
    for seed in (2, 3):
        p.grad = draw((9, 5), seed, dtype)
        p.grad[2] = float("nan") if seed == 3 else p.grad[2]
        optimizer.step()
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(p.detach().view(integer)[2], start.view(integer)[2])
    assert torch.equal(p.detach().view(integer)[2], before.view(integer)[2])
    others = [0, 1, 3, 4, 5, 6, 7, 8]
    assert (p.detach()[others] != before[others]).float().mean() > 0.2
    masters = {"master", "remainder", "compensation"} & state.keys()
    assert bool(masters) == (dtype == torch.bfloat16 and mode in ("copy", "remainder", "kahan"))
    for key in masters:
        assert torch.equal(optimizer.state[p][key][2], state[key][2])
        assert not torch.equal(optimizer.state[p][key][others], state[key][others])
    assert optimizer.state[p]["exp_avg"][2].isnan().all() and not state["exp_avg"][2].isnan().any()
    assert not p.detach()[others].isnan().any()


def test_whole_parameter_zero_and_rate_zero() -> None:
    frozen, followed, reference = (Parameter(torch.ones(3)) for _ in range(3))
    ours = AdamW([{"params": [frozen]}, {"params": [followed], "lr": 0.0}], **HYPER)
    ours.set_unit_lr(frozen, 0)
    theirs = torch.optim.AdamW([reference], **HYPER | {"lr": 0.0})
    for p in (frozen, followed, reference):
        p.grad = torch.tensor([1.0, float("nan"), 2.0])
    ours.step()
    theirs.step()
    assert torch.equal(frozen, torch.ones(3))
    assert torch.equal(followed.isnan(), reference.isnan()) and followed.isnan().any()


def test_setting_reading_removing() -> None:
    p, other = Parameter(torch.zeros(4, 3)), Parameter(torch.zeros(2))
    optimizer = AdamW([p, other], **HYPER)
    assert optimizer.unit_lr(p) is None
    given = torch.rand(3, dtype=torch.float64)
    optimizer.set_unit_lr(p, given, dim=-1)
    multipliers, dim = optimizer.unit_lr(p)
    assert dim == 1 and multipliers.dtype == torch.float32 and torch.equal(multipliers, given.float())
    given.zero_()
    assert multipliers.min() > 0
    optimizer.set_unit_lr(other, 0.25)
    assert optimizer.unit_lr(other)[0].shape == ()
    square = Parameter(torch.zeros(2, 2))
    optimizer.add_param_group({"params": [square]})
    for dim in (0, 1):
        optimizer.set_unit_lr(square, torch.tensor([0.5, 1.0]), dim)
        assert optimizer.unit_lr(square)[1] == dim, "as many multipliers, along another dimension"
    optimizer.set_unit_lr(square, None)
    own = torch.ones(2)
    optimizer.set_unit_lr(square, own)
    own.zero_()
    assert optimizer.unit_lr(square)[0].min() == 1, "the caller's tensor is kept"
    optimizer.set_unit_lr(p, None)
    assert optimizer.unit_lr(p) is None and optimizer.unit_lr(other) is not None
    optimizer.set_unit_lr(other, None)
    optimizer.set_unit_lr(other, None)
    assert "unit_lr" not in optimizer.param_groups[0]


@pytest.mark.parametrize(
    ("multipliers", "dim", "message"),
    [
        (torch.ones(3), 0, "shape"),
        (torch.ones(4), 1, "shape"),
        (torch.ones(4), 2, "dim"),
        (torch.ones(4), -3, "dim"),
        (torch.ones(3, 4), 0, "shape"),
        (torch.ones(3, 1), 1, "shape"),
        (torch.tensor([1.0, -1.0, 1.0, 1.0]), 0, "finite"),
        (torch.tensor([1.0, float("nan"), 1.0, 1.0]), 0, "finite"),
        (float("inf"), 0, "finite"),
        ("half", 0, r"multipliers: not numbers for a parameter of shape \(4, 3\)"),
        ([1.0, None], 0, r"multipliers: not numbers for a parameter of shape \(4, 3\)"),
        (torch.ones(4), "rows", "dim: 'rows' is not a dimension"),
    ],
)
def test_bad_multipliers(multipliers: object, dim: object, message: str) -> None:
    p = Parameter(torch.zeros(4, 3))
    optimizer = AdamW([p], **HYPER)
    with pytest.raises(InputError, match=message):
        optimizer.set_unit_lr(p, multipliers, dim)
    assert optimizer.unit_lr(p) is None


def test_strangers_raise() -> None:
    p = Parameter(torch.zeros(4, 3))
    optimizer = AdamW([p], **HYPER)
    for stranger in (Parameter(torch.zeros(4, 3)), p.detach(), 3):
        with pytest.raises(InputError, match="groups"):
            optimizer.set_unit_lr(stranger, 1.0)
        with pytest.raises(InputError, match="groups"):
            optimizer.unit_lr(stranger)


def test_rates_follow_the_position_through_a_swap_of_parameters() -> None:
    old = [Parameter(torch.zeros(2)), Parameter(torch.zeros(5, 3))]
    optimizer = AdamW(old, **HYPER)
    optimizer.set_unit_lr(old[1], rates((5,)))
    new = [Parameter(draw((2,), 0)), Parameter(draw((5, 3), 1))]
    alone = Parameter(new[1].detach().clone())
    optimizer.param_groups[0]["params"] = new
    fresh = AdamW([alone], **HYPER)
    fresh.set_unit_lr(alone, rates((5,)))
    new[1].grad = draw((5, 3), 2)
    alone.grad = draw((5, 3), 2)
    optimizer.step()
    fresh.step()
    assert torch.equal(new[1], alone)
    with pytest.raises(InputError):
        optimizer.unit_lr(old[1])
    optimizer.param_groups[0]["params"] = [new[0], Parameter(torch.zeros(6, 3))]
    optimizer.param_groups[0]["params"][1].grad = torch.ones(6, 3)
    with pytest.raises(InputError, match="no longer fit"):
        optimizer.step()

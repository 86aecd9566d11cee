"""Gradient scaling, clipping and learning-rate schedules around AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adept_fast.ops.adamw.op import sum_of_squares
from adept_fast.ops.adamw.reference import clip_scale
from adept_fast.optim import AdamW

HYPER = {"lr": 3e-3, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": 0.13}
SHAPES = [(7, 5), (0, 2), (11,)]


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def set_grads(params: list[Parameter], step: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (size * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 0.7])
def test_grad_scaler_with_a_step_of_infinities(unscale_first: bool, max_grad_norm: float | None, fused: bool | None) -> None:
    scaled, plain = parameters(), parameters()
    options = {"max_grad_norm": max_grad_norm, "fused": fused, **HYPER}
    ours, unscaled = AdamW(scaled, **options), AdamW(plain, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    counted = 0
    for step in range(1, 7):
        loss = scaler.scale(sum(((p - 0.1 * step) ** 2).sum() for p in scaled))
        ours.zero_grad()
        loss.backward()
        if step in (1, 4):
            scaled[2].grad[3] = float("inf")
        else:
            counted += 1
            for p, q in zip(plain, scaled, strict=True):
                p.grad = q.grad / scaler.get_scale()
            unscaled.step()
        before = [p.detach().clone() for p in scaled]
        if unscale_first:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        for p, q, b in zip(scaled, plain, before, strict=True):
            assert torch.equal(p, q)
            assert (step in (1, 4)) == torch.equal(p, b) or p.numel() == 0
    assert {state["step"].item() for state in ours.state.values()} == {float(counted)}
    assert scaler.get_scale() == 2.0**8


def test_an_infinite_step_leaves_masters_and_moments() -> None:
    params = parameters(torch.bfloat16)
    ours = AdamW(params, **HYPER, master_weights="remainder")
    set_grads(params, 1)
    ours.step()
    before = {k: v.clone() for k, v in ours.state[params[0]].items()}
    set_grads(params, 2)
    params[0].grad[0, 0] = float("nan")
    ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    ours.step()
    assert all(torch.equal(before[key], value) for key, value in ours.state[params[0]].items())


@pytest.mark.parametrize("size", [3.0, 1e-3])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_max_grad_norm_clips_no_further_from_fp64_than_clip_grad_norm(dtype: torch.dtype, backend: str, size: float) -> None:
    ours, theirs, exact = parameters(dtype), parameters(dtype), parameters(dtype)
    exact = [Parameter(p.detach().double()) for p in exact]
    a = AdamW([{"params": ours[:1]}, {"params": ours[1:]}], **HYPER, max_grad_norm=0.7, backend=backend)
    others = [(params, torch.optim.AdamW(params, **HYPER, foreach=False)) for params in (theirs, exact)]
    for step in range(1, 5):
        set_grads(ours, step, size)
        kept = [p.grad.clone() for p in ours]
        a.step()
        for params, optimizer in others:
            for p, grad in zip(params, kept, strict=True):
                p.grad = grad.to(p.dtype, copy=True)
            torch.nn.utils.clip_grad_norm_(params, 0.7)
            optimizer.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(ours, kept, strict=True))
        error, allowed = (
            max((p.detach().double() - truth.detach()).abs().max().item() for p, truth in zip(params, exact, strict=True) if p.numel())
            for params in (ours, theirs)
        )
        assert error <= allowed + 4 * torch.finfo(dtype).eps  # in fp64 torch is the truth


def test_clip_scale_in_low_precision_complex_and_with_nan() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(3, 5, generator=generator, dtype=torch.complex64)
    grads = [torch.randn(1001, generator=generator).bfloat16(), pairs, torch.zeros(0)]
    norm = sum(g.to(torch.complex128).abs().square().sum() for g in grads).sqrt()
    squares = sum_of_squares([torch.view_as_real(g) if g.is_complex() else g for g in grads])
    assert squares.dtype == torch.float64
    torch.testing.assert_close(squares, norm.square(), rtol=1e-12, atol=0)
    torch.testing.assert_close(clip_scale(squares, 0.7), 0.7 / (norm + 1e-6), rtol=1e-12, atol=0)
    torch.testing.assert_close(clip_scale(squares, 0.7, torch.tensor(0.25)), 0.25 * 0.7 / (norm / 4 + 1e-6), rtol=1e-12, atol=0)
    assert clip_scale(squares, 1e6).item() == 1.0
    assert clip_scale(sum_of_squares([torch.tensor([float("nan")])]), 1.0).isnan()


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_learning_rate_schedules(tensor_lr: bool) -> None:
    def run(cls: type[torch.optim.Optimizer], **options: object) -> tuple[list[Tensor], list[float]]:
        params = parameters(torch.float64)
        rate = torch.tensor(0.03, dtype=torch.float64) if tensor_lr else 0.03
        optimizer = cls(params, **HYPER | {"lr": rate}, **options)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [3])
        seen = []
        for step in range(1, 8):
            set_grads(params, step)
            optimizer.step()
            seen.append(float(optimizer.param_groups[0]["lr"]))
            scheduler.step()
        return params, seen

    (ours, our_rates), (theirs, their_rates) = run(AdamW), run(torch.optim.AdamW, foreach=False)
    assert our_rates == their_rates and len(set(our_rates)) > 4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_one_cycle_drives_lr_and_beta1() -> None:
    runs = []
    for cls in (AdamW, torch.optim.AdamW):
        params = parameters(torch.float64)
        optimizer = cls(params, **HYPER)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=9)
        for step in range(1, 9):
            set_grads(params, step)
            optimizer.step()
            scheduler.step()
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)

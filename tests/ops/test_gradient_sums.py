"""Sums of gradients of tensors that lie in memory some other way, or that do not fit: the right numbers, or an error that names both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adept_fast.errors import InputError
from adept_fast.ops import dispatch
from adept_fast.ops.gradient_sums.op import GradientSums, gradient_sums

BACKENDS = [name for name in dispatch.IMPLEMENTED["gradient_sums"] if name in ("torch", "cpu") and dispatch.status()[name].found]


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).unbind(0)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 99)], -1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "not contiguous": lambda p, g: (strided(p), strided(g)),
    "with an offset": lambda p, g: (torch.cat([p[:1], p])[1:], g),
    "expanded": lambda p, g: (p, g[:1].expand_as(g)),
    "transposed": lambda p, g: (p.T.contiguous().T, g),
    "fp32 and bf16": lambda p, g: (p, g.bfloat16()),
    "fp16 and fp64": lambda p, g: (p.half(), g.double()),
    "a complex view": lambda p, g: (p, torch.complex(g, p).conj().imag),
    "no row": lambda p, g: (p[:0], g[:0]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BACKENDS)
def test_any_layout_gives_the_numbers_of_the_same_values_in_one_piece(monkeypatch: pytest.MonkeyPatch, name: str, layout: str) -> None:
    monkeypatch.setenv("ADEPT_FAST_BACKEND", name)
    parameter, gradient = LAYOUTS[layout](*pair(9, 70))
    theta, g = parameter.double(), gradient.double()
    for dim in (0, 1, -1):
        exact = ((g * g).sum(1 - dim % 2), (theta * g).abs().sum(1 - dim % 2), (theta * g).sum(1 - dim % 2))
        for value, truth in zip(gradient_sums(parameter, gradient, dim), exact, strict=True):
            torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-4)


WRONG: dict[str, tuple[Callable[[Tensor, Tensor], tuple], str]] = {
    "a shorter gradient": (lambda p, g: (p, g[:1], 0), r"shape \(9, 70\) .* found \(9, 70\) on cpu and \(1, 70\) on cpu"),
    "a longer gradient": (lambda p, g: (p[:2], g, 1), r"shape \(2, 70\) .* found \(2, 70\) on cpu and \(9, 70\) on cpu"),
    "another order": (lambda p, g: (p, g.T, 0), r"\(70, 9\) on cpu"),
    "a gradient on meta": (lambda p, g: (p, g.to("meta"), 0), "on meta"),
    "both on meta": (lambda p, g: (p.to("meta"), g.to("meta"), 0), "not meta"),
    "integers": (lambda p, g: (p.long(), g, 0), "found torch.int64"),
    "a complex gradient": (lambda p, g: (p, g.to(torch.complex64), 0), "torch.complex64"),
    "no such dimension": (lambda p, g: (p, g, 2), "and 2"),
    "a scalar": (lambda p, g: (p[0, 0], g[0, 0], 0), r"shape \(\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", BACKENDS)
def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, wrong: str) -> None:
    monkeypatch.setenv("ADEPT_FAST_BACKEND", name)
    change, message = WRONG[wrong]
    with pytest.raises(InputError, match=message):
        gradient_sums(*change(*pair(9, 70)))


@pytest.mark.parametrize("shape", [(7, 5), (40,)])
@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_parameter_given_other_data_behind_the_hooks_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, running: bool, shape: tuple[int, ...]
) -> None:
    monkeypatch.setenv("ADEPT_FAST_BACKEND", name)
    parameter = nn.Parameter(pair(*shape)[0].clone())
    with GradientSums({"weight": parameter}, {"weight": [0]}, not running, running) as sums:
        sums.backward((3 * parameter).sum())
        parameter.data = torch.ones(3, *shape[1:])
        with pytest.raises(InputError, match=r"weight: expected a parameter and a gradient of shape \(" + str(shape[0])):
            sums.backward((3 * parameter).sum())
        parameter.grad = None
        if running:
            with pytest.raises(InputError, match="weight: expected"):
                sums.read(1)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_momentum_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ADEPT_FAST_BACKEND", name)
    parameter = nn.Parameter(pair(7, 5)[0].clone())
    with GradientSums({"weight": parameter}, {"weight": [0]}, False, True) as sums:
        sums.backward((3 * parameter).sum())
        assert sums.against({"weight": torch.full((7, 5), 2.0)})["weight", 0].tolist() == [[30.0] * 7, [20.0] * 7, [45.0] * 7]
        for shape in ((1, 5), (5, 7), (7,)):
            with pytest.raises(InputError, match=r"weight: expected .* shape \(7, 5\)"):
                sums.against({"weight": torch.ones(shape)})


@pytest.mark.parametrize("name", BACKENDS)
def test_a_scalar_is_a_vector_of_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ADEPT_FAST_BACKEND", name)
    scalar, row = nn.Parameter(torch.tensor(-2.0)), nn.Parameter(torch.tensor([5.0, 7.0]))
    with GradientSums({"gate": scalar}, {"gate": [0]}, True, False) as sums:
        for _ in range(2):
            sums.backward((scalar * row).sum())
        ((key, (found, _)),) = sums.read(1).items()
    assert key == ("gate", 0) and found.tolist() == [[288.0], [48.0], [-48.0]]

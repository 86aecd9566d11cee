"""Sums per unit, in plain torch."""

from __future__ import annotations

import pytest
import torch

from adept_fast.ops.gradient_sums.reference import gradient_sums


@pytest.mark.parametrize(("shape", "dim"), [((7, 5), 0), ((7, 5), 1), ((7, 5), -1), ((19,), 0), ((3, 5, 7), 1), ((0, 4), 0), ((4, 0), 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradient_sums(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    param, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    others = [d for d in range(len(shape)) if d != dim % len(shape)]
    g, product = grad.double(), param.double() * grad.double()
    for ours, summand in zip(gradient_sums(param, grad, dim), (g * g, product.abs(), product), strict=True):
        expected = summand.sum(others) if others else summand
        assert ours.dtype == torch.float32 and ours.shape == (shape[dim],)
        torch.testing.assert_close(ours, expected.float(), rtol=1e-6, atol=2e-6)


def test_gradient_sums_accumulate_in_fp32() -> None:
    """2^12 equal bf16 terms: a bf16 accumulator would stop growing at 2^8 of them."""
    sums = gradient_sums(torch.ones(3, 4096, dtype=torch.bfloat16), torch.full((3, 4096), 0.5, dtype=torch.bfloat16), 0)
    assert [s.tolist() for s in sums] == [[1024.0] * 3, [2048.0] * 3, [2048.0] * 3]

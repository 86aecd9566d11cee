"""Sums of a gradient and of its products with its parameter, in plain torch: the definition that all backends follow."""

from __future__ import annotations

from torch import Tensor

from adept_fast.ops.number_formats import accumulator


def gradient_sums(param: Tensor, grad: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over all dimensions but `dim`: (sum g^2, sum |theta g|, sum theta g), fp32 [param.shape[dim]] each.

    param, grad: one shape, of at least one dimension. Accumulated in fp32 (fp64 if one is fp64).
    """
    dtype, length = accumulator(param, grad), param.shape[dim]
    theta, g = (x.detach().movedim(dim, 0).reshape(length, x.numel() // max(length, 1)).to(dtype) for x in (param, grad))
    product = theta * g
    squares, magnitudes, products = (x.sum(1).float() for x in (g.square(), product.abs(), product))
    return squares, magnitudes, products

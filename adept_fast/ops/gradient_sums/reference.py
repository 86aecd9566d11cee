"""Sums of a gradient and of its products with its parameter, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def saliency_sums(param: Tensor, grad: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per index of dimension `dim`, over all other dimensions: (sum g^2, sum |theta g|, sum theta g).

    `param`, `grad`: one shape, at least one dimension. Three fp32 vectors of length param.shape[dim], accumulated in fp32 (fp64 for fp64).
    """
    dtype, length = accumulator(param, grad), param.shape[dim]
    theta, g = (x.detach().movedim(dim, 0).reshape(length, x.numel() // max(length, 1)).to(dtype) for x in (param, grad))
    product = theta * g
    squares, magnitudes, products = (x.sum(1).float() for x in (g.square(), product.abs(), product))
    return squares, magnitudes, products

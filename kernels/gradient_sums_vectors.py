"""Sums of gradients of many vectors (norms, biases) in one launch per combination of dtypes: a launch each would take longer than its work.

    for each index i:   sums[0] += g_i^2    sums[1] += |theta_i g_i|    sums[2] += theta_i g_i    running += g_i

Accumulated in fp64, the running gradient in fp32. A table on the device has the addresses, and each vector one program. Tested in
Triton's interpreter and compiled for sm_80, sm_90 and sm_100; untested on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adept_fast.kernels.number_formats import TRITON_DTYPES, read, widened

WORDS = tl.constexpr(6)
BLOCK = 1024


class Vector(NamedTuple):
    """param, grad: fp32, bf16 or fp16 [n]. sums: fp64 [1 or 3, n]. running: fp32 [n] or None. All contiguous."""

    param: Tensor
    grad: Tensor
    sums: Tensor
    running: Tensor | None


@triton.jit
def add_terms_kernel(rows, PARAM: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """Add the terms of vector a in program a. A row: addresses of param, grad, sums and running (0: none), length, number of sums."""
    row = rows + tl.program_id(0).to(tl.int64) * WORDS
    param = tl.load(row)
    grad = tl.load(row + 1)
    sums = tl.load(row + 2).to(tl.pointer_type(tl.float64))
    running = tl.load(row + 3)
    length = tl.load(row + 4)
    kinds = tl.load(row + 5)
    for first in range(0, length, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < length
        g = widened(read(grad, (0, i, inside), GRAD, False), GRAD)
        place = sums + i
        tl.store(place, tl.load(place, mask=inside, other=0.0) + g.to(tl.float64) * g.to(tl.float64), mask=inside)
        if kinds == 3:
            product = widened(read(param, (0, i, inside), PARAM, False), PARAM).to(tl.float64) * g.to(tl.float64)
            tl.store(place + length, tl.load(place + length, mask=inside, other=0.0) + tl.abs(product), mask=inside)
            tl.store(place + 2 * length, tl.load(place + 2 * length, mask=inside, other=0.0) + product, mask=inside)
        if running != 0:
            target = running.to(tl.pointer_type(tl.float32)) + i
            tl.store(target, tl.load(target, mask=inside, other=0.0) + g, mask=inside)


def add_vectors(vectors: Sequence[Vector]) -> None:
    """Add the terms of each vector, all on one device, to its sums. Does not synchronise."""
    setups: dict[tuple[torch.dtype, torch.dtype], list[Vector]] = {}
    for vector in vectors:
        assert all(x is None or x.is_contiguous() for x in vector)
        setups.setdefault((vector.param.dtype, vector.grad.dtype), []).append(vector)
    for (param, grad), members in setups.items():
        table = [[*(0 if x is None else x.data_ptr() for x in vector), vector.param.numel(), len(vector.sums)] for vector in members]
        device = members[0].param.device
        rows = torch.tensor(table, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        with torch.cuda.device_of(rows):
            add_terms_kernel[(len(members),)](rows, PARAM=TRITON_DTYPES[param], GRAD=TRITON_DTYPES[grad], BLOCK=BLOCK)

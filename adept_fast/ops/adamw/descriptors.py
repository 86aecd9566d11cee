"""The tables that native code and the Triton kernels read: a row of named 64-bit words per tensor and per group."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from struct import pack
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from adept_fast.ops.adamw.reference import AdamWOptions
from adept_fast.ops.number_formats import FORMATS

Word = TypeVar("Word")


class TensorRow(NamedTuple, Generic[Word]):
    """The words of one tensor, in the order of struct Tensor in csrc/descriptor.h. Word: the word's index, or a column of values."""

    param: Word
    grad: Word
    exp_avg: Word
    exp_avg_sq: Word
    max_exp_avg_sq: Word
    master: Word
    step: Word
    multipliers: Word
    numel: Word
    length: Word
    inner: Word
    first_index: Word
    seed: Word
    group: Word
    formats: Word
    mode: Word
    exp_avg_scale: Word
    exp_avg_sq_scale: Word
    row: Word


class GroupRow(NamedTuple):
    """The words of one group, in the order of struct Group in csrc/descriptor.h.

    lr ... maximize: fp64.
    *_address: address of an fp32 or fp64 on the parameters' device that replaces the number; 0: none.
    kinds: dtype at each address, 2 bits each for lr, beta1 and beta2: 1 fp32, 2 fp64.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: float
    lr_address: int
    beta1_address: int
    beta2_address: int
    kinds: int


class GradientRow(NamedTuple):
    """The words of struct Gradient of csrc/cpu_adamw.h."""

    address: int
    numel: int
    format: int


WORDS, GROUP_WORDS = len(TensorRow._fields), len(GroupRow._fields)
WORD = TensorRow(*range(WORDS))
"""The index of each word. `rows[WORD.numel::WORDS]` is a column."""
GROUP_WORD = GroupRow(*range(GROUP_WORDS))


def gradient_rows(grads: Sequence[Tensor]) -> array[int]:
    return array("q", [word for g in grads for word in GradientRow(g.data_ptr(), g.numel(), FORMATS[g.dtype])])


def group_rows(options: Sequence[AdamWOptions]) -> bytes:
    """Pack one row per group. lr, beta1, beta2: numbers, or fp32 or fp64 tensors on the parameters' device."""
    rows = bytearray()
    for o in options:
        scalars = (o.lr, o.beta1, o.beta2)
        lr, beta1, beta2 = (0.0 if isinstance(x, Tensor) else x for x in scalars)
        lr_address, beta1_address, beta2_address = (x.data_ptr() if isinstance(x, Tensor) else 0 for x in scalars)
        kinds = sum((1 if x.dtype == torch.float32 else 2) << 2 * i for i, x in enumerate(scalars) if isinstance(x, Tensor))
        row = GroupRow(
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            maximize=float(o.maximize),
            lr_address=lr_address,
            beta1_address=beta1_address,
            beta2_address=beta2_address,
            kinds=kinds,
        )
        rows += pack("6d4q", *row)
    return bytes(rows)

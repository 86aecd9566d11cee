"""Sample training examples: one global batch per optimizer step, the same on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from itertools import cycle, islice

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class EpochSampler(Sampler[int]):
    """Seeds a random sampler by seed and epoch, so that a resumed run draws the same order."""

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self._sampler, self._seed, self._epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        self._sampler.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(self._sampler)


class GlobalBatchSampler(Sampler[int]):
    """Shuffles by seed and epoch, and repeats the beginning of the order until the epoch's last global batch is complete.

    A shorter last batch would be padded differently on another number of processes. per_step: examples of an optimizer step, over all
    processes and accumulated batches.
    """

    def __init__(self, examples: Sized, per_step: int, seed: int) -> None:
        self._order, self._per_step = SeedableRandomSampler(examples, data_seed=seed), per_step

    def set_epoch(self, epoch: int) -> None:
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._per_step) * self._per_step

    def __iter__(self) -> Iterator[int]:
        return islice(cycle([*self._order]), len(self))

"""One case of the crash harness: a call on input that may be bad, and how what came of it is judged."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What a public function may raise for bad input. Others (AttributeError, AssertionError, SystemError ...) are slips.
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError, KeyError)
BACKEND = "ADEPT_FAST_BACKEND"

Numbers = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """A call and the right answers.

    described: what is tried, in words and numbers enough to write it by hand.
    call: the public function on its input; returns the tensors that came of it. It builds all it changes, so that `expected` starts afresh.
    expected: torch's or the reference's numbers for the same input, asked for once `call` has returned; where it raises one of REFUSALS,
        `call` should have. None: there is no other way to get them.
    valid: an exception is a fault too.
    finite: the input is finite, so the result must be.
    rtol, atol: how far from `expected`, as of torch.testing.assert_close.
    backend: ADEPT_FAST_BACKEND during the call.
    """

    described: str
    call: Numbers
    expected: Numbers | None = None
    valid: bool = False
    finite: bool = True
    rtol: float = 1e-5
    atol: float = 1e-6
    backend: str | None = None

    def fault(self) -> str | None:
        """What is wrong with what the call does, or None."""
        before = os.environ.pop(BACKEND, None)
        if self.backend is not None:
            os.environ[BACKEND] = self.backend
        try:
            found = list(self.call())
        except REFUSALS as error:
            return f"valid input was refused: {type(error).__name__}: {error}" if self.valid else None
        finally:
            os.environ.pop(BACKEND, None)
            if before is not None:
                os.environ[BACKEND] = before
        for index, tensor in enumerate(found):
            if self.finite and not bool(torch.isfinite(tensor).all()):
                return f"result {index} of finite input is not finite: {tensor}"
        return None if self.expected is None else self._difference(found, self.expected)

    def _difference(self, found: Sequence[Tensor], expected: Numbers) -> str | None:
        try:
            right = list(expected())
        except REFUSALS as error:
            return f"taken, where the reference refuses: {type(error).__name__}: {error}"
        if len(found) != len(right):
            return f"{len(found)} results, {len(right)} expected"
        for index, (ours, theirs) in enumerate(zip(found, right, strict=True)):
            try:
                torch.testing.assert_close(ours, theirs, rtol=self.rtol, atol=self.atol, equal_nan=True)
            except AssertionError as error:
                return f"result {index} is wrong: {error}"
        return None

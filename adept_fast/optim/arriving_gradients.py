"""Gradients that arrive in host memory while backward runs, and the updates that run ahead of step() with them."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from adept_fast.optim.adamw import AdamW
from adept_fast.optim.host_adamw import HostAdamW, HostCopy, is_bucket
from adept_fast.optim.transfers import Copied


class ArrivingGradients:
    """Adds up gradients on a thread, and updates ahead with those that seem complete.

    copies: of the parameters that had a gradient so far.
    host: the optimizer that updates them. The thread uses it while jobs are left: call `wait` first.
    ahead: whether to update ahead.
    """

    def __init__(self, host: HostAdamW, copies: dict[Tensor, HostCopy]) -> None:
        self._host, self._copies = host, copies
        self.ahead = False
        self._thread = ThreadPoolExecutor(1, "OffloadedAdamW")  # starts with the first job
        self._jobs: deque[Future[None]] = deque()
        self._arrivals: deque[tuple[HostCopy, Tensor, Copied]] = deque()
        self._received: dict[HostCopy, None] = {}  # since the last update ahead
        self._ahead_with: object = None  # what the updates ahead depended on; None: there are none

    @torch.no_grad()
    def take(self, copy: HostCopy, grad: Tensor) -> None:
        """Copy a gradient to the host, and free it on the device."""
        self._arrivals.append((copy, *copy.download(grad)))
        copy.arrived += 1
        copy.copied = copy.param.grad = None

    def start(self, optimizer: AdamW) -> None:
        """Start `receive` on the thread."""
        self._jobs.append(self._thread.submit(self.receive, optimizer))

    @torch.no_grad()
    def receive(self, optimizer: AdamW) -> None:
        """Add up the gradients that were taken. Update ahead, by the bucket, where as many have arrived as before the last step."""
        while self._arrivals:
            copy, memory, copied = self._arrivals.popleft()
            copied.synchronize()
            copy.undo()
            if memory is not copy.grad:
                copy.grad.add_(memory)
            self._received[copy] = None
        complete = [copy for copy in self._received if copy.arrived == copy.expected]
        if not self.ahead or not complete or not is_bucket(complete):
            return
        self._received.clear()
        try:
            if self._ahead_with is None:
                self._host.follow(optimizer, self._copies)
                self._ahead_with = _depends_on(self._host)
            for copy in complete:
                copy.transfers.wait_for_uploads()
                copy.keep()
            self._host.update(complete, None)
        except Exception:  # step() updates again, and raises what persists
            for copy in complete:
                copy.undo()

    def wait(self) -> None:
        """Wait for the thread. Raises its error, and discards the gradients, which are incomplete then."""
        errors = []
        while self._jobs:
            errors.append(self._jobs[0].exception())
            self._jobs.popleft()
        for error in filter(None, errors):
            self.discard()
            raise error

    def holds(self, optimizer: AdamW) -> bool:
        """Whether updates that ran ahead had the hyperparameters and settings that the optimizer has now."""
        return self._ahead_with in (None, _depends_on(optimizer))

    @torch.no_grad()
    def undo(self) -> None:
        """Restore what was updated ahead. The gradients stay."""
        for copy in self._copies.values():
            copy.undo()
        self.settled()

    def discard(self) -> None:
        """Forget the gradients since the last step. `wait` first."""
        self.undo()
        self._arrivals.clear()
        for copy in self._copies.values():
            copy.arrived = 0

    def settled(self) -> None:
        """Note that no update is ahead any more."""
        self._received.clear()
        self._ahead_with = None

    def close(self) -> None:
        """End the thread. Gradients that have arrived stay."""
        self._thread.shutdown()
        self.ahead = False


def _depends_on(optimizer: AdamW) -> object:
    """Return what an update depends on beside gradient, parameter, state and unit rates."""
    names = ("lr", "eps", "weight_decay", "maximize", "amsgrad")
    numbers = [[float(x) for x in (*group["betas"], *(group[name] for name in names))] for group in optimizer.param_groups]
    return optimizer.state_dtype, optimizer.master_weights, optimizer.backend, numbers

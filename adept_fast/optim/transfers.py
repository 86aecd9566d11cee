"""Copies between a device and the host: on side streams of a GPU; at once where the parameters are on the CPU, as a stand-in for one."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from adept_fast.errors import InputError


class Copied(Protocol):
    """An event: a copy to the host is complete."""

    def synchronize(self) -> None:
        """Block until then."""


class Transfers(Protocol):
    """Copies of the tensors of one device. A copy begins when the work has ended that the current stream has been given so far."""

    def host_like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Allocate host memory for copies, of the shape and strides of `tensor`."""

    def download(self, host: Tensor, tensor: Tensor) -> Copied:
        """Copy to the host. The memory of `tensor` may be freed at once, `host` is read after the event."""

    def upload(self, tensor: Tensor, host: Tensor) -> None:
        """Copy to the device. What the current stream is given after `finish` sees it."""

    def finish(self) -> None:
        """Let the current stream wait for all uploads."""

    def wait_for_uploads(self) -> None:
        """Block until the uploads before the last `finish` are complete, so that their host memory may be written."""


class CudaTransfers:
    """Transfers of a GPU, from and to pinned memory. One stream each way, kept from step to step, so that both ways run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._down, self._up = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._uploaded: torch.cuda.Event | None = None

    def host_like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(tensor, dtype=dtype, device="cpu", pin_memory=True, requires_grad=False)

    def download(self, host: Tensor, tensor: Tensor) -> Copied:
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._down)
        copied: torch.cuda.Event = self._down.record_event()
        return copied

    def upload(self, tensor: Tensor, host: Tensor) -> None:
        self._up.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._up):
            tensor.copy_(host, non_blocking=True)

    def finish(self) -> None:
        self._uploaded = self._up.record_event()
        torch.cuda.current_stream(self._device).wait_event(self._uploaded)

    def wait_for_uploads(self) -> None:
        if self._uploaded is not None:
            self._uploaded.synchronize()


class CpuTransfers:
    """Transfers of parameters that are on the CPU themselves: plain copies."""

    def host_like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(tensor, dtype=dtype, requires_grad=False)

    def download(self, host: Tensor, tensor: Tensor) -> Copied:
        host.copy_(tensor)
        return self

    def synchronize(self) -> None:
        pass

    def upload(self, tensor: Tensor, host: Tensor) -> None:
        tensor.copy_(host)

    def finish(self) -> None:
        pass

    def wait_for_uploads(self) -> None:
        pass


def transfers_of(device: torch.device) -> Transfers:
    """Return the transfers of a device. Raises InputError unless it is a CUDA device or the CPU."""
    if device.type == "cpu":
        return CpuTransfers()
    if device.type != "cuda":
        raise InputError(f"params: offloading copies from CUDA devices, not from {device.type}: use AdamW")
    return CudaTransfers(device)

"""Memory of this process and of its device: what is held, what was held at most, and what there is."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

STATUS, CLEAR, MEMINFO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def resident(field: str = "VmRSS") -> int:
    """Return the bytes of this process in memory, or with "VmHWM" the most there were since `forget_peak`. Linux only."""
    return _kilobytes(STATUS, field)


def forget_peak(device: torch.device | None = None) -> None:
    """Let `peak` begin anew with what is held now. Without effect where the system cannot do that (other systems than Linux)."""
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        CLEAR.write_text("5")


def peak(device: torch.device | None = None) -> int:
    """Return the most bytes held since `forget_peak`: torch's allocations on a CUDA device, else the process's resident memory."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        return resident("VmHWM")
    import resource

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else 1024 * found


def capacity(device: torch.device | None = None) -> int:
    """Return the bytes of memory of the device, or those that this machine or container lets its processes have."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = _kilobytes(MEMINFO, "MemTotal") if MEMINFO.exists() else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no such file, or "max"
        return min(whole, int(LIMIT.read_text()))
    return whole


def _kilobytes(path: Path, field: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(field))

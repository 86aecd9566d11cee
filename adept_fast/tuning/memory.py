"""Peak memory of this process."""

from __future__ import annotations

import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch had allocated on a CUDA device; elsewhere the most that was resident since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak

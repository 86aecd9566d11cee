"""Seconds and bytes of a call, on the device where it works."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor

from adept_fast.runtime.memory import forget_peak, resident

QUEUED = 48  # flushes of 256 MiB before a timed call: about 6 ms of an H200


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def now(device: torch.device) -> float:
    """Seconds on a clock that waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cache_filler(device: torch.device) -> Tensor:
    """What, once written to, has flushed the device's caches."""
    return torch.zeros(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)


def interleaved(
    ways: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, flush: Tensor | None = None
) -> dict[str, float]:
    """Median seconds of each way, called in turn, the cache flushed before each where `flush` is given. The first round is not counted."""
    return {name: seconds for name, (seconds, _) in interleaved_with_host(ways, rounds, device, flush).items()}


def interleaved_with_host(
    ways: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, flush: Tensor | None = None
) -> dict[str, tuple[float, float]]:
    """Median seconds of each way: of the device, and of the host alone until the call returns.

    On a GPU with `flush`, events time the device behind queued work, so that the host is ahead unless a call takes longer than that work.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            queued = flush is not None and device.type == "cuda"
            for _ in range(QUEUED if queued else 1):
                if flush is not None:
                    flush.add_(1)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if queued else []
            start = time.perf_counter() if queued else now(device)
            for event in events[:1]:
                event.record()
            way()
            host = time.perf_counter() - start
            for event in events[1:]:
                event.record()
            whole = now(device) - start
            seconds[name].append((events[0].elapsed_time(events[1]) / 1e3 if events else whole, host))
    return {name: (median(d for d, _ in values[1:]), median(h for _, h in values[1:])) for name, values in seconds.items()}


def peak_memory(way: Callable[[], object], device: torch.device) -> int:
    """Bytes held at most during a call, beyond what was held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        way()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # or what earlier calls gave back to the allocator would be taken again unseen
    forget_peak()
    before = resident()
    way()
    return resident("VmHWM") - before


def allocated(call: Callable[[], object]) -> int:
    """Bytes that tensors on the CPU take at most during a call, beyond what they took before it: torch's own record of its allocations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0).max())

"""Seconds, bytes and Python calls of a call, on the device where it works."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

from adept_fast.runtime.memory import forget_peak, resident

Ways = Mapping[str, Callable[[], object]]


class Timed(NamedTuple):
    """Seconds that the device works on a call, and seconds of the host until the call returns."""

    device: float
    host: float


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def now(device: torch.device) -> float:
    """Seconds on a clock that waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cache_filler(device: torch.device) -> Tensor:
    """What, once written to, has flushed the device's caches. On a GPU a write takes long enough to queue work behind it."""
    return torch.zeros(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)


def interleaved(ways: Ways, rounds: int, device: torch.device, flush: Tensor | None = None) -> dict[str, float]:
    """Return the median seconds of the device for each way: see timed_rounds."""
    return {name: median(each.device for each in timed) for name, timed in timed_rounds(ways, rounds, device, flush).items()}


def timed_rounds(
    ways: Ways, rounds: int, device: torch.device, flush: Tensor | None = None, most: float = math.inf, warm: bool = False
) -> dict[str, list[Timed]]:
    """Time each way once a round. Each round begins with the next way, so that none always follows the same one.

    most: seconds. A way that has taken them leaves after the third round. warm: without the uncounted round before the others.
    flush: from cache_filler; written to before each call. On a GPU a way is then called twice a round. The first call, on an idle device,
    gives the host's time. The second is queued behind writes that take longer than that, and events give the device's time without gaps,
    as long as a call queues no more than the 1,024 launches that a GPU holds. Without `flush`, both are the time until the device is done.
    """
    names, timed = list(ways), {name: list[Timed]() for name in ways}
    behind = flush is not None and device.type == "cuda"
    fill = _seconds_of_writing(flush, device) if flush is not None and behind else 0.0
    for number in range(int(warm), rounds + 1):
        first = number % max(len(names), 1)
        for name in names[first:] + names[:first]:
            if len(timed[name]) >= 3 and sum(each.device + each.host for each in timed[name]) > most:
                continue
            if flush is not None:
                flush.add_(1)
            start = now(device)
            ways[name]()
            host = time.perf_counter() - start
            whole = now(device) - start
            if number and flush is not None and behind:
                timed[name].append(Timed(_behind(flush, 1 + math.ceil(1.5 * host / fill), ways[name], device), host))
            elif number:
                timed[name].append(Timed(whole, whole))
    return timed


def _behind(flush: Tensor, writes: int, call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a GPU works on a call which waits for so many writes to `flush`."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(writes):
        flush.add_(1)
    begin.record(torch.cuda.current_stream(device))
    call()
    end.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def _seconds_of_writing(flush: Tensor, device: torch.device) -> float:
    return median(_behind(flush, 1, lambda: flush.add_(1), device) for _ in range(5))


def python_calls(call: Callable[[], object]) -> int:
    """Return how many Python and C functions one call enters, itself among them."""
    count = -1  # sys.setprofile at the end is one

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def tensor_bytes(values: object) -> int:
    """Return the bytes of memory behind all tensors in nested containers and objects, each storage once."""
    storages: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):  # a tensor made of others
            for name in value.__tensor_flatten__()[0]:
                visit(getattr(value, name))
        elif isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            visit(list(value.values()))
        elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
            for each in value:
                visit(each)
        elif hasattr(value, "__dict__"):
            visit(vars(value))

    visit(values)
    return sum(storages.values())


def held_memory(device: torch.device) -> int:
    """Return the bytes that the CUDA allocator has given out, or that the process has in memory."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    _give_back_freed_memory()
    return resident()


def peak_memory(way: Callable[[], object], device: torch.device) -> int:
    """Bytes held at most during a call, beyond what was held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        way()
        return torch.cuda.max_memory_allocated(device) - before
    _give_back_freed_memory()  # or what earlier calls gave back to the allocator would be taken again unseen
    forget_peak()
    before = resident()
    way()
    return resident("VmHWM") - before


def _give_back_freed_memory() -> None:
    ctypes.CDLL(None).malloc_trim(0)


def allocated(call: Callable[[], object]) -> int:
    """Bytes that tensors on the CPU take at most during a call, beyond what they took before it: torch's own record of its allocations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0).max())

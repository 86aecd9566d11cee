"""Times, bytes and calls that benchmarks report are those of the call alone."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import measure

CUDA = torch.device("cuda")


class Gpu:
    """A stand-in for a GPU and its host: work is queued, and the device does it in order. Seconds."""

    launch = 5e-6  # of the host, for each piece of work
    most = 1024  # pieces in the queue; then the host waits for the first

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.device = 0.0
        self.ends: deque[float] = deque(maxlen=self.most)
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: object) -> None:
                self.time = max(gpu.device, gpu.host)

            def elapsed_time(self, end: Event) -> float:
                assert gpu.host >= gpu.device, "both events must be over"
                return 1e3 * (end.time - self.time)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.wait())
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.host)

    def wait(self) -> None:
        self.host = max(self.host, self.device)

    def works(self, seconds: float) -> None:
        if len(self.ends) == self.most:
            self.host = max(self.host, self.ends[0])
        self.host += self.launch
        self.device = max(self.device, self.host) + seconds
        self.ends.append(self.device)

    def filler(self) -> Any:
        class Filler:
            add_ = staticmethod(lambda _: self.works(0.5e-3))

        return Filler()


def kernels(gpu: Gpu, count: int, each: float, between: float) -> Callable[[], None]:
    """A step of so many kernels, before each of which the host is busy."""

    def step() -> None:
        for _ in range(count):
            gpu.host += between
            gpu.works(each)

    return step


def test_a_gpu_is_timed_without_the_host_and_the_host_without_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    ways = {"one": kernels(gpu, 1, 8e-3, 1e-3), "many": kernels(gpu, 900, 2e-6, 30e-6), "busy": kernels(gpu, 1, 1e-3, 0.3)}
    found = measure.timed_rounds(ways, 5, CUDA, gpu.filler())
    expected = {"one": (8e-3, 1.005e-3), "many": (1.8e-3, 31.5e-3), "busy": (1e-3, 0.300005)}
    for name, timed in found.items():
        assert len(timed) == 5
        for each in timed:
            assert each.device == pytest.approx(expected[name][0], rel=1e-6)
            assert each.host == pytest.approx(expected[name][1], rel=1e-6)
    assert measure.interleaved(ways, 3, CUDA, gpu.filler())["many"] == pytest.approx(1.8e-3)


def test_without_a_filler_a_gpu_is_timed_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    assert measure.interleaved({"one": kernels(gpu, 1, 8e-3, 1e-3)}, 3, CUDA)["one"] == pytest.approx(9.005e-3)


def test_each_round_begins_with_the_next_way_and_slow_ones_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def takes(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            clock[0] += seconds

        return call

    found = measure.timed_rounds({"a": takes("a", 1.0), "b": takes("b", 2.0), "c": takes("c", 9.0)}, 5, torch.device("cpu"), most=20.0)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc" + "ba" + "ab"
    assert {name: [each.device for each in timed] for name, timed in found.items()} == {"a": [1.0] * 5, "b": [2.0] * 5, "c": [9.0] * 3}


def test_calls_are_counted_from_the_call_on() -> None:
    def inner() -> None:
        math.sqrt(2.0)

    assert measure.python_calls(lambda: None) == 1
    assert measure.python_calls(lambda: [inner(), inner()]) == 5


class Halves(torch.Tensor):
    """A tensor made of others, as quantised moments are."""

    @staticmethod
    def __new__(cls, low: torch.Tensor, high: torch.Tensor) -> Halves:
        made = torch.Tensor._make_wrapper_subclass(cls, low.shape)
        made.low, made.high = low, high
        return made

    @classmethod
    def __torch_dispatch__(cls, *given: Any) -> Any:
        return NotImplemented

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["low", "high"], None


def test_each_storage_of_a_state_counts_once() -> None:
    class Kept:
        def __init__(self, values: torch.Tensor) -> None:
            self.values, self.name = values, "moments"

    whole = torch.zeros(100)
    made = Halves(torch.zeros(10, dtype=torch.int8), torch.zeros(10, dtype=torch.int16))
    assert measure.tensor_bytes({"a": whole, "b": [whole[:10], 3, "text"]}) == 400
    assert measure.tensor_bytes({"made": made}) == 30
    assert measure.tensor_bytes({0: {"kept": Kept(torch.zeros(5))}}) == 20


def test_memory_that_a_process_holds() -> None:
    device, made = torch.device("cpu"), []
    before = measure.held_memory(device)
    made.append(torch.ones(2**25, dtype=torch.uint8))
    assert measure.held_memory(device) - before == pytest.approx(2**25, rel=0.05)
    made.clear()
    assert measure.held_memory(device) - before < 2**21

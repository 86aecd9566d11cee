"""Several processes of one run, as torchrun starts them: who this one is, and sums over all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from adept_fast.runtime.atomic_files import staged_folder

T = TypeVar("T")


def join() -> None:
    """Join the processes that torchrun started, where it did; each takes the CUDA device of its local rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def active() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def rank() -> int:
    return distributed.get_rank() if active() else 0


def processes() -> int:
    return distributed.get_world_size() if active() else 1


def share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th of the items, of n processes: this one's."""
    return items[rank() :: processes()]


def differing(values: Mapping[str, Any]) -> list[str]:
    """Names of the values that are not the same in all processes, each of which gives the same names."""
    if not active():
        return []
    found: list[Any] = [None] * processes()
    distributed.all_gather_object(found, values)
    return [name for name in values if any(each[name] != values[name] for each in found)]


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on its own device."""
    if not active():
        return values
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else torch.device("cpu")
    summed = values.to(device, copy=True)
    distributed.all_reduce(summed)
    return summed.to(values.device)


def of_first(value: T) -> T:
    """What the first process has, in all."""
    if not active():
        return value
    found = [value]
    distributed.broadcast_object_list(found)
    return found[0]


def leads() -> bool:
    """Whether this process is the one that writes, before as after they have joined."""
    return os.environ.get("RANK", "0") == "0"


def wait() -> None:
    if active():
        distributed.barrier()


@contextmanager
def staged_together(path: Path) -> Iterator[Path]:
    """artefacts.staged_folder for processes that share a file system: all write into one folder, which gets its name when all have."""
    with ExitStack() as stack:
        staging = [str(stack.enter_context(staged_folder(path))) if rank() == 0 else ""]
        if active():
            distributed.broadcast_object_list(staging)
        yield Path(staging[0])
        wait()
    wait()

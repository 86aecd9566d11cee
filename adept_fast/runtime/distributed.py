"""The processes of one run, as torchrun starts them: rank, sums and barriers. All functions work in a single process too."""

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
    """Initialise torch.distributed if torchrun has started several processes. Each takes the CUDA device of its local rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def active() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def rank() -> int:
    return distributed.get_rank() if active() else 0


def world_size() -> int:
    return distributed.get_world_size() if active() else 1


def share(items: Sequence[T]) -> Sequence[T]:
    """Return every n-th item for n processes, beginning with this process's rank."""
    return items[rank() :: world_size()]


def differing(values: Mapping[str, Any]) -> list[str]:
    """Return the names of values that differ between processes. All must pass the same names."""
    if not active():
        return []
    found: list[Any] = [None] * world_size()
    distributed.all_gather_object(found, values)
    return [name for name in values if any(each[name] != values[name] for each in found)]


def total(values: Tensor) -> Tensor:
    """Sum a tensor over all processes. The result is on the tensor's device."""
    if not active():
        return values
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else torch.device("cpu")
    summed = values.to(device, copy=True)
    distributed.all_reduce(summed)
    return summed.to(values.device)


def broadcast(value: T) -> T:
    """Return the first process's value in all processes."""
    if not active():
        return value
    found = [value]
    distributed.broadcast_object_list(found)
    return found[0]


def is_main() -> bool:
    """Whether this is the process that writes files. May be called before `join`."""
    return os.environ.get("RANK", "0") == "0"


def barrier() -> None:
    if active():
        distributed.barrier()


@contextmanager
def staged_together(path: Path) -> Iterator[Path]:
    """Yield one staged_folder to all processes, which share a file system. It replaces `path` when all have left."""
    with ExitStack() as stack:
        staging = [str(stack.enter_context(staged_folder(path, replace=True))) if rank() == 0 else ""]
        if active():
            distributed.broadcast_object_list(staging)
        yield Path(staging[0])
        barrier()
    barrier()

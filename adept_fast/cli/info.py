"""`adept-fast info`: versions, threads, devices, and which backends were found."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from adept_fast import __version__
from adept_fast.ops import dispatch

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "accelerate", "datasets", "safetensors", "huggingface_hub", "gguf", "numpy")


def run(name: str, words: Sequence[str]) -> str:
    """Return the page as aligned plain text. Packages are looked up, not imported."""
    sections = [("versions", _versions()), ("cpu", _cpu()), ("gpus", _gpus()), ("backends", _backends()), ("operations", _operations())]
    return "\n\n".join(f"{title}\n{_aligned(rows)}" for title, rows in sections)


def _aligned(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _versions() -> list[tuple[str, str]]:
    rows = [("adept_fast", __version__), ("python", f"{platform.python_version()} ({sys.platform}, {platform.machine()})")]
    for package in PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def _cpu() -> list[tuple[str, str]]:
    return [("cores", str(os.cpu_count())), ("torch threads", str(torch.get_num_threads()))]


def _gpus() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("none", f"torch {torch.__version__} finds no GPU")]
    rows = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        rows.append((str(index), f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {memory}, {gpu.multi_processor_count} multiprocessors"))
    return rows


def _backends() -> list[tuple[str, str]]:
    rows = []
    for name, status in dispatch.status().items():
        rows.append((name, f"{'found' if status.found else 'not found'}: {status.reason}"))
        if not status.found:
            rows.append(("", f"remedy: {status.remedy}"))
    return rows


def _operations() -> list[tuple[str, str]]:
    """List each operation's backends, the preferred one first, with their modules."""
    rows = []
    for operation, modules in dispatch.IMPLEMENTED.items():
        names = [operation, *[""] * (len(modules) - 1)]
        rows += [(name, f"{backend:<6}  {module}") for name, (backend, module) in zip(names, modules.items(), strict=True)]
    return rows

"""Attempts of one command, each in a child of a process that has imported everything once: tenths of a second where imports take eight.

Run as a program it reads one attempt a line from stdin, {"arguments", "place", "calls", "seconds", "output", "signal", "before", "after"},
and answers each with its return code: -9 for a child that was killed, at the given call of `place` (see kill_at) or after `seconds` (or
sent `signal` then). "before" and "after" name functions, "module:name", that are called with the request in the child, before and behind
the command. No OpenMP region may run before the fork: a child inherits the threads' bookkeeping, not the threads.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

IMPORTED = (
    "adept_fast.pipeline.run", "adept_fast.tuning.tune_checkpoint", "adept_fast.cli.main", "transformers.models.qwen2.modeling_qwen2",
    "accelerate", "datasets", "jinja2", "yaml", "matplotlib.backends.backend_svg", "matplotlib.backends.backend_agg",
)  # fmt: skip


class Attempts:
    """Forks attempts of `adept-fast ARGUMENTS`; a context manager."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}

    def __enter__(self) -> Attempts:
        arguments = [sys.executable, __file__]
        self.process = subprocess.Popen(arguments, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def run(
        self, arguments: Sequence[str], output: Path, place: str = "", calls: int = 0, seconds: float = 0.0, **more: object
    ) -> tuple[int, str]:
        """Return code and what was said, stderr included unless `errors` names a file for it. more: folder to work in, cpu: seconds of it
        that are allowed, memory: bytes that the child may take more than it has, signal: sent in place of SIGKILL, before, after:
        functions."""
        request = {"arguments": list(arguments), "place": place, "calls": calls, "seconds": seconds, "output": str(output), **more}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process that forks attempts has ended"
        return int(answer), output.read_text()


def found(place: str) -> tuple[object, str]:
    """Who holds "module:name", and the last part of the name."""
    module, name = place.split(":")
    holder = importlib.import_module(module)
    *parents, name = name.split(".")
    for parent in parents:
        holder = getattr(holder, parent)
    return holder, name


def kill_at(place: str, calls: int) -> None:
    """SIGKILL this process at the call of `place` after `calls` of them; "outer>inner" counts the calls of inner within outer, and a "*"
    behind the name lets it be called for each element of its first argument alone."""
    outer, _, inner = place.rpartition(">")
    holder, name = found(inner.rstrip("*"))
    original, left, inside = getattr(holder, name), [calls], [not outer]

    def counted(*args, **kwargs):
        for each in [(type(args[0])([one]), *args[1:]) for one in getattr(args[0], "updates", args[0])] if inner.endswith("*") else [args]:
            left[0] -= inside[0]
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*each, **kwargs)
        return result

    setattr(holder, name, counted)
    if outer:
        around, within = found(outer)
        whole = getattr(around, within)

        def entered(*args, **kwargs):
            inside[0] = True
            try:
                return whole(*args, **kwargs)
            finally:
                inside[0] = False

        setattr(around, within, entered)


def attempt(request: dict) -> int:
    """In the child: everything it says goes to the output file."""
    from adept_fast.cli.main import main

    opened = [os.open(request[key], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for key in ("output", "errors") if key in request]
    os.dup2(opened[0], 1)
    os.dup2(opened[-1], 2)
    if "folder" in request:
        os.chdir(request["folder"])
    if "cpu" in request:
        resource.setrlimit(resource.RLIMIT_CPU, (request["cpu"], request["cpu"]))
    if "memory" in request:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + request["memory"],) * 2)
    if request["place"]:
        kill_at(request["place"], request["calls"])
    _call(request, "before")
    code = main(request["arguments"])
    _call(request, "after")
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


def _call(request: dict, when: str) -> None:
    if when in request:
        holder, name = found(request[when])
        getattr(holder, name)(request)


def serve() -> None:
    import torch

    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # children collect what they made, and leave the pages of what they inherit shared
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = attempt(request)
            finally:
                os._exit(code)
        if request["seconds"]:
            ended = os.pidfd_open(child)
            if not select.select([ended], [], [], request["seconds"])[0]:
                os.kill(child, request.get("signal", signal.SIGKILL))
            os.close(ended)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    gc.unfreeze()


if __name__ == "__main__":
    serve()

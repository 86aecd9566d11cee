"""The registry of operations and their backends, and the choice of the backend that runs.

The argument `backend`, if an operation has one, overrides the choice. Otherwise the environment variable ADEPT_FAST_BACKEND does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from adept_fast.errors import InputError

# operation -> backend -> module, in order of preference
IMPLEMENTED: dict[str, dict[str, str]] = {
    "adamw": {
        "cuda": "adept_fast.ops.adamw.cuda",
        "triton": "adept_fast.kernels.adamw",
        "cpu": "adept_fast.ops.adamw.cpu",
        "torch": "adept_fast.ops.adamw.reference",
    },
    "gradient_sums": {
        "triton": "adept_fast.kernels.gradient_sums",
        "cpu": "adept_fast.ops.gradient_sums.cpu",
        "torch": "adept_fast.ops.gradient_sums.reference",
    },
    "linear_cross_entropy": {
        "triton": "adept_fast.kernels.linear_cross_entropy",
        "cpu": "adept_fast.ops.linear_cross_entropy.cpu",
        "torch": "adept_fast.ops.linear_cross_entropy.reference",
    },
    "decoder_layers": {"cpu": "adept_fast._C", "torch": "the model's own modules"},
}
OVERRIDE = "ADEPT_FAST_BACKEND"
OLDEST = (8, 0)  # compute capability that the kernels need


@dataclass(frozen=True)
class Status:
    """Whether a backend can be used.

    reason: the version found, or why the backend cannot be used.
    remedy: how to make it usable; empty if it is found.
    """

    found: bool
    reason: str
    remedy: str = ""


@cache
def _cuda() -> Status:
    try:
        native = import_module("adept_fast._CUDA")
    except ModuleNotFoundError:
        return Status(
            False,
            "the CUDA extension was not built: nvcc was not found, or it failed",
            "install the CUDA toolkit and reinstall from source with ADEPT_FAST_BUILD_CUDA=1, which shows the error",
        )
    except ImportError as error:
        return Status(False, f"the CUDA extension does not load: {error}", "reinstall from source on this machine")
    versions = native.versions()
    runtime, driver = (f"{number // 1000}.{number % 1000 // 10}" for number in (versions["runtime"], versions["driver"]))
    if versions["driver"] == 0:
        return Status(False, "there is no NVIDIA driver", f"install one for CUDA {runtime} or newer")
    # Older drivers of the same major version work, except that launch parameters above 4 KB (csrc/adamw.cu) need 12.1.
    if versions["driver"] < max(versions["runtime"] // 1000 * 1000, min(versions["runtime"], 12010)):
        return Status(
            False,
            f"the driver supports CUDA {driver}, the extension was built with {runtime}",
            f"update the driver, or reinstall from source with the toolkit of CUDA {driver}",
        )
    try:
        devices = native.devices()
    except RuntimeError as error:
        return Status(False, str(error), "check that nvidia-smi works, and the version of the driver")
    if not devices:
        return Status(False, "no CUDA device is visible", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    oldest = min(tuple(device["capability"]) for device in devices)
    if oldest < OLDEST:
        return _too_old(oldest)
    return Status(True, ", ".join(native.architectures()))


@cache
def _triton() -> Status:
    if not _interpreted() and not torch.cuda.is_available():
        remedy = "check nvidia-smi, and that torch is a CUDA build; to test on a CPU, set TRITON_INTERPRET=1"
        return Status(False, "torch finds no GPU", remedy)
    if find_spec("triton") is None:
        return Status(False, "triton is not installed", "pip install triton")
    if _interpreted():
        return Status(True, "interpreted on the CPU, for tests: TRITON_INTERPRET is set")
    try:
        version = import_module("triton").__version__
    except ImportError as error:
        return Status(False, f"triton does not import: {error}", "install the triton that your torch release names")
    if torch.version.cuda:
        oldest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
        if oldest < OLDEST:
            return _too_old(oldest)
    return Status(True, version)


@cache
def _cpu() -> Status:
    try:
        native = import_module("adept_fast._C")
    except ModuleNotFoundError:
        return Status(False, "the C++ extension was not built", "install a C++17 compiler and reinstall from source")
    except ImportError as error:
        return Status(False, f"the C++ extension does not load: {error}", "reinstall from source on this machine")
    features = native.features()
    return Status(True, ", ".join([features["compiler"], *features["instruction_sets"]]))


def _torch() -> Status:
    return Status(True, torch.__version__)


_FIND: dict[str, Callable[[], Status]] = {"cuda": _cuda, "triton": _triton, "cpu": _cpu, "torch": _torch}


def _too_old(capability: tuple[int, int]) -> Status:
    found, needed = (".".join(map(str, numbers)) for numbers in (capability, OLDEST))
    return Status(False, f"a device has compute capability {found}; {needed} is needed", "hide it with CUDA_VISIBLE_DEVICES")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _fits(name: str, device: torch.device) -> bool:
    if name == "cuda":
        return device.type == "cuda" and torch.version.hip is None
    if name == "triton":
        return device.type == ("cpu" if _interpreted() else "cuda")
    return name == "torch" or device.type == "cpu"


def status() -> dict[str, Status]:
    """Return the status of "cuda", "triton", "cpu" and "torch"."""
    return {name: find() for name, find in _FIND.items()}


def implementation(operation: str, backend: str) -> ModuleType:
    """Import the module that implements `operation` for a backend that `resolve` returned."""
    return import_module(IMPLEMENTED[operation][backend])


def has_native_layers() -> bool:
    """Whether adept_fast._C may run decoder layers on the CPU.

    ADEPT_FAST_BACKEND may name a backend without this operation. That is no error here, as the caller did not ask for the operation.
    """
    forced = os.environ.get(OVERRIDE)
    return (not forced or forced in IMPLEMENTED["decoder_layers"]) and resolve("decoder_layers", torch.device("cpu")) == "cpu"


def resolve(operation: str, device: torch.device, forced: str | None = None) -> str:
    """Choose the backend of an operation.

    operation: a key of IMPLEMENTED.
    device: of the tensors.
    forced: a backend; None: that of ADEPT_FAST_BACKEND, else the first that is found and supports the device.

    Raises InputError for an unknown backend. Raises RuntimeError, with the remedy, for a forced backend that is missing, lacks the
    operation or does not support the device.
    """
    implemented = IMPLEMENTED[operation]
    name = forced or os.environ.get(OVERRIDE)
    if not name:
        return next(candidate for candidate in implemented if _fits(candidate, device) and _FIND[candidate]().found)
    asked = f"backend={name!r}" if forced else f"{OVERRIDE}={name}"
    if not isinstance(name, str) or name not in _FIND:
        raise InputError(f"{asked}: no such backend; choose one of {', '.join(_FIND)}")
    if name not in implemented:
        raise RuntimeError(f"{asked}: {operation} is not implemented there; choose one of {', '.join(implemented)}, or none")
    found = _FIND[name]()
    if not found.found:
        raise RuntimeError(f"{asked}: {found.reason}; {found.remedy}")
    if not _fits(name, device):
        others = ", ".join(other for other in implemented if _fits(other, device))
        raise RuntimeError(f"{asked}: {name} does not run on {device.type} tensors; choose one of {others}, or none")
    return name

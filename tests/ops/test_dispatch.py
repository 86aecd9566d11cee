"""Which backend runs: what is found, what fits, and that a forced one never gives way silently."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adept_fast.cli import info
from adept_fast.errors import InputError
from adept_fast.ops import dispatch

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)  # a name only: nothing is allocated on it
H200 = {"name": "NVIDIA H200", "capability": (9, 0)}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ADEPT_FAST_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _forget()
    yield
    _forget()


def _forget() -> None:
    for find in (dispatch._cuda, dispatch._triton, dispatch._cpu):
        find.cache_clear()


def native(driver: int, devices: list[dict[str, Any]] | Exception, runtime: int = 13000) -> SimpleNamespace:
    def listed() -> list[dict[str, Any]]:
        if isinstance(devices, Exception):
            raise devices
        return devices

    versions = {"runtime": runtime, "driver": driver}
    return SimpleNamespace(versions=lambda: versions, devices=listed, architectures=lambda: ["sm_90", "compute_90"])


def test_status_names_every_backend_with_reason_and_remedy() -> None:
    found = dispatch.status()
    assert list(found) == ["cuda", "triton", "cpu", "torch"]
    assert found["torch"] == dispatch.Status(True, torch.__version__)
    for status in found.values():
        assert status.reason and "\n" not in status.reason
        assert bool(status.remedy) != status.found


@pytest.mark.parametrize(
    ("module", "reason", "remedy"),
    [
        (None, "was not built", "ADEPT_FAST_BUILD_CUDA=1"),
        (native(0, []), "no NVIDIA driver", "CUDA 13.0 or newer"),
        (native(12040, []), "supports CUDA 12.4, the extension was built with 13.0", "update the driver"),
        (native(12000, [H200], 12080), "supports CUDA 12.0, the extension was built with 12.8", "update the driver"),
        (native(13010, []), "no CUDA device is visible", "CUDA_VISIBLE_DEVICES"),
        (native(13010, [H200, {"name": "T4", "capability": (7, 5)}]), "compute capability 7.5; 8.0 is needed", "CUDA_VISIBLE_DEVICES"),
        (native(13010, RuntimeError("cudaGetDeviceCount: system not yet initialized")), "system not yet initialized", "nvidia-smi"),
    ],
)
def test_what_keeps_cuda_from_use(monkeypatch: pytest.MonkeyPatch, module: object, reason: str, remedy: str) -> None:
    monkeypatch.setitem(sys.modules, "adept_fast._CUDA", module)
    status = dispatch.status()["cuda"]
    assert not status.found and reason in status.reason and remedy in status.remedy


def test_cuda_is_found_with_a_driver_and_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adept_fast._CUDA", native(13010, [H200]))
    monkeypatch.setitem(dispatch.IMPLEMENTED, "adamw", dict.fromkeys(("cuda", "cpu", "torch"), ""))
    monkeypatch.setitem(sys.modules, "adept_fast._C", None)
    assert dispatch.status()["cuda"] == dispatch.Status(True, "sm_90, compute_90")
    assert dispatch.resolve("adamw", CUDA) == "cuda"
    assert dispatch.resolve("adamw", CPU) == "torch"


def test_status_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adept_fast._CUDA", native(13010, [H200]))
    dispatch.status()
    monkeypatch.setitem(sys.modules, "adept_fast._CUDA", None)
    assert dispatch.status()["cuda"].found


def test_native_cpu_code_is_preferred_on_the_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.IMPLEMENTED, "adamw", dict.fromkeys(("cpu", "torch"), ""))
    features = {"compiler": "gcc 14", "instruction_sets": ["avx2", "generic"]}
    monkeypatch.setitem(sys.modules, "adept_fast._C", SimpleNamespace(features=lambda: features))
    assert dispatch.status()["cpu"] == dispatch.Status(True, "gcc 14, avx2, generic")
    assert dispatch.resolve("adamw", CPU) == "cpu"
    assert dispatch.resolve("adamw", CUDA) == "torch"


@pytest.mark.parametrize("operation", sorted(dispatch.IMPLEMENTED))
@pytest.mark.parametrize("device", [CPU, torch.device("meta"), torch.device("mps")], ids=str)
def test_torch_runs_everything_everywhere(operation: str, device: torch.device) -> None:
    assert "torch" in dispatch.IMPLEMENTED[operation]
    assert dispatch.resolve(operation, device, "torch") == "torch"
    assert dispatch.resolve(operation, torch.device("mps")) == "torch"


def test_interpreted_triton_takes_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setitem(dispatch.IMPLEMENTED, "gradient_sums", dict.fromkeys(("triton", "torch"), ""))
    assert dispatch.resolve("gradient_sums", CPU) == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _forget()
    assert dispatch.resolve("gradient_sums", CPU) == "triton"


@pytest.mark.parametrize("operation", sorted(dispatch.IMPLEMENTED))
def test_unknown_name_is_an_input_error_naming_the_valid_ones(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    with pytest.raises(InputError, match=r"backend='abacus'.*cuda, triton, cpu, torch"):
        dispatch.resolve(operation, CPU, "abacus")
    monkeypatch.setenv("ADEPT_FAST_BACKEND", "abacus")
    with pytest.raises(InputError, match=r"ADEPT_FAST_BACKEND=abacus.*cuda, triton, cpu, torch"):
        dispatch.resolve(operation, CPU)


def test_argument_wins_over_environment_and_empty_means_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADEPT_FAST_BACKEND", "cuda")
    assert dispatch.resolve("adamw", CPU, "torch") == "torch"
    monkeypatch.setenv("ADEPT_FAST_BACKEND", "")
    assert dispatch.resolve("gradient_sums", CPU) != "cuda"


def test_forced_backend_that_lacks_the_operation_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.IMPLEMENTED, "gradient_sums", dict.fromkeys(("triton", "torch"), ""))
    monkeypatch.setenv("ADEPT_FAST_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="ADEPT_FAST_BACKEND=cuda: gradient_sums is not implemented there; choose one of triton, torch"):
        dispatch.resolve("gradient_sums", CUDA)


def test_forced_backend_that_is_missing_raises_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="backend='triton': triton is not installed; pip install triton"):
        dispatch.resolve("gradient_sums", CUDA, "triton")


def test_forced_backend_that_does_not_fit_the_device_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adept_fast._CUDA", native(13010, [H200]))
    monkeypatch.setitem(dispatch.IMPLEMENTED, "adamw", dict.fromkeys(("cuda", "torch"), ""))
    with pytest.raises(RuntimeError, match="cuda does not run on cpu tensors; choose one of torch"):
        dispatch.resolve("adamw", CPU, "cuda")


def test_info_names_versions_backends_and_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adept_fast._CUDA", None)
    text = info.run("info", [])
    missing = "not found: the CUDA extension was not built"
    for needed in ("adept_fast", torch.__version__, "torch threads", missing, "remedy: ", "gradient_sums"):
        assert needed in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_info_prints_the_registry() -> None:
    text = info.run("info", [])
    assert all(module in text for modules in dispatch.IMPLEMENTED.values() for module in modules.values())


def test_every_module_of_the_registry_implements_its_operation() -> None:
    pytest.importorskip("triton"), pytest.importorskip("adept_fast._C"), pytest.importorskip("adept_fast._CUDA")
    functions = {"adamw": "adamw", "gradient_sums": "gradient_sums", "linear_cross_entropy": "linear_cross_entropy"}
    for operation, name in functions.items():
        for backend in dispatch.IMPLEMENTED[operation]:
            plain = "adamw_update_" if (operation, backend) == ("adamw", "torch") else name
            assert callable(getattr(dispatch.implementation(operation, backend), plain)), (operation, backend)


@pytest.mark.parametrize(("forced", "native"), [("", True), ("cpu", True), ("torch", False), ("triton", False)])
def test_decoder_layers_are_native_unless_another_backend_is_named(monkeypatch: pytest.MonkeyPatch, forced: str, native: bool) -> None:
    pytest.importorskip("adept_fast._C")
    monkeypatch.setenv("ADEPT_FAST_BACKEND", forced)
    assert dispatch.has_native_layers() == native


def test_native_modules_tell_what_they_are() -> None:
    cpu = pytest.importorskip("adept_fast._C")
    features = cpu.features()
    assert features["compiler"] and features["instruction_sets"][-1] == "generic" and "omp" in features["openmp_runtime"]
    cuda = pytest.importorskip("adept_fast._CUDA")
    assert cuda.versions()["runtime"] >= 11000
    assert any(name.startswith("sm_") for name in cuda.architectures()) and cuda.architectures()[-1].startswith("compute_")
    if cuda.versions()["driver"] == 0:
        assert cuda.devices() == []


@pytest.mark.gpu
def test_gpu_devices_agree_with_torch() -> None:
    cuda = pytest.importorskip("adept_fast._CUDA")
    assert dispatch.status()["cuda"].found
    for index, device in enumerate(cuda.devices()):
        properties = torch.cuda.get_device_properties(index)
        assert device["name"] == properties.name
        assert device["capability"] == (properties.major, properties.minor)
        assert device["multiprocessors"] == properties.multi_processor_count
        assert device["memory_bytes"] == properties.total_memory

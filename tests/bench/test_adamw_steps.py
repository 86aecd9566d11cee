"""The benchmark of AdamW times what it has compared with fp64, counts the bytes that there are, and goes on without what fails."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from typing import Any

import pytest
import torch

from adept_fast.optim import AdamW
from bench import adamw, adamw_ways
from bench.__main__ import failures, run
from bench.adamw_others import OTHERS, Other
from bench.adamw_setups import HYPER, SETUPS, blocks, llama_1b, parameters, shapes_of
from bench.adamw_truth import distances
from bench.measure import tensor_bytes

CPU = torch.device("cpu")
TINY = ["--scale=64", "--rounds=1"]


@pytest.fixture(autouse=True)
def no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other packages take long to load, and are not what is tested."""
    monkeypatch.setattr(adamw_ways, "OTHERS", {})


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Leave out what else is timed."""
    whole = adamw.ways_of

    def some(*given: Any) -> tuple[dict[str, adamw_ways.Way], dict[str, str]]:
        found, left_out = whole(*given)
        return {name: way for name, way in found.items() if name in names}, left_out

    monkeypatch.setattr(adamw, "ways_of", some)


@pytest.mark.parametrize("name", SETUPS)
def test_a_step_moves_the_bytes_of_its_floor(name: str) -> None:
    setup = SETUPS[name]
    params = parameters(llama_1b(4)[-4:-2], setup.dtype, CPU)
    optimizer = AdamW(params, **HYPER, **setup.options)
    optimizer.step()
    stored = tensor_bytes(optimizer.state) / sum(p.numel() for p in params)
    assert 3 * setup.dtype.itemsize + 2 * stored == pytest.approx(setup.floor, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp32", "bf16 fp32-moments remainder", "bf16 one tensor"])
def test_a_set_up(name: str) -> None:
    result = adamw.main([*TINY, f"--setups={name}"])
    found = json.loads(json.dumps(result, allow_nan=False))[name]
    ways, _ = adamw_ways.ways_of(name, 465, CPU, None)
    assert not failures(result)
    assert found["elements"] == sum(torch.Size(shape).numel() for shape in shapes_of(name, 64))
    assert {"ours", "units", "rows", "columns", "clipped", "misaligned"} <= ways.keys() < found.keys()
    for key, way in ways.items():
        entry = found[key]
        assert entry["ms"] > 0 and entry["gb_s"] > 0 and entry["percent_of_copy"] > 0 and entry["python_calls"] > 20
        assert ("held_bytes" in entry) == (not way.shares)
        assert ("distance" in entry) == (way.compared is not None)
    assert found["ratios"]["units/ours"] > 0 and found["left_out"] == {}


def test_what_fails_is_named_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    near = adamw_ways.Way(*2 * [changed(torch.optim.AdamW, lr=1.05e-3)])
    broken = Other("torch", "torch.optim", "NoSuchAdamW", ("fp32",))
    absent = Other("no_such_package", "no_such_package", "AdamW", ("fp32",))
    monkeypatch.setattr(adamw_ways, "OTHERS", {"broken": broken, "absent": absent, "elsewhere": broken._replace(devices=("cuda",))})
    only(monkeypatch, "ours", "broken", "near")
    whole = adamw.ways_of
    monkeypatch.setattr(adamw, "ways_of", lambda *given: (whole(*given)[0] | {"near": near}, whole(*given)[1]))
    monkeypatch.setattr("bench.__main__.machine_facts", dict)  # asks git
    assert run("adamw", [*TINY, "--setups=fp32"], save=False) == 1
    said = capsys.readouterr()
    found = json.loads(said.out)["result"]["fp32"]
    assert found["ours"]["ms"] > 0 and "NoSuchAdamW" in found["broken"]["failed"]
    assert found["near"]["failed"].startswith("AssertionError: 0.0") and "of the way moved from fp64" in found["near"]["failed"]
    assert found["left_out"] == {"absent": "not installed: pip install no_such_package", "elsewhere": "works on cuda only"}
    assert said.err.startswith("fp32, broken: AttributeError") and "fp32, near: AssertionError" in said.err


def test_a_set_up_that_dies_or_hangs_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {"fp32": '{"bench": "adamw", "result": {"fp32": {"ours": {"ms": 1.0}}}}', "bf16": "Fatal error", "bf16 kahan": None}

    def start(command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        assert "--rounds=1" in command and not any("seconds" in part for part in command)
        name = next(part.removeprefix("--setups=") for part in command if part.startswith("--setups="))
        if ends[name] is None:
            raise subprocess.TimeoutExpired(command, given["timeout"])
        if name == "bf16":
            return subprocess.CompletedProcess(command, -11, stdout="", stderr=f"torch\n{ends[name]}\n")
        return subprocess.CompletedProcess(command, 0, stdout=f"another package says\n{ends[name]}\nand goodbye\n", stderr="")

    monkeypatch.setattr(subprocess, "run", start)
    result = adamw.main([*TINY, "--setups=" + ",".join(ends), "--seconds=0"])
    assert result["fp32"] == {"ours": {"ms": 1.0}}
    assert failures(result) == ["bf16: Fatal error", "bf16 kahan: not done after 0 s"]


def changed(cls: type[torch.optim.Optimizer], **changes: Any) -> Any:
    return lambda params: cls(params, **(HYPER | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_comparison_finds_other_formulas(dtype: torch.dtype) -> None:
    compare = partial(distances, dtype=dtype, device=CPU, margin="other", moments=None)
    assert compare(changed(torch.optim.AdamW))["distance"] > 0
    wrong = [{"lr": 1.05e-3}, {"weight_decay": 2.0}, {"betas": (0.9, 0.9)}, {"betas": (0.85, 0.99)}, {"eps": 0.1}]
    for changes in wrong:
        with pytest.raises(AssertionError, match="of the way moved from fp64"):
            compare(changed(torch.optim.AdamW, **changes))
    with pytest.raises(AssertionError):
        compare(changed(AdamW), dim=1)  # without the rates of columns


def test_units_cover_all_rows() -> None:
    shapes = llama_1b(64)
    cut = blocks(shapes, 465)
    assert [sum(rows) for rows in cut] == [shape[0] for shape in shapes] and sum(map(len, cut)) == 465


def test_other_packages_are_timed_on_set_ups_that_exist() -> None:
    assert {name for other in OTHERS.values() for name in other.setups} <= SETUPS.keys()

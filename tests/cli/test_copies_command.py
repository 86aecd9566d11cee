"""adept-fast copies: each action writes what its function writes, says so in one line, and refuses in one line."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import adept_fast
from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.cli.copies import FUNCTIONS, KINDS
from adept_fast.cli.main import main
from tests.support import tiny_models

GAIN = "model.layers.1.input_layernorm.weight"  # of the copy of layer 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base; a and b with copies of layers 0 and 2, their projections no longer silent; another base."""
    folder = tmp_path_factory.mktemp("command")
    for seed, name in enumerate(("base", "other")):
        tiny_models.checkpoint(folder / name, seed=seed)
    adept_fast.expand_checkpoint(folder / "base", folder / "a", [0, 2], verify=False)
    shutil.copytree(folder / "a", folder / "b")
    for name, value in {"a": 0.5, "b": 0.25}.items():
        changed = tensors(folder / name)
        changed["model.layers.1.self_attn.o_proj.weight"].fill_(value)
        changed[GAIN].fill_(value)
        save_file(changed, folder / name / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(made)
    return tmp_path


def tensors(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def equal(one: Path, other: Path) -> bool:
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def does(capsys: pytest.CaptureFixture, action: str, *given: str) -> str:
    capsys.readouterr()
    assert main(["copies", action, *given]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1 and not said.err, said
    return said.out


def fails(capsys: pytest.CaptureFixture, action: str, *given: str, code: int = 2) -> str:
    capsys.readouterr()
    assert main(["copies", action, *given]) == code
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1 and said.err.startswith("adept-fast: "), said
    return said.err


@pytest.mark.parametrize("action", KINDS)
def test_keys_are_the_functions_arguments(action: str) -> None:
    arguments = inspect.signature(getattr(adept_fast, FUNCTIONS[action])).parameters
    keys = {entry.name: entry.default for entry in fields(KINDS[action])}
    assert keys.keys() - {"trust_remote_code"} == arguments.keys() - {"loading", "trust_remote_code"}
    for name in keys.keys() & arguments.keys():
        required = arguments[name].default is inspect.Parameter.empty
        assert keys[name] is MISSING if required else keys[name] == arguments[name].default, name


@pytest.mark.slow
def test_remove(made: Path, here: Path, capsys: pytest.CaptureFixture) -> None:
    said = does(capsys, "remove", "source=a", f"target={here}/plain")
    assert said == f"{here}/plain: the original without copies; proven: it is the original bit for bit\n"
    assert equal(here / "plain", made / "base")
    said = does(capsys, "remove", "source=a", f"target={here}/one", "copies=[1]")
    assert said == f"{here}/one: copies at layers 3; proven: its base is in it bit for bit\n"
    assert "; not compared" in does(capsys, "remove", "source=a", f"target={here}/unproven", "verify=false")
    assert "among the layers [1, 4]" in fails(capsys, "remove", "source=a", f"target={here}/no", "copies=2")


def test_extract_and_apply(made: Path, here: Path, capsys: pytest.CaptureFixture) -> None:
    said = does(capsys, "extract", "source=a", f"target={here}/2026")
    assert said == f"{here}/2026: copies at layers 1, 4, alone; of base {made}/base, which apply checks and proves\n"
    assert "bit for bit" in does(capsys, "apply", "base=base", f"delta={here}/2026", f"target={here}/again")
    assert equal(here / "again", made / "a")
    assert "other: not the base of" in fails(capsys, "apply", "base=other", f"delta={here}/2026", f"target={here}/no")
    assert "no adept_copies.safetensors" in fails(capsys, "apply", "base=base", "delta=nowhere", f"target={here}/no")
    assert not (here / "no").exists()


@pytest.mark.slow
def test_merge(made: Path, here: Path, capsys: pytest.CaptureFixture) -> None:
    said = does(capsys, "merge", "a=a", "b=b", f"target={here}/average", "weights=[0.2, 0.8]")
    assert said.endswith("copies at layers 1, 4; proven: the base is in it bit for bit, its logits are finite\n")
    assert tensors(here / "average")[GAIN].eq(0.3).all()
    assert "layers 1, 2, 5, 6;" in does(capsys, "merge", "a=a", "b=b", f"target={here}/stack", "how=stack")
    assert "weights[1] must be a number" in fails(capsys, "merge", "a=a", "b=b", f"target={here}/no", "weights=[1, x]")


def test_dial(made: Path, here: Path, capsys: pytest.CaptureFixture) -> None:
    assert "bit for bit" in does(capsys, "dial", "source=a", f"target={here}/0", "alpha=0")
    assert does(capsys, "dial", "source=a", f"target={here}/half", "alpha=5e-1")
    weight = "model.layers.1.self_attn.o_proj.weight"
    assert tensors(here / "0")[weight].eq(0).all() and tensors(here / "half")[weight].eq(0.25).all()
    assert AdeptConfig.load(here / "half").selection["alpha"] == 0.5
    assert "alpha is missing: give it as alpha=..." in fails(capsys, "dial", "source=a", f"target={here}/no")
    assert "alpha must be a number" in fails(capsys, "dial", "source=a", f"target={here}/no", "alpha=-1")


def test_bad_usage(made: Path, here: Path, capsys: pytest.CaptureFixture) -> None:
    assert "unknown key sorce: did you mean source?" in fails(capsys, "remove", "sorce=a", f"target={here}/no")
    assert "expected key=value" in fails(capsys, "remove", "a")
    assert "nowhere: no such model folder" in fails(capsys, "extract", "source=nowhere", f"target={here}/no")
    assert main(["copies"]) == 2 and main(["copies", "erase"]) == 2
    with pytest.raises(ValueError, match="is missing"):
        main(["copies", "remove", "--debug"])
    before = (made / "b" / "model.safetensors").read_bytes()
    for action, given in {"extract": ["source=a"], "apply": ["base=base", "delta=a"], "merge": ["a=a", "b=a"]}.items():
        assert "target: b exists already: remove it or choose another target" in fails(capsys, action, *given, "target=b")
    assert (made / "b" / "model.safetensors").read_bytes() == before


def test_changed_originals_are_refused(made: Path, here: Path, capsys: pytest.CaptureFixture) -> None:
    folder = shutil.copytree(made / "a", here / "touched")
    changed = tensors(folder)
    changed["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    assert "bit for bit" in fails(capsys, "remove", f"source={folder}", f"target={here}/no")
    assert not (here / "no").exists()

"""Model folders that are missing, truncated or corrupt get one line that says so."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.digest import fingerprint
from adept_fast.errors import InputError
from tests.support import tiny_models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.checkpoint(tmp_path / "model")


def test_whole_folder_passes(folder: Path) -> None:
    assert checkpoint.resolve(str(folder)).path == folder
    assert checkpoint.load_model(folder).config.num_hidden_layers == 4


def test_missing_folder() -> None:
    with pytest.raises(InputError, match="no such model folder"):
        checkpoint.resolve("./nowhere")


def test_the_folder_of_a_run_names_its_model(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "tuned")
    with pytest.raises(InputError, match="run: the output_dir of a run: its model is .*tuned"):
        checkpoint.load_model(checkpoint.resolve(str(run)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "missing"),
        (lambda folder: _truncate(folder / "model.safetensors", 0.5), "corrupt or truncated"),
        (lambda folder: _truncate(folder / "model.safetensors", 0), "corrupt or truncated"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 4096), "corrupt or truncated"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "is a pickle and is not loaded"),
        (lambda folder: _config(folder, quantization_config={"quant_method": "gptq"}), "quantised"),
        (lambda folder: _config(folder, hidden_size=64), "another shape"),
        (lambda folder: _config(folder, num_hidden_layers=5), "missing"),
        (lambda folder: _config(folder, rms_norm_eps=float("nan")), "config.json: holds a NaN"),
        (lambda folder: _config(folder, hidden_size=None), "hidden_size.*correct its config.json"),
        (lambda folder: _config(folder, model_type="nonesuch"), "cannot be loaded"),
        (lambda folder: os.mkfifo(folder / "generation_config.json.new"), "generation_config.json.new: a pipe"),
        (lambda folder: (folder / "chat_template.jinja").symlink_to("gone"), "chat_template.jinja: no such file"),
    ],
)
def test_damage_is_named(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.load_model(checkpoint.resolve(str(folder)))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_fingerprint_follows_the_content(folder: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(folder, tmp_path / "twin")
    assert fingerprint(twin) == fingerprint(folder)
    tiny_models.model(seed=7).save_pretrained(twin)
    assert fingerprint(twin) != fingerprint(folder)


def _truncate(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def _config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

"""What push uploads, what it leaves out, and the one line for each way in which it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from adept_fast.cli.main import main
from adept_fast.expansion.expand_checkpoint import expand_checkpoint
from tests.support import tiny_models

REQUEST = httpx.Request("POST", "https://huggingface.co/api/repos/create")


class Hub:
    """Stands for HfApi. error: raised by the upload."""

    endpoint = "https://huggingface.co"

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.made, self.files = error, [], {}

    def create_repo(self, repo: str, **given: Any) -> None:
        self.made.append((repo, given))

    def create_branch(self, repo: str, **given: Any) -> None:
        self.made.append((repo, given))

    def create_commit(self, repo: str, operations: list[Any], **given: Any) -> SimpleNamespace:
        if self.error:
            raise self.error
        self.made.append((repo, given))
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo}/commit/1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    expand_checkpoint(tiny_models.checkpoint(folder / "base"), folder / "tuned", [1], verify=False)
    (folder / "tuned" / "trainer_log.jsonl").write_text("{}")
    (folder / "tuned" / "checkpoint-3").mkdir()
    (folder / "tuned" / ".secret.json").write_text("{}")
    return folder / "tuned"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return made


def test_the_checkpoint_is_uploaded_and_nothing_else(model: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", f"source={model}", "repo=jo/adapted", "private=true", "revision=law"]) == 0
    said = capsys.readouterr().out
    assert "not uploaded: .secret.json, checkpoint-3, trainer_log.jsonl" in said
    assert said.splitlines()[-1].startswith("https://huggingface.co/jo/adapted/commit/1: 7 files, ")
    assert hub.made[:2] == [("jo/adapted", {"private": True, "exist_ok": True}), ("jo/adapted", {"branch": "law", "exist_ok": True})]
    assert hub.made[2][1]["revision"] == "law"
    shown = [line.split("MB  ")[1].split()[0] for line in said.splitlines() if "MB  " in line]
    assert [*hub.files] == shown and {"README.md", "config.json", "adept_config.json", "model.safetensors"} <= {*shown}
    assert hub.files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    for name in ("config.json", "adept_config.json"):
        assert str(model.parent).encode() not in hub.files[name] and str(model.parent) in (model / name).read_text()
    assert json.loads(hub.files["adept_config.json"])["source"]["name_or_path"] == "base"


def test_a_dry_run_asks_nobody(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["push", f"source={model}", "repo=jo/adapted", "dry_run=true"]) == 0
    assert "would be uploaded (dry_run)" in capsys.readouterr().out and not hub.made


@pytest.mark.parametrize(
    ("offline", "token", "error", "code", "line"),
    [
        (True, "t", None, 2, "HF_HUB_OFFLINE is set"),
        (False, None, None, 2, "no token of the hub is set: hf auth login, or set HF_TOKEN"),
        (False, "t", httpx.ConnectError("refused", request=REQUEST), 1, "https://huggingface.co cannot be reached (refused)"),
        (False, "t", HfHubHTTPError("403 Forbidden", response=httpx.Response(403, request=REQUEST)), 2, "hf auth login"),
        (False, "t", HfHubHTTPError("502 Bad Gateway", response=httpx.Response(502, request=REQUEST)), 1, "the same command goes on"),
        (False, "t", ValueError("Invalid metadata in README.md.\nbase_model"), 2, "README.md: Invalid metadata in README.md: correct it"),
    ],
)
def test_what_stops_an_upload_is_one_line(
    model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    offline: bool, token: str | None, error: Exception | None, code: int, line: str,
) -> None:  # fmt: skip
    hub.error = error
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    assert main(["push", f"source={model}", "repo=jo/adapted"]) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and line in said


def test_what_is_no_whole_model_with_a_card_is_refused(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_models.checkpoint(tmp_path / "model")
    assert main(["push", f"source={tmp_path / 'model'}", "repo=jo/adapted"]) == 2
    assert "README.md: missing: write a model card" in capsys.readouterr().err
    (tmp_path / "model" / "README.md").write_text("A card")
    assert main(["push", f"source={tmp_path / 'model'}", "repo=adapted"]) == 2 and "give USER/NAME" in capsys.readouterr().err
    (tmp_path / "model" / "model.safetensors").unlink()
    assert main(["push", f"source={tmp_path / 'model'}", "repo=jo/adapted"]) == 2 and not hub.made

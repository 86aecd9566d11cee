"""Upload a checkpoint to the hub of Hugging Face: its own files and nothing else, with no path of this machine in its records."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adept_fast.checkpoints.adept_config import FILE as RECORD
from adept_fast.checkpoints.checkpoint import ModelFolder, carried
from adept_fast.checkpoints.model_card import FILE as CARD
from adept_fast.checkpoints.safetensors_index import INDEX
from adept_fast.errors import InputError
from adept_fast.runtime.input_files import read_json
from adept_fast.runtime.strict_json import dumps

RECORDS = ("config.json", RECORD, "baseline.json")  # name the model that they were made from
NOT_UPLOADED = (".log", ".jsonl", ".yaml", ".html", ".png")  # of a run


@dataclass(frozen=True)
class Upload:
    """A file to upload. content: its bytes, where they are not those on disk."""

    name: str
    path: Path
    content: bytes | None = None

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.content is None else len(self.content)


def planned_uploads(model: ModelFolder) -> list[Upload]:
    """Return the files of a whole checkpoint, weights last. Raises InputError where it lacks a model card, or contradicts itself."""
    if not (model.path / CARD).is_file():
        raise InputError(f"{model.path / CARD}: missing: write a model card, or have adept-fast eval write it")
    model.skeleton()
    names = ("README.md", *RECORDS, INDEX)
    paths = [model.path / name for name in names if (model.path / name).is_file()]
    paths += [path for path in carried(model.path) if not path.name.startswith(".") and not path.name.endswith(NOT_UPLOADED)]
    paths += [model.path / name for name in model.shards.files]
    return [_upload(path, path.relative_to(model.path).as_posix()) for path in dict.fromkeys(paths)]


def not_uploaded(model: ModelFolder, uploads: list[Upload]) -> list[str]:
    """Return the names of everything else in the folder."""
    chosen = {upload.name.partition("/")[0] for upload in uploads}
    return sorted(entry.name for entry in model.path.iterdir() if entry.name not in chosen)


def upload(uploads: list[Upload], repo: str, private: bool | None, revision: str | None) -> str:
    """Create the repository where there is none, upload in one commit, and return its address.

    huggingface_hub retries, and skips what the repository has already. private: None leaves it to the hub. Raises InputError where the hub
    refuses it, ConnectionError where it cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with _refused(repo, api.endpoint):
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        files: list[Any] = [CommitOperationAdd(each.name, each.path if each.content is None else each.content) for each in uploads]
        return str(api.create_commit(repo, files, commit_message="Upload by adept_fast", revision=revision).commit_url)


def without_paths(content: Any) -> Any:
    """Replace each path of this machine in a JSON value by its last name."""
    if isinstance(content, dict):
        return {key: without_paths(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_paths(value) for value in content]
    local = isinstance(content, str) and (content.startswith(("/", "~/", "./", "../")) or os.path.exists(content))
    return os.path.basename(content.rstrip("/")) if local else content


def _upload(path: Path, name: str) -> Upload:
    if name not in RECORDS:
        return Upload(name, path)
    content = read_json(path)
    clean = without_paths(content)
    return Upload(name, path, None if clean == content else f"{dumps(clean, indent=1)}\n".encode())


@contextmanager
def _refused(repo: str, endpoint: str) -> Iterator[None]:
    """Turn what the hub answers into one line with the way out."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    token = "hf auth login, or set HF_TOKEN to a token that may write"
    try:
        yield
    except LocalTokenNotFoundError:
        raise InputError(f"{repo}: no token of the hub is set: {token}") from None
    except HFValidationError as error:
        raise InputError(f"repo={repo}: {_first_line(error)}: give USER/NAME", "repo") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise InputError(f"{repo}: the hub refuses it ({_first_line(error)}): {token} there") from None
        raise ConnectionError(f"{repo}: the hub failed ({_first_line(error)}): the same command goes on") from None
    except httpx.TransportError as error:
        raise ConnectionError(f"{endpoint} cannot be reached ({_first_line(error)}): the same command goes on") from None
    except ValueError as error:  # metadata of the card that the hub finds invalid
        raise InputError(f"{CARD}: {_first_line(error)}: correct it") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".:")

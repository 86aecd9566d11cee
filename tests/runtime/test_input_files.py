"""Only regular files are opened, records up to a bound; what is wrong with one is said with its name."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from adept_fast.checkpoints.safetensors_index import read_header
from adept_fast.data.readers import read, reader
from adept_fast.data.sources import Source
from adept_fast.errors import InputError
from adept_fast.pipeline.recipe import load
from adept_fast.runtime import input_files
from adept_fast.runtime.input_files import open_input, read_json, read_text, read_yaml
from adept_fast.tuning.trainer_log import read_log

OTHERS = {"pipe": "a pipe", "socket": "a socket", "device": "a device", "folder": "a folder", "loop": "a link that leads to itself"}


@pytest.fixture(params=OTHERS)
def other(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """What is no regular file, under a link's name, which is followed."""
    monkeypatch.chdir(tmp_path)  # a socket's name may have a hundred characters
    if request.param == "pipe":
        os.mkfifo("pipe")
    elif request.param == "socket":
        socket.socket(socket.AF_UNIX).bind("socket")
    elif request.param == "folder":
        Path("folder").mkdir()
    at = {"device": "/dev/zero", "loop": "link.jsonl"}.get(request.param, request.param)
    Path("link.jsonl").symlink_to(at)
    return Path("link.jsonl"), OTHERS[request.param]


@pytest.mark.parametrize("opens", [open_input, read_text, read_json, read_yaml, read_header, lambda path: load(str(path))])
def test_what_is_no_regular_file_is_refused_by_name(other: tuple[Path, str], opens: object) -> None:
    path, what = other
    with pytest.raises(InputError, match=f"link.jsonl'?: ({what}|no such recipe)"):
        opens(path)


@pytest.mark.parametrize("kind", ["jsonl", "txt", "json", "parquet", "jsonl.gz", "txt.gz"])
def test_data_that_is_no_regular_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / f"pipe.{kind}")
    with pytest.raises(InputError, match=f"pipe.{kind}: "):
        read(Source(str(tmp_path / f"pipe.{kind}")))
    if kind != "json":
        with pytest.raises(InputError, match=f"pipe.{kind}: "):
            next(iter(reader(Source(str(tmp_path / f"pipe.{kind}"))).records()))


def test_records_and_recipes_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_files, "LARGEST_RECIPE", 100)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(input_files.LARGEST_RECORD + 1)
    for read_file in (read_json, read_yaml, lambda path: read_text(path, 100)):
        with pytest.raises(InputError, match="large: more than [0-9,]+ bytes"):
            read_file(tmp_path / "large")
    (tmp_path / "small").write_text("x" * 100)
    assert read_text(tmp_path / "small", 100) == "x" * 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b'{"a": "\xe9"}', "file:1: not UTF-8 text .byte 0xe9.: save it as UTF-8"),
        (b'{\n\n"a": "\xff"}', "file:3: not UTF-8 text"),
        (b'{"a": "\\ud83d"}', "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\x00" * 9, "not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON .*BOM"),
    ],
)
def test_malformed_json_names_its_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        read_json(tmp_path / "file")
    assert str(tmp_path / "file") in str(refused.value)


@pytest.mark.parametrize("name", ["none", "none/none", "x" * 300, "a\0b", "a\ud800b"])
def test_names_of_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no such file") as refused:
        open_input(tmp_path / name)
    assert str(refused.value).isprintable()


def test_a_log_in_another_encoding_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes('{"step": 1}\n{"step": "é"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match="log.jsonl:2: not UTF-8 text"):
        read_log(tmp_path / "log.jsonl")


def test_what_the_machine_refuses_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    (tmp_path / "file").write_text("{}")

    def exhausted(*given: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(tmp_path / "file"))

    monkeypatch.setattr(os, "open", exhausted)
    with pytest.raises(OSError, match="Too many open files.*file"):
        open_input(tmp_path / "file")

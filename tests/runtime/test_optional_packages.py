"""A package that is missing is one line that names the extra; one that is broken raises its own error."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from adept_fast.data.readers import read
from adept_fast.data.sources import Source
from adept_fast.errors import InputError
from adept_fast.runtime.optional_packages import optional
from adept_fast.tuning import baselines

ROOT = Path(__file__).parents[2]


def missing(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [finder_without(package), *sys.meta_path])


def finder_without(package: str) -> object:
    class Finder:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    return Finder


def test_lora_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    missing(monkeypatch, "peft")
    with pytest.raises(InputError, match=r"^method=lora needs peft: pip install 'adept-fast\[lora\]'$"):
        baselines.prepare(None, "lora", 4, 0)


@pytest.mark.parametrize(("package", "file"), [("datasets", "owner/name"), ("pyarrow", "rows.parquet")])
def test_data_without_its_library(package: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.parquet").write_bytes(b"PAR1")
    missing(monkeypatch, package)
    with pytest.raises(InputError, match=rf"^{file}: .* needs {package}: pip install 'adept-fast\[hf\]'$"):
        read(Source(file))


def test_a_broken_package_is_no_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("import a_part_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_part_that_is_missing"):
        optional("broken_package", "hf", "this")


def test_every_extra_that_the_text_names_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    globs = ("adept_fast/**/*.py", "docs/**/*.md", "examples/*.py", "*.md")
    text = "".join(file.read_text(encoding="utf-8") for glob in globs for file in ROOT.glob(glob))
    named = {name for names in re.findall(r"(?:adept-fast|[ '\"]\.)\[([a-z,]+)\]", text) for name in names.split(",")}
    called = set(re.findall(r'optional\("[\w.]+", "(\w+)"', text))
    assert called >= {"hf", "lora"} and called | named <= extras.keys()

"""docs/ builds as a site without a warning."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    monkeypatch.chdir(ROOT)  # mkdocstrings reads the package from there
    build = pytest.importorskip("mkdocs.commands.build", reason="needs the extra [docs]").build
    config = pytest.importorskip("mkdocs.config").load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path))
    build(config)
    assert (tmp_path / "index.html").exists()

"""docs/ builds as a site, its links lead somewhere, and its reference has every public name."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

import adept_fast

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)


@cache
def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


@cache
def anchors(page: Path) -> set[str]:
    """The ids that a code host and the site both give to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title).strip().lower() for title in titles]
    return {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", re.sub(r"`[^`\n]*`", "", prose(page)))
    for link in (one or other for one, other in links):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, heading = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists() and target.is_relative_to(ROOT), f"{link}: no such file"
        assert not heading or heading in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_source_file_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"(?<![\w/.:-])(?:\w+/)+\w+\.(?:py|h|cu|cpp)\b", page.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).exists() and not (ROOT / "adept_fast" / name).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = re.findall(r"[\w/-]+\.md", repr(nav))
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_every_public_name_has_an_entry_in_the_reference() -> None:
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    entries = re.findall(r"^### (\w+)\n\n::: adept_fast\.(\w+)$", page, re.MULTILINE)
    assert all(title == name for title, name in entries)
    assert sorted(name for _, name in entries) == sorted(adept_fast.__all__)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("mkdocs.commands.build", reason="needs the extra [docs]").build
    load_config = pytest.importorskip("mkdocs.config").load_config
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    monkeypatch.chdir(ROOT)  # from where mkdocstrings reads the package
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    api = (tmp_path / "reference" / "api.html").read_text(encoding="utf-8")
    assert api.count(">Examples:<") == len(adept_fast.__all__)
    for page in tmp_path.rglob("*.html"):
        outside = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(https?:[^"]+)', page.read_text(encoding="utf-8"))
        assert not outside, f"{page.name} loads {outside}"

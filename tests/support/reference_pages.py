"""What docs/reference takes from declarations and docstrings: `python tests/support/reference_pages.py` writes them there."""

from __future__ import annotations

import re
from pathlib import Path

import adept_fast
from adept_fast.cli import help
from adept_fast.cli.commands import COMMANDS
from adept_fast.cli.recipe import starter
from adept_fast.pipeline.recipe import load

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
GIVEN = ("model_name_or_path=MODEL", "domain=my.txt")  # what has no default


def recipe_page(text: str) -> str:
    """docs/reference/recipe.md with the keys as they are now."""
    block = "\n".join((*starter(load(None, GIVEN), everything=True), ""))
    return re.sub(r"(?<=```yaml\n).+?(?=```)", lambda _: block, text, count=1, flags=re.DOTALL)


def cli_page(text: str) -> str:
    """docs/reference/cli.md with the help of each subcommand as it is now."""
    pages = [f"### adept-fast {name}\n\n```text\n{help.page(name)}\n```\n" for name in COMMANDS]
    return text.partition("## Subcommands\n")[0] + "\n".join(("## Subcommands\n", f"```text\n{help.overview()}\n```\n", *pages))


def api_page(text: str) -> str:
    """docs/reference/api.md with a table in each section, of its names and the first sentence of their docstrings."""

    def section(found: re.Match[str]) -> str:
        title, entries = found[1], found[3]
        names = re.findall(r"^::: adept_fast\.(\w+)$", entries, re.MULTILINE)
        first = {name: re.match(r".+?\.(?= |$)|.+", getattr(adept_fast, name).__doc__)[0].replace("|", "\\|") for name in names}
        rows = [f"| [{name}](#{name.lower()}) | {first[name]} |" for name in names]
        return "\n".join([title, "", "| name | content |", "|---|---|", *rows, "", entries])

    return re.sub(r"(^## .+$)\n\n((?:\|.*\n)+\n)?(### (?:.|\n)+?(?=^## |\Z))", section, text, flags=re.MULTILINE)


PAGES = {"recipe.md": recipe_page, "cli.md": cli_page, "api.md": api_page}

if __name__ == "__main__":
    for name, made in PAGES.items():
        page = FOLDER / name
        page.write_text(made(page.read_text(encoding="utf-8")), encoding="utf-8")

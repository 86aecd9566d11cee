"""The rooms of adept_fast, their floors, and the imports between them, read from the source: `python tests/support/module_map.py`.

A room is a folder (or a file) at the package root. docs/explanation/design.md lists the rooms from the top floor down; an import up
that list is an upward one. Imports for type checking only, and the lazy table of `adept_fast/__init__.py`, are not counted.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "adept_fast"
DESIGN = ROOT / "docs" / "explanation" / "design.md"
LONGEST = 300  # lines of a file


def rooms() -> list[str]:
    """Names at the package root, without what a build leaves there."""
    return sorted(path.name for path in PACKAGE.iterdir() if path.suffix != ".so" and path.name not in ("__pycache__", "kernels"))


def floors(design: str) -> list[str]:
    """Rooms in the order of the module map of docs/explanation/design.md, the top floor first."""
    block = re.search(r"^    cli/.*?(?=^\S)", design, re.MULTILINE | re.DOTALL)
    if block is None:
        raise SystemExit(f"{DESIGN}: no module map that begins with cli/")
    return re.findall(r"^    ([a-z]+)(?:/|\.py)", block.group(), re.MULTILINE)


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, module under adept_fast) of each import that `file` runs, at its top or in a function."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing = {id(node) for outer in ast.walk(tree) if _is_type_checking(outer) for node in ast.walk(outer)}
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "adept_fast":
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adept_fast."):
            yield node.lineno, str(node.module).removeprefix("adept_fast.")


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def arrows() -> dict[tuple[str, str], list[str]]:
    """(room, room it imports from) -> the places that do so."""
    found: dict[tuple[str, str], list[str]] = {}
    names = {Path(room).stem for room in rooms()}
    for file in sorted(PACKAGE.rglob("*.py")):
        room = Path(file.relative_to(PACKAGE).parts[0]).stem
        if room in ("__init__", "kernels"):
            continue
        for line, module in imports(file):
            other = module.partition(".")[0]
            if other in names and other not in (room, "__version__"):
                found.setdefault((room, other), []).append(f"{file.relative_to(ROOT)}:{line}")
    return found


def upward(found: dict[tuple[str, str], list[str]], order: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """The arrows that go up the list of floors."""
    place = {room: index for index, room in enumerate([*order[:-1], order[-1]])}
    return {pair: where for pair, where in found.items() if place.get(pair[0], -1) > place.get(pair[1], len(place))}


def long_files() -> dict[str, int]:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in PACKAGE.rglob("*.py")}
    return {file: length for file, length in sorted(lengths.items()) if length > LONGEST}


def main() -> None:
    order, found = floors(DESIGN.read_text(encoding="utf-8")), arrows()
    against = upward(found, order)
    print(f"{len(rooms())} names at the root: {', '.join(rooms())}")
    print(f"{len(order)} floors, {len(found)} arrows between rooms, {len(against)} of them upward")
    for (room, other), where in sorted(against.items()):
        print(f"  {room} -> {other}: {', '.join(where)}")
    for file, length in long_files().items():
        print(f"  {file}: {length} lines")
    sys.exit(bool(against or long_files()))


if __name__ == "__main__":
    main()

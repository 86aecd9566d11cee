"""Links out of docs/ lead to files that the site lacks: the site names such a file instead."""

from __future__ import annotations

import re
from posixpath import basename, dirname, join, normpath
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    def name(link: re.Match[str]) -> str:
        text, target = link.groups()
        path = normpath(join("docs", dirname(page.file.src_uri), target))
        if path.startswith("docs/"):
            return link[0]
        return f"`{path}`" if text.strip("`") in (path, basename(path)) else f"{text} (`{path}`)"

    return LINK.sub(name, markdown)

"""Give the examples of a docstring, which begin with >>>, the section that mkdocstrings renders as code."""

from __future__ import annotations

import re
from textwrap import indent
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*(?:\n\n>>> .*(?:\n.+)*)*", re.MULTILINE)


class DocstringExamples(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(lambda found: "Examples:\n" + indent(found[0], "    "), obj.docstring.value)

"""Bring the public names into the form that mkdocstrings renders.

Examples get a section of their own. The values of an argument become a list. Defaults that come from declared settings show their values.
"""

from __future__ import annotations

import inspect
import re
from textwrap import indent
from typing import Any

from griffe import Alias, Class, Extension, Function, Object

import adept_fast

EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*(?:\n\n>>> .*(?:\n.+)*)*", re.MULTILINE)
VALUE = re.compile(r'^( {8,})(?=[\w"\[][\w".,()\[\]+ -]{0,60}: )', re.MULTILINE)


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            text = EXAMPLE.sub(lambda found: "Examples:\n" + indent(found[0], "    "), obj.docstring.value)
            obj.docstring.value = VALUE.sub(r"\n\1- ", text)

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        for name in adept_fast.__all__:
            found = pkg[name].final_target if isinstance(pkg[name], Alias) else pkg[name]
            function = found.all_members.get("__init__") if isinstance(found, Class) else found
            if isinstance(function, Function):
                for given in inspect.signature(getattr(adept_fast, name)).parameters.values():
                    if isinstance(given.default, str | int | float | tuple | None):
                        function.parameters[given.name].default = repr(given.default)
                if isinstance(found, Class):
                    function.returns = None

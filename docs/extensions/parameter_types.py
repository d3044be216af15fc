"""Adds the types of parameters, results and attributes to their descriptions, as the source spells them."""

from __future__ import annotations

import inspect
import re
from typing import Any

from sphinx.application import Sphinx

PARAM = re.compile(r"^:param (\S+):")
ATTRIBUTE = re.compile(r"^\.\. attribute:: (\w+)$")


def add_types(_: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A handler of autodoc-process-docstring, after napoleon's."""
    function = obj.__init__ if inspect.isclass(obj) else inspect.unwrap(getattr(obj, "__func__", obj))
    of_parameters = dict(getattr(function, "__annotations__", {}))
    of_fields = dict(getattr(obj, "__annotations__", {})) if inspect.isclass(obj) else {}
    typed: list[str] = []
    for line in lines:
        typed.append(line)
        if (attribute := ATTRIBUTE.match(line)) and attribute[1] in of_fields:
            typed.append(f"   :type: {of_fields[attribute[1]]}")
        if match := PARAM.match(line):
            annotation = of_parameters.get(match[1].lstrip("*\\"), of_fields.get(match[1]))
            if isinstance(annotation, str):
                typed.insert(len(typed) - 1, f":type {match[1]}: {annotation}")
        if line.startswith(":returns:") and isinstance(of_parameters.get("return"), str):
            typed.insert(len(typed) - 1, f":rtype: {of_parameters['return']}")
    lines[:] = typed


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", add_types, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

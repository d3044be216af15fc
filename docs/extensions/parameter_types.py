"""Adds the types of parameters, results and attributes to their descriptions, as the source spells them."""

from __future__ import annotations

import inspect
import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

PARAM = re.compile(r"^:param (\S+):")
HIDDEN = "\N{RATIO}"
ATTRIBUTE = re.compile(r"^\.\. attribute:: (\w+)$")


def hide_colon(_: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A handler of autodoc-process-docstring, before napoleon's, which takes what stands before a colon in a property's
    first line for its type."""
    if what == "property" and lines:
        lines[0] = lines[0].replace(":", HIDDEN)


def add_types(_: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A handler of autodoc-process-docstring, after napoleon's."""
    function = obj.__init__ if inspect.isclass(obj) else inspect.unwrap(getattr(obj, "__func__", obj))
    lines[:] = [line.replace(HIDDEN, ":") for line in lines]
    of_parameters = dict(getattr(function, "__annotations__", {}))
    of_fields = dict(getattr(obj, "__annotations__", {})) if inspect.isclass(obj) else {}
    typed: list[str] = []
    result = ""
    for line in [*lines, ""]:
        if result and not line.startswith(" "):  # the description of the result has ended
            typed.append(f":rtype: {result}")
            result = ""
        typed.append(line)
        if (attribute := ATTRIBUTE.match(line)) and attribute[1] in of_fields:
            typed.append(f"   :type: {of_fields[attribute[1]]}")
        if match := PARAM.match(line):
            annotation = of_parameters.get(match[1].lstrip("*\\"), of_fields.get(match[1]))
            if isinstance(annotation, str):
                typed.insert(len(typed) - 1, f":type {match[1]}: {annotation}")
        if line.startswith(":returns:"):
            result = str(of_parameters.get("return", ""))
    lines[:] = typed


def find_type(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement) -> Any:
    """A handler of missing-reference: the entry of a type. Sphinx 8 looks for classes alone in descriptions."""
    if (node.get("refdomain"), node.get("reftype")) != ("py", "class"):
        return None
    python = env.get_domain("py")
    return python.resolve_xref(env, node["refdoc"], app.builder, "type", node["reftarget"], node, contnode)


def set_dashes(_: Sphinx, document: nodes.document) -> None:
    """A handler of doctree-read. Sphinx writes two hyphens between a parameter and its description, and leaves it to
    smartquotes, which would take those of options (`--json`) too, to make a dash of them."""
    for text in list(document.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" \N{EN DASH} "))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", hide_colon, priority=400)
    app.connect("autodoc-process-docstring", add_types, priority=600)
    app.connect("doctree-read", set_dashes)
    app.connect("missing-reference", find_type)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

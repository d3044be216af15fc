"""The role of single backticks in docstrings: a public name becomes a link to its entry, a path in docs a link to the
page, and anything else is code."""

from __future__ import annotations

import importlib
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst.states import Inliner
from sphinx import addnodes
from sphinx.application import Sphinx

ENTRY = re.compile(r"^\.\. (?:auto|py:)(?:class|data|exception|function|type):: (drift_kernels[\w.]*)", re.MULTILINE)

PAGE = re.compile(r"docs/([\w/]+)\.md")


def documented_names(docs: Path) -> list[str]:
    """The full names that the pages of the interface have entries for."""
    return [name for page in sorted((docs / "api").glob("*.md")) for name in ENTRY.findall(page.read_text())]


class Names:
    """Finds entries by short names: `Prior`, `Prior.open`, `named_groups`."""

    def __init__(self, docs: Path) -> None:
        self._by_short: dict[str, list[str]] = defaultdict(list)
        for name in documented_names(docs):
            self._by_short[name.rpartition(".")[2]].append(name)

    def find(self, text: str, module: str | None) -> str | None:
        """The full name. One that two modules have is that of `module`, or nothing."""
        short, _, member = text.removesuffix("()").partition(".")
        found = self._by_short.get(short, [])
        if len(found) > 1:
            found = [name for name in found if name.rpartition(".")[0] == module]
        if not found:
            return None
        if not member:
            return found[0]
        owner = _object(found[0])
        own = vars(owner).get(member) if isinstance(owner, type) else None
        return f"{found[0]}.{member}" if getattr(own, "__doc__", None) else None


def _object(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute, None)


def setup(app: Sphinx) -> dict[str, Any]:
    names: list[Names] = []

    def role(
        name: str, rawtext: str, text: str, lineno: int, inliner: Inliner, options: Any = None, content: Any = ()
    ) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        if not names:
            names.append(Names(Path(app.srcdir)))
        if page := PAGE.fullmatch(text):
            if page[1] == app.env.docname:
                return [nodes.Text("below")], []
            link = addnodes.pending_xref(rawtext, nodes.inline("", text), refdomain="std", reftype="doc")
            link.update_all_atts({"reftarget": f"/{page[1]}", "refexplicit": False, "refdoc": app.env.docname})
            return [link], []
        code = nodes.literal(rawtext, text)
        target = names[0].find(text, app.env.ref_context.get("py:module"))
        if target is None:
            return [code], []
        link = addnodes.pending_xref(
            rawtext, code, refdomain="py", reftype="obj", reftarget=target, refexplicit=True, refdoc=app.env.docname
        )
        return [link], []

    app.add_role("name", role)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

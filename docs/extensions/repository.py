"""Links of Markdown files, as they are in the repository, made links of the site.

Pages of docs link to one another as on GitHub, and MyST resolves that. What lies outside docs becomes

- a page of the site, if one includes it (`repository_pages`; for the README, the page that has the part);
- a copy of the file, if it is an image or JSON;
- else a link to the repository, if `repository_file` says where that is, or the path as plain code.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
CODE = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)|^(?: {4}|\t).*?$|`[^`\n]+`(?!\])", re.MULTILINE | re.DOTALL)
COPIED = {".json", ".png", ".pdf"}
INCLUDED = re.compile(r"^:::\{include\} (?P<path>\S*README\.md)\n(?P<options>(?::.*\n)*)", re.MULTILINE)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def readme_anchors(root: Path, docs: Path) -> dict[str, str]:
    """The anchors of the README -> the page of the site, relative to docs, that includes the part with that heading."""
    found = {}
    readme = (root / "README.md").read_text()
    for page in sorted([docs / "index.md", *docs.glob("site/*.md")]):
        for include in INCLUDED.finditer(page.read_text()):
            if (page.parent / include["path"]).resolve() != root / "README.md":
                continue
            options = dict(re.findall(r"^:([\w-]+): (.*)$", include["options"], re.MULTILINE))
            part = readme.partition(options["start-after"])[2].partition(options["end-before"])[0]
            for heading in re.findall(r"^#+ (.+)$", part, re.MULTILINE):
                found[slug(heading)] = str(page.relative_to(docs))
    return found


class Links:
    """Rewrites the links of one site."""

    def __init__(self, root: Path, docs: Path, pages: dict[str, str], file_url: str | None) -> None:
        self.root, self.docs, self.pages, self.file_url = root, docs, pages, file_url
        self.anchors = readme_anchors(root, docs)

    def rewritten(self, text: str, source: Path, page: Path) -> str:
        """The text of a Markdown file as a page of docs shows it, which is the file itself or includes it."""

        def replace(match: re.Match[str]) -> str:
            return self._link(match, source, page)

        pieces, end = [], 0
        for code in CODE.finditer(text):
            pieces += [LINK.sub(replace, text[end : code.start()]), code.group()]
            end = code.end()
        return "".join([*pieces, LINK.sub(replace, text[end:])])

    def _link(self, match: re.Match[str], source: Path, page: Path) -> str:
        image, text, target = match.group("image", "text", "target")
        if re.match(r"[a-z]+:", target):
            return match.group()
        path, _, anchor = target.partition("#")
        file = (source.parent / path).resolve() if path else source
        if file == self.root / "README.md":
            return f"[{text}]({self._from(page, self.docs / self.anchors[anchor])}#{anchor})"
        if not file.exists():
            raise FileNotFoundError(f"{source}: there is no {target}")
        name = str(file.relative_to(self.root))
        if name in self.pages:
            file = self.docs / self.pages[name]
        if file.is_relative_to(self.docs) and not image and text.strip("`") in (path, file.name):
            text = ""  # the title of the page or of its section
        if file.is_relative_to(self.docs) or file.suffix in COPIED:
            return f"{image}[{text}]({self._from(page, file)}{'#' * bool(anchor)}{anchor})"
        if self.file_url is not None:
            return f"[{text}]({self.file_url.format(path=name)})"
        return f"`{name}`" if text.strip("`") in (name, file.name) else f"{text} (`{name}`)"

    def _from(self, page: Path, file: Path) -> str:
        return os.path.relpath(file, page.parent)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("repository_file", None, "env", (str, type(None)))
    app.add_config_value("repository_pages", {}, "env", dict)
    docs = Path(app.srcdir)

    def links() -> Links:
        return Links(docs.parent, docs, app.config.repository_pages, app.config.repository_file)

    def read(_: Sphinx, docname: str, content: list[str]) -> None:
        page = docs / f"{docname}.md"
        content[0] = links().rewritten(content[0], page, page)

    def include(_: Sphinx, path: Path, __: str, content: list[str]) -> None:
        content[0] = links().rewritten(content[0], (docs / path).resolve(), docs / f"{app.env.docname}.md")

    app.connect("source-read", read)
    app.connect("include-read", include)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""The documentation site builds without warnings and has every public name; every public docstring is complete."""

from __future__ import annotations

import ast
import html
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import drift_kernels
from drift_kernels import integrations
from drift_kernels.cli import command_line

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "drift_kernels"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

sys.path.insert(0, str(DOCS / "extensions"))

from commands import parts_of  # noqa: E402
from repository import Links, readme_anchors, slug  # noqa: E402

# Methods that override torch's, whose documentation describes their arguments and results.
AS_IN_TORCH = {"add_param_group", "step", "state_dict", "load_state_dict"}
NOT_SHOWN = {"DriftArgs.check_drift"}  # a validator, which pydantic calls


# The pages


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built like `make docs`."""
    folder = tmp_path_factory.mktemp("site")
    flags = ["-q", "-W", "--keep-going", "-n", "-b", "html", "-d", str(folder / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *flags, str(DOCS), str(folder / "html")]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert ran.returncode == 0, ran.stderr
    return folder / "html"


def entries(site: Path) -> set[str]:
    """The names of the Python objects in the site's inventory (four lines, then zlib)."""
    lines = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode().splitlines()
    return {line.split(" ")[0] for line in lines if line.split(" ")[1].startswith("py:")}


def test_every_public_name_has_an_entry(site: Path) -> None:
    found = entries(site)
    assert [names for names, _, _ in public() if not names & found] == []


def test_every_entry_has_its_docstring(site: Path) -> None:
    """As far as the first name in it, which may have become a link."""
    pages = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", pages)).split())
    firsts = {name: re.split(r"\n\n|`", ast.get_docstring(node) or "")[0] for name, node in CALLABLES.items()}
    missing = {name for name, first in firsts.items() if " ".join(first.rstrip(":").split()) not in text}
    assert missing == NOT_SHOWN


def test_no_page_needs_the_network(site: Path) -> None:
    """Scripts, styles and images are part of the site; only links lead elsewhere."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    loaded = re.compile(
        r"<(?:script|img|source|iframe)\b[^>]*\bsrc=\"(?:https?:)?//|<link\b[^>]*\bhref=\"(?:https?:)?//"
    )
    assert [page.name for page in pages if loaded.search(page.read_text())] == []


def test_the_site_has_what_the_pages_show(site: Path) -> None:
    """Every image and file that a page refers to exists."""
    for page in site.rglob("*.html"):
        for target in re.findall(r"<(?:img|a|script|link)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"", page.read_text()):
            path = re.split(r"[?#]", target)[0]
            if path and not re.match(r"[a-z]+:", path):
                assert (page.parent / path).exists(), f"{page.relative_to(site)}: {target}"


def test_every_page_is_listed() -> None:
    listed = set(re.findall(r"^[a-z_]+(?:/[a-z_]+)?$", (DOCS / "index.md").read_text(), re.MULTILINE))
    pages = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md")}
    assert listed == pages - {"index"}


def test_the_command_line_is_argparse_s(site: Path) -> None:
    """Every option of every subcommand, with its help."""
    page = html.unescape(re.sub(r"<[^>]+>", "", (site / "api" / "command_line.html").read_text()))
    text = " ".join(page.split())
    parser = command_line()
    for each in (parser, *parts_of(parser).values()):
        assert str(each.description) in text
        for action in each._actions[1:]:  # without --help
            assert all(option in text for option in action.option_strings), action
            assert str(action.help or "") % vars(action) in text


# Converting a repository file's links to the site's


@pytest.fixture
def links(tmp_path: Path) -> Links:
    files = {
        "README.md": "<!-- site: a -->\n## Speed: how fast\n<!-- site: b -->\n## Not on the site\n",
        "docs/index.md": ":::{include} ../README.md\n:start-after: <!-- site: a -->\n:end-before: <!-- site: b -->\n",
        "docs/method.md": "# The method\n",
        "docs/site/benchmarks.md": "",
        "benchmarks/README.md": "",
        "benchmarks/step.py": "",
        "results/step.json": "",
        "results/step.png": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return Links(tmp_path, tmp_path / "docs", {"benchmarks": "site/benchmarks.md"}, None)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[how](docs/method.md#what)", "[how](../method.md#what)"),
        ("[docs/method.md](docs/method.md#what)", "[](../method.md#what)"),  # the target's title
        ("[speed](#speed-how-fast)", "[speed](../index.md#speed-how-fast)"),
        ("[runs](benchmarks)", "[runs](benchmarks.md)"),
        ("![plot](results/step.png)", "![plot](../../results/step.png)"),
        ("[rows](results/step.json)", "[rows](../../results/step.json)"),
        ("[the step](benchmarks/step.py)", "the step (`benchmarks/step.py`)"),
        ("[step.py](benchmarks/step.py)", "`benchmarks/step.py`"),
        ("[paper](https://arxiv.org/abs/2510.15050)", "[paper](https://arxiv.org/abs/2510.15050)"),
        ("`[a](benchmarks/step.py)`", "`[a](benchmarks/step.py)`"),
        ("```\n[a](benchmarks/step.py)\n```", "```\n[a](benchmarks/step.py)\n```"),
        ("text:\n\n    [a](benchmarks/step.py)\n", "text:\n\n    [a](benchmarks/step.py)\n"),
    ],
)
def test_links_of_the_readme(links: Links, written: str, shown: str) -> None:
    assert links.rewritten(written, links.root / "README.md", links.docs / "site" / "use.md") == shown


def test_links_to_files_lead_to_the_repository_if_it_is_known(links: Links) -> None:
    links.file_url = "https://example.org/blob/main/{path}"
    page = links.docs / "method.md"
    written = links.rewritten("[the step](../benchmarks/step.py)", page, page)
    assert written == "[the step](https://example.org/blob/main/benchmarks/step.py)"


def test_a_link_to_nothing_is_an_error(links: Links) -> None:
    page = links.docs / "method.md"
    with pytest.raises(FileNotFoundError, match=r"there is no \.\./step\.py"):
        links.rewritten("[the step](../step.py)", page, page)
    with pytest.raises(KeyError, match="not-on-the-site"):
        links.rewritten("[here](../README.md#not-on-the-site)", page, page)


def test_the_site_has_the_readme() -> None:
    """All of its sections, except the list of pages, which the site replaces."""
    headings = re.findall(r"^## (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {slug(heading) for heading in headings} - readme_anchors(ROOT, DOCS).keys() == {"documentation"}


# Docstrings


def definitions(path: Path) -> dict[str, Definition]:
    """The public functions and classes at a module's top."""
    found = (node for node in ast.parse(path.read_text()).body if isinstance(node, (*FUNCTIONS, ast.ClassDef)))
    return {node.name: node for node in found if not node.name.startswith("_")}


def public() -> Iterator[tuple[set[str], str, Definition]]:
    """Yield the possible names on the site (one is used), the name in the module, and the source."""
    for name in filter(lambda name: not name.startswith("_"), drift_kernels.__all__):
        module = getattr(drift_kernels, name).__module__.removeprefix("drift_kernels.").replace(".", "/")
        yield {f"drift_kernels.{name}"}, name, definitions(PACKAGE / f"{module}.py")[name]
    for module in ("ops", "footprint"):
        for name, node in definitions(PACKAGE / f"{module}.py").items():
            yield {f"drift_kernels.{module}.{name}"}, name, node
    for path in sorted((PACKAGE / "integrations").glob("*.py")):
        for name, node in definitions(path).items():
            shorter = {f"drift_kernels.integrations.{name}"} if name in integrations.__all__ else set()
            yield {f"drift_kernels.integrations.{path.stem}.{name}"} | shorter, name, node


def members() -> Iterator[tuple[str, ast.FunctionDef]]:
    """The public methods and properties of public classes."""
    for _, name, node in public():
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_") and not is_setter(member):
                    yield f"{name}.{member.name}", member


def decorators(node: ast.FunctionDef) -> list[str]:
    return [ast.unparse(decorator) for decorator in node.decorator_list]


def is_setter(node: ast.FunctionDef) -> bool:
    return any(name.endswith(".setter") for name in decorators(node))


CALLABLES: Mapping[str, Definition] = {
    **{f"{min(names)}": node for names, _, node in public()},
    **dict(members()),
}


def section(doc: str, title: str) -> dict[str, str]:
    """The entries of a section of a docstring: names -> their description."""
    text = re.search(rf"^{title}:\n((?:    .*\n|\n)+)", f"{doc}\n", re.MULTILINE)
    found: dict[str, str] = {}
    for names, description in re.findall(r"^    ([\w*, ]+): (.+)$", text[1] if text else "", re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), description)
    return found


def constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    found = [member for member in node.body if isinstance(member, ast.FunctionDef) and member.name == "__init__"]
    return found[0] if found else None


def parameters(node: ast.FunctionDef) -> set[str]:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return {each.arg for each in named if each is not None and not each.arg.startswith("_")} - {"self", "cls"}


def own(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function's body, without nested functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (*FUNCTIONS, ast.Lambda, ast.ClassDef)):
            yield child
            yield from own(child)


def raised(node: ast.FunctionDef) -> set[str]:
    """The error classes in its own `raise` statements."""
    found = set()
    for child in own(node):
        if isinstance(child, ast.Raise) and child.exc is not None:
            name = ast.unparse(child.exc.func if isinstance(child.exc, ast.Call) else child.exc)
            found |= {name} if re.fullmatch(r"[A-Z]\w*Error", name) else set()
    return found


@pytest.mark.parametrize("name", CALLABLES)
def test_docstring(name: str) -> None:
    """It has a summary sentence, every parameter, a result if there is one, and the errors."""
    node, doc = CALLABLES[name], ast.get_docstring(CALLABLES[name])
    assert doc, f"{name} has no docstring"
    assert re.search(r"[.:]$", doc.split("\n\n")[0]), doc
    function = constructor(node) if isinstance(node, ast.ClassDef) else node
    if function is None:
        fields = {f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)}
        assert section(doc, "Attributes").keys() == fields
        return
    assert isinstance(function, ast.FunctionDef)
    is_torchs = name.startswith("FusedDriftAdamW.") and name.partition(".")[2] in AS_IN_TORCH
    documented = set(section(doc, "Args"))
    if is_hidden(node):  # made by a function, whose docstring describes it
        assert not documented
    else:
        assert documented <= parameters(function)
        assert is_torchs or documented == parameters(function)
    assert {error for error in raised(function) if error not in doc} == set()
    if isinstance(node, ast.ClassDef) or "property" in decorators(node) or is_torchs:
        return
    assert not re.search(r"^(Returns|Yields):\n.*:", doc, re.MULTILINE), "what precedes a colon becomes a type"
    returns = function.returns is not None and ast.unparse(function.returns) != "None"
    says = re.search(r"^(Returns|Yields):$|\A(Return|Yield|Open|A context) ", doc, re.MULTILINE)
    assert bool(says) == returns, doc


def is_hidden(node: Definition) -> bool:
    """Whether the site shows a class without its constructor, because users do not call it."""
    return f"{node.name}()\n" in "".join(path.read_text() for path in DOCS.rglob("api/*.md"))

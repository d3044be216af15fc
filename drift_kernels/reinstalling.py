"""The command that builds a compiled extension for the package that is installed."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .version import __version__

NAME = "drift_kernels"
ROOT = Path(__file__).parents[1]  # a checkout, or site-packages


def reinstall_command(extension: str) -> str:
    """The shell command that reinstalls this version of the package, for this Python, with an extension: "cpu" or
    "cuda".

    `DRIFT_KERNELS_CPU=1` makes it an error, which shows what the compiler says, if the extension cannot be built.
    Without `--no-cache-dir` pip would install the wheel that it built before there was a compiler, and without
    `--no-binary` one that an index may have.
    """
    options = f"--no-cache-dir --force-reinstall --no-deps --no-binary {NAME}"
    return f"DRIFT_KERNELS_{extension.upper()}=1 {_installer()} {options} {_source()}"


def _installer() -> str:
    python = shlex.quote(sys.executable)
    # Environments that uv makes have no pip.
    return f"{python} -m pip install" if find_spec("pip") else f"uv pip install --python {python}"


def _source() -> str:
    """Where the package was installed from: a folder, an archive, a commit, or an index."""
    if (ROOT / "setup.py").is_file():
        return f"-e {shlex.quote(str(ROOT))}"
    (text, *_) = [found.read_text("direct_url.json") for found in distributions(name=NAME, path=[str(ROOT)])] or [None]
    origin = json.loads(text) if text else {}
    url: str = origin.get("url", "")
    if "vcs_info" in origin:
        folder = f"#subdirectory={origin['subdirectory']}" if "subdirectory" in origin else ""
        return shlex.quote(f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}{folder}")
    is_there = not url.startswith("file:") or Path(unquote(urlsplit(url).path)).exists()
    if url and is_there and not url.endswith(".whl"):
        return shlex.quote(url)
    return f"{NAME}=={__version__}"

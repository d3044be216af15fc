"""Every shell command of the README, the docs and CONTRIBUTING.md: run, or compared with its program's options."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import PAGES, ROOT, commands_in

from drift_kernels.cli import main
from examples import tiny

DOCS = ROOT / "docs"
PROSE = (*PAGES, ROOT / "benchmarks" / "README.md", ROOT / "examples" / "digit_sums" / "README.md")

# Commands of blocks that no test here runs -> where they are run instead.
ELSEWHERE = {
    "make": "test_make_targets",  # below
    "pip install .": "tests/test_wheels.py builds it",
    "torchrun": "tests/trainers/test_torchtitan.py: its options",
    ".venv/bin/python": "pytest and setup.py, which make test and make itself run",
    "drift-prior": "here and, for the README's, tests/test_documented.py",
}


def test_no_command_is_left_out() -> None:
    commands = [command for page in PAGES for command in commands_in(page)]
    assert len(commands) > 10
    assert [command for command in commands if not command.startswith(tuple(ELSEWHERE))] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoints under the names that the pages use."""
    made = tmp_path_factory.mktemp("commands")
    base, expert = tiny.base_and_expert()
    base.save_pretrained(made / "BASE")
    expert.save_pretrained(made / "EXPERT")
    for name in ("Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"):
        shutil.copytree(made / "BASE", made / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        for name in ("prior-math", "prior-code", "PRIOR"):
            assert main(["build", "--expert", "EXPERT", "--base", "BASE", "--out", name]) == 0
    return made


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == DOCS], ids=lambda page: page.stem)
def test_drift_prior_commands_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page: a command may read, or replace, what an earlier one wrote."""
    monkeypatch.chdir(folder)
    for command in commands_in(page, "drift-prior"):
        words = shlex.split(command)[1:]
        if "--out" in words:
            shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
        assert main(words) == 0, command


def options_of(module: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The output of `python -m MODULE --help`."""
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as exit_info:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    assert exit_info.value.code == 0
    return out.getvalue()


def test_modules_have_the_options_that_pages_name(monkeypatch: pytest.MonkeyPatch) -> None:
    named: dict[str, set[str]] = {}
    for page in PROSE:
        for found in re.finditer(r"python -m ((?:benchmarks|examples|tests)[\w.]*)([^`#]*)", page.read_text()):
            module, rest = found[1].rstrip("."), found[2].partition("\n\n")[0]
            named.setdefault(module, set()).update(re.findall(r"(?<!\S)--[a-z][\w-]*", rest))
    assert len(named) > 10
    for module, options in named.items():
        spec = importlib.util.find_spec(module)
        assert spec is not None, module
        if spec.submodule_search_locations:
            assert importlib.util.find_spec(f"{module}.__main__") is not None, module
        else:
            assert 'if __name__ == "__main__":' in Path(spec.origin).read_text(), module
        if options:
            known = set(re.findall(r"--[a-z][\w-]*", options_of(module, monkeypatch)))
            assert options - known == set(), module


def test_make_targets() -> None:
    words = [
        found for page in PROSE for found in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(), re.MULTILINE)
    ]
    makefile = (ROOT / "Makefile").read_text()
    for target in sorted(set(words)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        done = subprocess.run(
            ["make", "-n", "--no-print-directory", target, "OUT=folder"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_drift_prior_options_in_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    """Options that the text mentions with a subcommand."""
    named: dict[str, set[str]] = {}
    for page in PAGES:
        for found in re.finditer(r"`drift-prior ([a-z-]+)([^`]*)`", page.read_text()):
            named.setdefault(found[1], set()).update(re.findall(r"--[a-z][\w-]*", found[2]))
    assert len(named) >= 5
    for subcommand, options in named.items():
        with pytest.raises(SystemExit) as exit_info:
            main([subcommand, "--help"])
        assert exit_info.value.code == 0
        known = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
        assert options - known == set(), subcommand

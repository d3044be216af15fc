"""The package as it is installed: with and without a compiler, and what it imports."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# drift_kernels/<module>: what of the package it may import (design: nothing imports upward).
LAYERS = {
    "errors": set(),
    "coefficients": set(),
    "plan": {"lossless"},
    "lossless": set(),
    "codes": set(),
    "reference": {"codes", "coefficients", "lossless", "plan"},
    "groups": {"coefficients"},
    "schedule": set(),
    "prior": {"errors", "_cpu"},
    "sharding": {"lossless"},
    "binding": {"errors", "prior", "sharding"},
    "backends": {"errors", "plan", "reference", "coefficients", "_cpu", "_cuda"},
    "precision": {"codes", "sharding"},
    "batch": {"backends", "binding", "coefficients", "lossless", "plan", "precision", "sharding"},
    "eager": set(),
    "ops": {"backends", "codes", "coefficients", "plan"},
    "backward": {"batch", "coefficients", "eager", "groups", "plan", "sharding"},
    "inspection": {"batch", "precision"},
    "masters": {"lossless", "precision", "sharding"},
    "state": {"errors", "groups", "precision", "sharding"},
    "optimizer": {
        "backends", "backward", "batch", "binding", "coefficients", "eager", "errors", "groups", "inspection",
        "masters", "precision", "prior", "sharding", "state",
    },
    "bias": {"backends", "binding", "coefficients", "errors", "groups", "plan", "sharding"},
    "gradients": {"backends", "bias", "binding", "prior"},
    "hooks": {"backends", "bias", "binding", "errors", "sharding"},
    "cli": {"prior", "errors"},
    "integrations": {"optimizer", "prior", "schedule"},
}  # fmt: skip


def imported_modules(path: Path) -> set[str]:
    """The modules of the package that a file imports, by their first name."""
    package = ("drift_kernels", *path.relative_to(ROOT / "drift_kernels").with_suffix("").parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else ()
            full = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{full}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("drift_kernels.")}


def test_nothing_imports_upward() -> None:
    for path in (ROOT / "drift_kernels").rglob("*.py"):
        module = path.relative_to(ROOT / "drift_kernels").with_suffix("").parts[0]
        if module != "__init__":
            assert imported_modules(path) - {module} <= LAYERS[module], path.name


def test_importing_the_package_imports_no_triton_matplotlib_or_trainer() -> None:
    unwanted = {"triton", "matplotlib", "transformers", "accelerate", "lightning"}
    code = f"import sys, drift_kernels.integrations; print([m for m in {unwanted} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def build_wheel(tmp_path: Path, env: dict[str, str]) -> tuple[list[str], str]:
    """The names in a wheel built from a copy of the sources, and what the build said."""
    source = tmp_path / "source"
    keep = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "runs", "results", "__pycache__")
    shutil.copytree(ROOT, source, ignore=keep)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist(), done.stdout + done.stderr


def has_extension(names: list[str]) -> bool:
    return any(name.startswith("drift_kernels/_cpu") and not name.endswith(".pyi") for name in names)


@pytest.mark.parametrize("reason", ["no C++ compiler was found", "failed with exit status"])
def test_without_a_compiler_it_installs_and_says_so(tmp_path: Path, reason: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "CXX"}
    if "found" in reason:
        env["PATH"] = str(tmp_path)
    else:
        env["CXX"] = shutil.which("false") or "/bin/false"
    names, output = build_wheel(tmp_path, env)
    assert "drift_kernels/reference.py" in names
    assert not has_extension(names)
    assert "WITHOUT its compiled cpu backend" in output
    assert reason in output


@pytest.mark.parametrize(
    ("value", "reason"),
    [("1", "drift_kernels._cuda was asked for: "), ("yes", "DRIFT_KERNELS_CUDA must be 0 or 1, got 'yes'")],
)
def test_cuda_that_is_asked_for_and_cannot_be_built_is_an_error(tmp_path: Path, value: str, reason: str) -> None:
    env = {**os.environ, "DRIFT_KERNELS_CUDA": value, "CXX": shutil.which("false") or "/bin/false"}
    with pytest.raises(AssertionError, match=reason):
        build_wheel(tmp_path, env)

"""The package: what it imports, and the sizes and names of its files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import drift_kernels

ROOT = Path(__file__).parents[1]
SOURCES = {".py", ".h", ".inc", ".cpp", ".cu", ".cuh"}

PACKAGE = ROOT / "drift_kernels"

# The layers of the package, lowest first, then those inside each folder: a module imports only from lower layers.
# (`_cpu` and `_cuda` are the compiled extensions.)
FLOORS = {
    "": [
        {"errors", "messages", "torch_private", "schedule", "deprecation", "terminal", "version", "_cpu", "_cuda"},
        {"formats", "reinstalling"},
        {"sharding"},
        {"kernels", "state"},
        {"prior", "ops"},
        {"adapters"},
        {"engine"},
        {"optimizer", "gradients", "footprint"},
        {"cli", "integrations"},
        {"__init__"},
    ],
    "formats": [{"rounding", "philox"}, {"blocks"}],
    "kernels": [
        {"operands", "scalings", "counts"}, {"plan", "coefficients"}, {"filling"}, {"layout", "reference"},
        {"cpu", "cuda", "triton", "describe"}, {"backends"},
    ],
    "kernels/triton": [
        {"jit"}, {"layout"}, {"access", "random"}, {"codes"}, {"update", "sums", "bias"}, {"backend"},
    ],
    "state": [{"param_groups", "precision"}, {"masters", "arrangement", "live"}, {"state_dict"}],
    "prior": [
        {"names", "norms", "threads", "verification"}, {"foreign", "quantized"}, {"low_rank"},
        {"deltas", "reading", "record", "fusion"}, {"files"},
        {"adapted", "arithmetic", "ranges", "scaled", "singular", "stored", "views", "writing"},
        {"partial"}, {"checkpoint", "hub", "peft_adapter"}, {"encodings", "in_memory", "opening"},
        {"alignment", "assembly", "coverage", "fingerprint", "forms", "plausible", "strengths", "unfusing"},
        {"pairing"}, {"folders", "prior", "shards", "stream"}, {"converted", "formed", "init_lora", "runs", "summary"},
        {"build", "merging", "plot"}, {"apply", "combine"}, {"__init__"},
    ],
    "adapters": [{"projection"}, {"adapter"}, {"__init__"}],
    "engine": [
        {"seen", "hyperparameters", "reach", "lookalikes", "pinned", "projecting", "anchoring"}, {"binding", "rules"},
        {"launches"},
        {"engine", "figures"}, {"backward"},
    ],
    "cli": [
        {"about", "arguments", "output", "stopping"},
        {"applying", "building", "checking", "combining", "initialising", "inspecting", "sizing"},
        {"__init__"}, {"__main__"},
    ],
    "integrations": [
        {"in_use", "named_groups", "peft", "settings", "authors_keys"}, {"for_model", "step_figures", "training_run"},
        {"lightning", "torchtitan", "transformers"}, {"axolotl", "hooked"}, {"llamafactory", "ms_swift"}, {"__init__"},
    ],
}  # fmt: skip

# File names used twice for two sides of the same thing: steps in the backward pass, and their cost; the layout of rows
# and coefficients, and its names in Triton.
NAMED_TWICE = {"__init__", "__main__", "backward", "layout"}


def modules() -> dict[tuple[str, ...], Path]:
    return {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}


def imports(module: tuple[str, ...], path: Path) -> set[tuple[str, ...]]:
    """The modules of the package that a module imports, anywhere in its file."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = ("drift_kernels", *module)[: 1 + len(module) - node.level] if node.level else ()
            full = (*base, *(node.module.split(".") if node.module else ()))
            found |= {(*full, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
    return {name[1:] for name in found if name[0] == "drift_kernels" and len(name) > 1}


def floor_of(folder: str, name: str) -> int:
    (floor,) = [index for index, names in enumerate(FLOORS[folder]) if name in names] or [None]
    assert floor is not None, f"{folder}/{name} has no floor"
    return floor


def test_nothing_imports_upward() -> None:
    """Neither between folders nor inside one."""
    for module, path in modules().items():
        for imported in imports(module, path):
            shared = 0
            while shared < len(module) - 1 and shared < len(imported) - 1 and module[shared] == imported[shared]:
                shared += 1
            mine, other = module[shared], imported[shared]
            folder = "/".join(module[:shared])
            if (PACKAGE / folder / f"{other}.py").exists() or (PACKAGE / folder / other).is_dir() or other[0] == "_":
                assert floor_of(folder, other) < floor_of(folder, mine), f"{path}: {'.'.join(imported)}"


def test_every_module_has_a_floor() -> None:
    for module in modules():
        for depth, name in enumerate(module):
            if name != "__init__" or not module[:depth] or "__init__" in set().union(*FLOORS["/".join(module[:depth])]):
                floor_of("/".join(module[:depth]), name)


def test_no_two_files_of_one_name_have_different_jobs() -> None:
    names = Counter(path.stem for folder in (PACKAGE, ROOT / "benchmarks") for path in folder.rglob("*.py"))
    assert {name for name, count in names.items() if count > 1} <= NAMED_TWICE


def test_what_is_private_to_torch_is_used_in_one_file() -> None:
    """Attributes of torch's modules and tensors with a leading underscore, and its private modules."""
    private = re.compile(
        r"torch(?:\.\w+)*\._(?!_)\w+|\b_(?:local_tensor|spec|execution_engine|fsdp_flattened|step_supports_amp_scaling)\b"
    )
    used = {path.name for path in modules().values() if private.search(path.read_text())}
    assert used == {"torch_private.py"}


def test_no_file_is_too_long() -> None:
    folders = ("drift_kernels", "csrc", "benchmarks", "tests", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_importing_the_package_imports_no_triton_matplotlib_or_trainer() -> None:
    unwanted = {
        "triton",
        "matplotlib",
        "rich",
        "safetensors",
        "huggingface_hub",
        "transformers",
        "accelerate",
        "lightning",
    }
    code = f"import sys, drift_kernels.integrations; print([m for m in {unwanted} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("before", "after"), [("pass", "INFO"), ("logger.setLevel('ERROR')", "ERROR")])
def test_a_level_set_before_the_import_is_kept(before: str, after: str) -> None:
    code = f"import logging; logger = logging.getLogger('drift_kernels'); {before}; import drift_kernels; "
    code += "print(logging.getLevelName(logger.level))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == after


def test_citation_and_changelog_have_the_version() -> None:
    assert f"\nversion: {drift_kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {drift_kernels.__version__} (" in (ROOT / "CHANGELOG.md").read_text()

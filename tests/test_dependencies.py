"""What the package declares that it needs, what it does without, and the versions that it is run with."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn

import drift_kernels
from drift_kernels import FusedDriftAdamW
from drift_kernels.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Each with who may import it at the top of a module.
DEPENDENCIES = {"torch": "", "numpy": "", "rich": r"terminal\.py|cli/\w+\.py"}

PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"safetensors", "rich", "matplotlib", "huggingface_hub", "transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocked())
import json
import torch
from torch import nn
import drift_kernels
from drift_kernels import FusedDriftAdamW, GradientBias, Prior

"""
STEPS = """
def steps(seed, prior):
    torch.manual_seed(seed)
    params = [("a", nn.Parameter(torch.randn(37, 5))), ("b", nn.Parameter(torch.randn(11)))]
    deltas = {"a": torch.randn(37, 5)} if prior else None
    optimizer = FusedDriftAdamW(params, lr=1e-2, prior=deltas, max_grad_norm=1.0)
    for _ in range(3):
        for _, param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    return [param.tolist() for _, param in params]
"""


def tracked_sources() -> list[Path]:
    folders = ("drift_kernels", "benchmarks", "tests", "examples")
    return [ROOT / "setup.py", *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))]


def test_an_optimizer_needs_torch_and_numpy_alone(seed: int) -> None:
    """In a process where nothing else can be imported: the same bits, with a prior in memory too; and a prior that was
    built is read."""
    prior = ROOT / "tests/data/written_by_0.1.0/prior_bfloat16"
    found = f"steps({seed}, False), steps({seed}, True), len(Prior.open({str(prior)!r}))"
    code = f"{PROGRAM}{STEPS}\nprint(json.dumps([{found}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    plain, biased, deltas = json.loads(done.stdout)
    names: dict = {"torch": torch, "nn": nn, "FusedDriftAdamW": FusedDriftAdamW}
    exec(STEPS, names)
    torch.set_num_threads(1)
    assert plain == names["steps"](seed, False)
    assert biased == names["steps"](seed, True)
    assert plain != biased
    assert deltas > 0


def top_imports(path: Path) -> set[str]:
    """The packages that a module cannot be imported without."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"drift_kernels"}


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    """Trainers are imported by the module of each in integrations/."""
    package = ROOT / "drift_kernels"
    used: set[str] = set()
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        for needed in () if name.startswith("integrations/") else top_imports(path):
            assert re.fullmatch(DEPENDENCIES[needed] or ".*", name), f"{name} imports {needed}"
            used.add(needed)
    assert used == {Requirement(text).name for text in PROJECT["dependencies"]} == set(DEPENDENCIES)


def requirements(*extras: str) -> dict[str, Requirement]:
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in PROJECT["optional-dependencies"][extra])]
    return {found.name: found for found in map(Requirement, texts) if found.name != PROJECT["name"]}


def test_each_floor_is_what_is_pinned() -> None:
    """constraints-oldest.txt pins what `make test-oldest` installs; constraints.txt is within the ranges too."""
    pins = {
        file: dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / file).read_text(), re.MULTILINE))
        for file in ("constraints-oldest.txt", "constraints.txt")
    }
    needed = requirements("plot", "hub", "examples", "test")
    assert set(needed) == set(pins["constraints-oldest.txt"])
    for name, version in pins["constraints-oldest.txt"].items():
        (floor,) = needed[name].specifier
        assert floor.operator == ">="
        assert version.startswith(f"{floor.version}.") or version == floor.version, name
    for name, version in pins["constraints.txt"].items():
        assert requirements(*PROJECT["optional-dependencies"])[name].specifier.contains(version), name


def test_extras_name_only_extras_that_exist() -> None:
    extras = PROJECT["optional-dependencies"]
    for texts in extras.values():
        assert all(Requirement(text).extras <= set(extras) for text in texts if text.startswith(PROJECT["name"]))


def test_every_file_is_python_of_the_oldest_version() -> None:
    oldest = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    for path in tracked_sources():
        ast.parse(path.read_text(), str(path), feature_version=oldest)


def test_the_version_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    """It stands in one file; tests/test_wheels.py compares what is built."""
    assert "version" not in PROJECT
    places = [p for p in tracked_sources() if re.search(r'^__version__ = "', p.read_text(), re.MULTILINE)]
    assert places == [ROOT / "drift_kernels" / "version.py"]
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"drift_kernels {drift_kernels.__version__}", f"torch {torch.__version__}"]
    (backends,) = [line for line in lines if line.startswith("backends on cpu: ")]
    assert backends.endswith("reference")


def test_the_version_tells_what_is_lacking(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from drift_kernels.kernels import cpu

    monkeypatch.setattr(cpu, "_reason", "it was not compiled")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.endswith("\nbackends on cpu: reference\n  without cpu: it was not compiled\n")


def test_a_triton_that_is_too_old_is_not_launched(tmp_path: Path) -> None:
    """torch 2.9 brings such a version."""
    (tmp_path / "triton.py").write_text('__version__ = "3.5.1"\n')
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "import torch; from drift_kernels.kernels import backends\n"
        "print(backends.load('triton').unavailable(torch.device('cuda')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Triton 3.5.1 is too old: its kernels need 3.6 or newer\n"

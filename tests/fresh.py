"""python tests/fresh.py ARCHIVE...: installs each in a fresh environment, away from the repository, and runs the
README's first step there. An sdist is installed without a compiler first; then the command is followed that the package
prints. Needs a network, for torch. `--here`: runs the step alone, in this environment."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ADVICE = "build it with: "

STEP = """
import sys
import torch
import drift_kernels
from drift_kernels.kernels import backends

model = torch.nn.Linear(3, 2)
before = [p.detach().clone() for p in model.parameters()]
{block}
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before))
backend = backends.resolve("auto", torch.device("cpu")).__name__.rpartition(".")[2]
print(drift_kernels.__file__, backend)
assert backend == {backend!r}
assert not {{"rich", "matplotlib", "huggingface_hub", "safetensors"}} & set(sys.modules)
"""


def step(backend: str) -> str:
    """A program: the README's first Python block on a tiny model, by this backend."""
    block = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    return STEP.format(block=block, backend=backend)


def run(python: Path, backend: str, folder: Path) -> str:
    """What the package said on stderr, if the step went well in an empty folder."""
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", step(backend)], cwd=empty, env=env, capture_output=True, text=True)
    print(done.stdout + done.stderr, flush=True)
    done.check_returncode()
    return done.stderr


def check(archive: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv/bin/python"
        install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", archive]
        env = {**os.environ, "PIP_CACHE_DIR": str(folder / "cache"), "DRIFT_KERNELS_CUDA": "0"}
        if archive.suffix == ".whl":
            subprocess.run(install, check=True, env=env, cwd=folder)
        else:
            subprocess.run(install, check=True, env={**env, "CXX": "/bin/false"}, cwd=folder)
            said = run(python, "reference", folder)
            subprocess.run(said.partition(ADVICE)[2].splitlines()[0], shell=True, check=True, env=env, cwd=folder)
        assert "build" not in run(python, "cpu", folder)


if __name__ == "__main__":
    if sys.argv[1:] == ["--here"]:
        with tempfile.TemporaryDirectory() as temporary:
            run(Path(sys.executable), "cpu", Path(temporary))
    for name in sys.argv[1:]:
        if name != "--here":
            print(f"== {name}", flush=True)
            check(Path(name).resolve())

"""Compiles the simulator, and the extension with it in place of the CUDA runtime, and keeps the kernels' PTX."""

from __future__ import annotations

import atexit
import runpy
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Rounding modes are changed, and nothing is contracted.
HOST_FLAGS = "-O2 -fPIC -frounding-math -ffp-contract=off"


@cache
def setup() -> dict[str, Any]:
    """The definitions of setup.py."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def missing() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    found = {"C++ compiler": setup()["cxx_compiler"](), "nvcc": setup()["nvcc"]()}
    return next((f"there is no {name}" for name, path in found.items() if path is None), None)


class Build:
    """A build, which starts at once in the background; `finish` waits for it.

    Args:
        arch: the architecture that the PTX is for, such as "90".
        kernels: the file of this folder with the kernels: "every" or "few".

    Attributes:
        simulator, extension: the libraries.
        ptx: one file per file of kernels.
    """

    def __init__(self, arch: str, kernels: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        device = [HERE / f"{kernels}.cu", *(p for p in (ROOT / "csrc/cuda").glob("*.cu") if p.name != "kernels.cu")]
        self.ptx = [folder / f"{path.stem}.ptx" for path in device]
        self.simulator, self.extension = folder / "libsimulator.so", folder / "_cuda.so"

        cxx, nvcc = setup()["cxx_compiler"](), setup()["nvcc"]()
        target = f"-gencode=arch=compute_{arch},code=compute_{arch}"
        ninja = setup()["ninja_syntax"].Writer((folder / "build.ninja").open("w"), width=1000)
        with ninja.output:
            # --keep: keeps the PTX that the object is made from.
            ninja.rule("device", f"{nvcc} {setup()['CUDA_FLAGS']} {target} --keep --keep-dir=. -c $in -o $out")
            ninja.rule(
                "module",
                f"{nvcc} -std=c++17 -O0 -Xcompiler -fPIC {' '.join(setup()['include_flags']())} -c $in -o $out",
            )
            ninja.rule("cudart", f"{nvcc} -std=c++20 -Xcompiler -fPIC -c $in -o $out")
            ninja.rule("simulator", f"{cxx} -std=c++20 {HOST_FLAGS} -c $in -o $out")
            ninja.rule("link", f"{cxx} -shared $in -o $out")
            rules = {"cudart": "cudart"}  # it includes CUDA's headers
            hosts = [
                out
                for p in HERE.glob("*.cpp")
                for out in ninja.build(f"{p.stem}.o", rules.get(p.stem, "simulator"), str(p))
            ]
            devices = [out for p in device for out in ninja.build(f"{p.stem}.o", "device", str(p))]
            module = ninja.build("module.o", "module", str(ROOT / "csrc/cuda/module.cpp"))
            ninja.build(self.simulator.name, "link", hosts)
            ninja.build(self.extension.name, "link", [*devices, *module])
        command = [str(Path(setup()["BIN_DIR"]) / "ninja"), "-C", str(folder), "-j", "2", "--quiet"]
        self._running = subprocess.Popen(command)
        atexit.register(self._running.kill)

    def finish(self) -> None:
        assert self._running.wait() == 0

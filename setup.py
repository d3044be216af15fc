"""Builds the compiled backends with ninja. Nothing here imports torch: the extensions take raw addresses."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from ninja import BIN_DIR, ninja_syntax
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# Bitwise contract (docs/numerics.md): no contraction into FMA, no fast math. The two -fno flags change no result:
# they let sqrt and selects be vectorised.
CPU_FLAGS = (
    "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall"
)

CPU = Extension(
    "drift_kernels._cpu",
    sources=[
        "csrc/cpu/module.cpp",
        "csrc/cpu/kernels_avx512.cpp",
        "csrc/cpu/kernels_avx2.cpp",
        "csrc/cpu/kernels_baseline.cpp",
    ],
    optional=True,
    depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.[hi]*"))],
)


def cxx_compiler() -> str | None:
    """The C++ compiler: $CXX, else the first that is found."""
    if "CXX" in os.environ:
        return os.environ["CXX"]
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


class NinjaBuildExt(build_ext):
    """build_ext through ninja: parallel, incremental, and optional where there is no compiler."""

    def build_extension(self, ext: Extension) -> None:
        compiler = cxx_compiler()
        if compiler is None:
            self.warn_pure_python("no C++ compiler was found (set CXX or install g++ or clang++)")
            return
        build_dir = Path(self.build_temp).resolve() / ext.name
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with (build_dir / "build.ninja").open("w") as file:
            self.write_ninja(ninja_syntax.Writer(file, width=120), ext, compiler, target)
        try:
            subprocess.run([str(Path(BIN_DIR) / "ninja"), "-C", str(build_dir)], check=True)
        except subprocess.CalledProcessError as error:
            self.warn_pure_python(f"{compiler} failed with exit status {error.returncode}; its messages are above")

    def write_ninja(self, ninja: ninja_syntax.Writer, ext: Extension, compiler: str, target: Path) -> None:
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        ninja.variable("cxx", compiler)
        ninja.variable("cflags", [CPU_FLAGS, *(f"-isystem {shlex.quote(path)}" for path in includes)])
        ninja.rule("compile", "$cxx $cflags -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
        ninja.rule("link", f"$cxx -shared -fopenmp {undefined} $in -o $out")
        objects = []
        for source in ext.sources:
            objects += ninja.build(f"{Path(source).stem}.o", "compile", str(ROOT / source))
        ninja.build(str(target), "link", objects)
        ninja.default(str(target))

    def warn_pure_python(self, reason: str) -> None:
        self.warn(
            f"drift_kernels is installed WITHOUT its compiled cpu backend: {reason}. "
            "CPU tensors will use the slower `reference` backend."
        )


setup(ext_modules=[CPU], cmdclass={"build_ext": NinjaBuildExt})

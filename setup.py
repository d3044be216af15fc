"""Builds the compiled backends with ninja. Nothing here imports torch: the extensions take raw addresses.

The CPU kernels are built if there is a C++ compiler, the CUDA kernels if there is nvcc (CUDA_HOME, PATH). Environment
variables:

    DRIFT_KERNELS_CPU=0 or 1       leave the CPU kernels out, or fail if they cannot be built
    DRIFT_KERNELS_CUDA=0 or 1      likewise for the CUDA kernels
    DRIFT_KERNELS_CUDA_ARCHS=80;90 the architectures to compile for, and PTX of the last (default: see CUDA_ARCHS)
    CXX                            the C++ compiler

A wheel without compiled extensions is tagged py3-none-any, which is what it is. pip keeps a wheel that it built from an
sdist or a commit, under the address of the source and whatever the environment was, and installs it again when there is
a compiler at last; no hook of a build is called then. A failing build instead would leave those without a compiler with
nothing, and a tag that pip cannot find again would be a lie. So the package says at run time what it lacks, with a
command that passes by pip's cache and fails if the extension still cannot be built (drift_kernels/reinstalling.py).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from ninja import BIN_DIR, ninja_syntax
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# Bitwise contract (docs/numerics.md): no contraction into FMA, no fast math. The two -fno flags change no result:
# they let sqrt and selects be vectorised.
CPU_FLAGS = (
    "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall"
)
# Division, square root and denormals are IEEE's by default.
CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -fmad=false --threads 0"
# Our cudart is ours alone: its symbols must not be taken for those of the one that torch has loaded.
CUDA_LINK_FLAGS = "-shared --no-device-link -cudart static -Xlinker --exclude-libs=ALL"

CUDA_ARCHS = ("80", "89", "90", "100", "120")  # of these, what nvcc knows

HEADERS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.[hi]*"))]
CPU = Extension(
    "drift_kernels._cpu",
    sources=[
        "csrc/cpu/module.cpp",
        "csrc/cpu/kernels_avx512.cpp",
        "csrc/cpu/kernels_avx2.cpp",
        "csrc/cpu/kernels_baseline.cpp",
    ],
    optional=os.environ.get("DRIFT_KERNELS_CPU") != "1",
    depends=HEADERS,
)
CUDA = Extension(
    "drift_kernels._cuda",
    sources=["csrc/cuda/kernels.cu", "csrc/cuda/coefficients.cu", "csrc/cuda/module.cpp"],
    optional=os.environ.get("DRIFT_KERNELS_CUDA") != "1",
    depends=HEADERS,
)


def cxx_compiler() -> str | None:
    """The C++ compiler: $CXX, else the first that is found."""
    if "CXX" in os.environ:
        return os.environ["CXX"]
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def nvcc() -> str | None:
    """CUDA's compiler: of $CUDA_HOME, else the one on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (home and shutil.which("nvcc", path=str(Path(home) / "bin"))) or shutil.which("nvcc")


def ninja_program() -> str:
    """The ninja on PATH, else that of the ninja package.

    In pip's isolated build its own ninja is first on PATH. There BIN_DIR may be the folder of another ninja in the
    environment: the console script of an old version (1.11), which would then start itself without end.
    """
    return shutil.which("ninja") or str(Path(BIN_DIR) / "ninja")


def cuda_targets(compiler: str) -> list[str]:
    """nvcc's -gencode flags: machine code for each architecture, and PTX of the last for those to come."""
    chosen = re.findall(r"\w+", os.environ.get("DRIFT_KERNELS_CUDA_ARCHS", ""))
    if not chosen:
        listed = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        chosen = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in listed]
    codes = {arch: [f"sm_{arch}"] for arch in chosen}
    if chosen:
        codes[chosen[-1]].append(f"compute_{chosen[-1]}")
    return [f"-gencode=arch=compute_{arch},code=[{','.join(code)}]" for arch, code in codes.items()]


class BuildError(Exception):
    """Why an extension was not built."""


class NinjaBuildExt(build_ext):
    """build_ext through ninja: parallel, incremental, and without an optional extension that cannot be built."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.built: set[str] = set()

    def run(self) -> None:
        super().run()
        self.remove_earlier()  # from the sources, if built in place

    def build_extensions(self) -> None:
        super().build_extensions()
        self.remove_earlier()

    def remove_earlier(self) -> None:
        """What an earlier build has left there of an extension that was not built now."""
        for ext in (CPU, CUDA):
            if ext.name not in self.built:
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_with_ninja(ext)
            self.built.add(ext.name)
        except BuildError as error:
            if not ext.optional:
                raise BuildError(f"{ext.name} was asked for: {error}") from None
            without, instead = WITHOUT[ext.name]
            self.warn(f"drift_kernels is installed WITHOUT its compiled {without} backend: {error}. {instead}")

    def build_with_ninja(self, ext: Extension) -> None:
        build_dir = Path(self.build_temp).resolve() / ext.name
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with (build_dir / "build.ninja").open("w") as file:
            ninja = ninja_syntax.Writer(file, width=120)
            self.write_cuda_rules(ninja) if ext is CUDA else self.write_cpu_rules(ninja)
            objects = []
            for source in ext.sources:
                objects += ninja.build(f"{Path(source).stem}.o", "compile", str(ROOT / source))
            ninja.build(str(target), "link", objects)
            ninja.default(str(target))
        try:
            subprocess.run([ninja_program(), "-C", str(build_dir)], check=True)
        except subprocess.CalledProcessError as error:
            raise BuildError(
                f"its compilation failed with exit status {error.returncode}; the compiler's messages are above"
            ) from None

    def write_cpu_rules(self, ninja: ninja_syntax.Writer) -> None:
        compiler = cxx_compiler()
        if compiler is None:
            raise BuildError("no C++ compiler was found (set CXX or install g++ or clang++)")
        ninja.variable("cxx", compiler)
        ninja.variable("cflags", [CPU_FLAGS, *include_flags()])
        ninja.rule("compile", "$cxx $cflags -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
        ninja.rule("link", f"$cxx -shared -fopenmp {undefined} $in -o $out")

    def write_cuda_rules(self, ninja: ninja_syntax.Writer) -> None:
        compiler = nvcc()
        if compiler is None:
            raise BuildError("no nvcc was found (set CUDA_HOME, or put it on PATH)")
        host = [f"-ccbin {shlex.quote(os.environ['CXX'])}"] if "CXX" in os.environ else []
        ninja.variable("nvcc", [compiler, *host])
        ninja.variable("cflags", [CUDA_FLAGS, *cuda_targets(compiler), *include_flags()])
        ninja.rule("compile", "$nvcc $cflags -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        ninja.rule("link", f"$nvcc {CUDA_LINK_FLAGS} $in -o $out")


class TaggedWheel(bdist_wheel):
    """bdist_wheel, whose tag names this Python and platform only if an extension was built."""

    def run(self) -> None:
        self.run_command("build_ext")
        if not self.get_finalized_command("build_ext").built:
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


WITHOUT = {
    CPU.name: ("cpu", "CPU tensors will use the slower `reference` backend."),
    CUDA.name: ("cuda", "CUDA tensors will use the `triton` backend where Triton is installed."),
}


def include_flags() -> list[str]:
    paths = [pybind11.get_include(), sysconfig.get_path("include")]
    return [f"-isystem {shlex.quote(path)}" for path in paths]


def wanted(variable: str, default: bool) -> bool:
    value = os.environ.get(variable, str(int(default)))
    if value not in ("0", "1"):
        raise SystemExit(f"{variable} must be 0 or 1, got {value!r}")
    return value == "1"


def extensions() -> list[Extension]:
    """CUDA where it is asked for, or may be and there is an nvcc."""
    return [CPU] * wanted("DRIFT_KERNELS_CPU", True) + [CUDA] * wanted("DRIFT_KERNELS_CUDA", nvcc() is not None)


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuildExt, "bdist_wheel": TaggedWheel})

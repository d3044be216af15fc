"""Wheels and the sdist: what is in them, how they are tagged, and what pip makes of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import fresh
import grid
import pytest
from ninja import BIN_DIR

import drift_kernels

ROOT = Path(__file__).parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
NO_COMPILER = shutil.which("false") or "/bin/false"

# What serves the repository's hosting.
NOT_IN_THE_SDIST = re.compile(r"\.ci/|\.github/|\.gitignore$")
MADE_WITH_THE_SDIST = re.compile(r"PKG-INFO$|setup\.cfg$|drift_kernels\.egg-info/")

# Writes what it is asked for, at once.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in
    -o) echo > "$2"; echo "$2:" > "$2.d"; shift ;;
    --list-gpu-arch) echo compute_90 ;;
  esac
  shift
done
"""


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources, as a checkout has them, in which nothing was built."""
    keep = shutil.ignore_patterns(
        ".?env*",
        ".venv*",
        ".git",
        ".*_cache",
        ".hypothesis",
        "build",
        "dist",
        "*.so",
        "*.egg-info",
        "runs",
        "__pycache__",
    )
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=keep))


def environment(**changes: str) -> dict[str, str]:
    ours = re.compile(r"CXX|CUDA_HOME|CUDA_PATH|PYTHONPATH|DRIFT_KERNELS_\w+")
    return {**{name: value for name, value in os.environ.items() if not ours.fullmatch(name)}, **changes}


def pip_wheel(source: Path, env: dict[str, str]) -> tuple[Path, str]:
    """A wheel, and what its build said."""
    options = ("-v", "--no-deps", "--no-build-isolation", "-w", str(source.parent))
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=source.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = source.parent.glob("*.whl")
    return wheel, done.stdout + done.stderr


def extensions(wheel: Path) -> set[str]:
    names = zipfile.ZipFile(wheel).namelist()
    assert "drift_kernels/kernels/reference.py" in names
    return {name for name in names if name.endswith((".so", ".pyd"))}


def about(wheel: Path) -> str:
    """Its file WHEEL."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/WHEEL")]
        return file.read(name).decode()


def fake_compilers(folder: Path) -> dict[str, str]:
    """The environment in which a C++ compiler and nvcc are found that compile nothing."""
    for name in ("c++", "cuda/bin/nvcc"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(COMPILER)
        path.chmod(0o755)
    return {"CXX": str(folder / "c++"), "CUDA_HOME": str(folder / "cuda")}


@pytest.mark.parametrize("reason", ["no C++ compiler was found", "failed with exit status"])
def test_without_a_compiler_it_builds_and_says_so(checkout: Path, tmp_path: Path, reason: str) -> None:
    """The wheel is for every platform, and has nothing of earlier builds."""
    env = environment(PATH=str(tmp_path)) if "found" in reason else environment(CXX=NO_COMPILER)
    platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for earlier in (checkout / "drift_kernels", checkout / f"build/lib.{platform}/drift_kernels"):
        earlier.mkdir(parents=True, exist_ok=True)
        for name in ("_cpu", "_cuda"):
            (earlier / f"{name}{SUFFIX}").touch()
    wheel, said = pip_wheel(checkout, env | {"DRIFT_KERNELS_CUDA": "0"})
    assert wheel.name == f"drift_kernels-{drift_kernels.__version__}-py3-none-any.whl"
    assert "Root-Is-Purelib: true" in about(wheel)
    assert not extensions(wheel)
    assert "WITHOUT its compiled cpu backend" in said
    assert reason in said


def test_the_ninja_on_path_builds(checkout: Path, tmp_path: Path) -> None:
    """Which pip's isolated build puts there; the ninja package may name the script of another one."""
    compilers = fake_compilers(tmp_path / "bin")
    ninja = tmp_path / "bin" / "ninja"
    ninja.write_text(f'#!/bin/sh\ntouch {tmp_path}/was_used\nexec {Path(BIN_DIR) / "ninja"} "$@"\n')
    ninja.chmod(0o755)
    path = os.pathsep.join((str(ninja.parent), os.environ["PATH"]))
    wheel, _ = pip_wheel(checkout, environment(**compilers, PATH=path, DRIFT_KERNELS_CUDA="0"))
    assert extensions(wheel) == {f"drift_kernels/_cpu{SUFFIX}"}
    assert (tmp_path / "was_used").exists()


@pytest.mark.parametrize(("cuda", "names"), [("1", {"_cpu", "_cuda"}), ("0", {"_cpu"})])
def test_with_compilers_it_has_the_extensions(checkout: Path, tmp_path: Path, cuda: str, names: set[str]) -> None:
    wheel, said = pip_wheel(checkout, environment(**fake_compilers(tmp_path / "bin"), DRIFT_KERNELS_CUDA=cuda))
    assert extensions(wheel) == {f"drift_kernels/{name}{SUFFIX}" for name in names}
    assert re.fullmatch(
        rf"drift_kernels-[^-]+-cp(3\d+)-cp\1\w*-{sysconfig.get_platform().split('-')[0]}_\w+\.whl", wheel.name
    )
    assert "Root-Is-Purelib: false" in about(wheel)
    assert "WITHOUT" not in said


def test_in_place_nothing_of_an_earlier_build_is_left(checkout: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    compilers = fake_compilers(tmp_path / "bin")
    for env, names in ((compilers, ["_cpu", "_cuda"]), ({"CXX": NO_COMPILER, "DRIFT_KERNELS_CUDA": "0"}, [])):
        subprocess.run(command, cwd=checkout, env=environment(**env), check=True, capture_output=True)
        assert sorted(path.name for path in (checkout / "drift_kernels").glob("*.so")) == [
            name + SUFFIX for name in names
        ]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"DRIFT_KERNELS_CUDA": "1"}, "drift_kernels._cuda was asked for: "),
        ({"DRIFT_KERNELS_CUDA": "yes"}, "DRIFT_KERNELS_CUDA must be 0 or 1, got 'yes'"),
        ({"DRIFT_KERNELS_CPU": "1", "DRIFT_KERNELS_CUDA": "0"}, "drift_kernels._cpu was asked for: "),
        ({"DRIFT_KERNELS_CPU": "2"}, "DRIFT_KERNELS_CPU must be 0 or 1, got '2'"),
    ],
)
def test_what_is_asked_for_and_cannot_be_built_is_an_error(checkout: Path, asked: dict[str, str], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        pip_wheel(checkout, environment(CXX=NO_COMPILER, **asked))


def build_sdist(checkout: Path) -> Path:
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(checkout.parent)]
    done = subprocess.run(command, cwd=checkout, env=environment(CXX=NO_COMPILER), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return checkout.parent / done.stdout.splitlines()[-1]


def test_the_sdist_has_every_tracked_file(tracked: list[str], tmp_path: Path) -> None:
    """And no other, though some lie beside them."""
    source = tmp_path / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for name in (f"drift_kernels/_cpu{SUFFIX}", "tests/__pycache__/a.cpython-311.pyc", "csrc/cpu/module.o"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    sdist = build_sdist(source)
    top = f"drift_kernels-{drift_kernels.__version__}"
    assert sdist.name == f"{top}.tar.gz"
    with tarfile.open(sdist) as file:
        names = {member.name.removeprefix(f"{top}/") for member in file if member.isfile()}
        about = file.extractfile(f"{top}/PKG-INFO")
        assert about is not None
        assert f"\nVersion: {drift_kernels.__version__}\n" in about.read().decode()
    assert {name for name in set(tracked) - names if not NOT_IN_THE_SDIST.match(name)} == set()
    assert {name for name in names - set(tracked) if not MADE_WITH_THE_SDIST.match(name)} == set()


def fresh_environment(folder: Path) -> Path:
    """The Python of an environment that has what this one has, but for drift_kernels."""
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            if not entry.name.startswith(("drift_kernels", "__editable__")) and entry.suffix != ".pth":
                (borrowed / entry.name).symlink_to(entry)
    venv.create(folder / "venv")
    (site,) = (folder / "venv").glob("lib/python3.*/site-packages")
    (site / "borrowed.pth").write_text(str(borrowed))
    return folder / "venv/bin/python"


@pytest.mark.skipif(grid.COMPILER is None, reason="there is no C++ compiler")
def test_the_printed_command_passes_by_what_pip_keeps(checkout: Path, tmp_path: Path) -> None:
    """An sdist is installed without a compiler, then with one, as pip does it (the wheel that it kept), then by the
    command that the package prints."""
    links = tmp_path / "links"
    links.mkdir()
    shutil.move(build_sdist(checkout), links)
    python = fresh_environment(tmp_path)
    quick = tmp_path / "quick"  # optimises nothing: the test is not about speed
    quick.write_text(f'#!/bin/sh\nexec {grid.COMPILER} "$@" -O0\n')
    quick.chmod(0o755)
    env = environment(
        CXX=str(quick),
        DRIFT_KERNELS_CUDA="0",
        PIP_CACHE_DIR=str(tmp_path / "cache"),
        PIP_FIND_LINKS=str(links),
        PIP_NO_INDEX="1",
        PIP_NO_BUILD_ISOLATION="0",  # pip's word for "do without": there is no network
    )
    reinstall = [python, "-m", "pip", "install", "--no-deps", "--force-reinstall", "drift_kernels"]
    for compiler in (NO_COMPILER, str(quick)):
        subprocess.run(reinstall, env={**env, "CXX": compiler}, cwd=tmp_path, check=True, capture_output=True)
        said = fresh.run(python, "reference", tmp_path)
    command = said.partition(fresh.ADVICE)[2].splitlines()[0]
    wanted = {**env, "CXX": NO_COMPILER}
    refused = subprocess.run(command, shell=True, env=wanted, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "drift_kernels._cpu was asked for" in refused.stdout + refused.stderr
    fresh.run(python, "reference", tmp_path)  # what was there still is
    subprocess.run(command, shell=True, env=env, cwd=tmp_path, check=True, capture_output=True)
    assert fresh.ADVICE not in fresh.run(python, "cpu", tmp_path)

"""The layout of rows, coefficients, chunks and blocks: one on all sides; what was built for another is refused."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import background
import grid
import pybind11
import pytest
import torch
from background import Product
from torch import nn

import drift_kernels
from drift_kernels import BackendUnavailableError, FusedDriftAdamW
from drift_kernels.formats import philox
from drift_kernels.kernels import backends, cpu, cuda
from drift_kernels.kernels.coefficients import Coefficients
from drift_kernels.kernels.layout import LAYOUT, mismatch
from drift_kernels.kernels.plan import CHUNK, ROW_FIELDS
from drift_kernels.kernels.triton import layout as of_triton
from drift_kernels.prior import BLOCK, arithmetic
from drift_kernels.reinstalling import reinstall_command

ROOT = Path(__file__).parents[1]


# Every side has the same


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_the_extensions_were_built_for_it(name: str) -> None:
    extension = pytest.importorskip(f"drift_kernels.{name}")
    assert extension.LAYOUT == LAYOUT
    assert mismatch(extension, name.removeprefix("_")) is None


@pytest.mark.skipif(grid.COMPILER is None, reason="there is no C++ compiler")
def test_the_kernels_on_the_host_are_held_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    grid._library()
    monkeypatch.setitem(LAYOUT, "chunk", CHUNK // 2)
    with pytest.raises(AssertionError, match=f"chunk: expected {CHUNK // 2}, the extension has {CHUNK}"):
        grid._library.__wrapped__()


def test_triton_finds_columns_by_their_names() -> None:
    def value(name: str) -> int:
        constant = getattr(of_triton, name)
        return getattr(constant, "value", constant)  # a number where Triton is not installed

    assert [value(name.upper()) for name in ROW_FIELDS] == list(range(len(ROW_FIELDS)))
    assert [value(name.upper()) for name in Coefficients._fields] == list(range(len(Coefficients._fields)))
    assert (value("ROW"), value("COEFFICIENTS")) == (len(ROW_FIELDS), len(Coefficients._fields))
    assert value("SCALE_BLOCK") == BLOCK
    for name in ("PARAM", "EXP_AVG", "EXP_AVG_SQ"):
        assert value(f"{name}_STREAM") == getattr(philox, name)


# Another is refused


def renamed(names: tuple[str, ...]) -> tuple[str, ...]:
    return ("other", *names[1:])


def missing(names: tuple[str, ...]) -> tuple[str, ...]:
    return names[:3] + names[4:]


def swapped(names: tuple[str, ...]) -> tuple[str, ...]:
    return (*names[:-2], names[-1], names[-2])


OTHERS = {
    **{
        f"{part}, one {change.__name__}": {**LAYOUT, part: change(LAYOUT[part])}
        for part in ("row", "coefficients")
        for change in (renamed, missing, swapped)
    },
    "chunk": {**LAYOUT, "chunk": CHUNK // 2},
    "block": {**LAYOUT, "block": BLOCK * 2},
    "more": {**LAYOUT, "rounds": 7},
    "less": {part: value for part, value in LAYOUT.items() if part != "coefficients"},
    "none": None,
}


def text(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


@pytest.fixture(params=OTHERS)
def other(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The extensions of both backends, as if they had another layout. They have nothing that could be launched."""
    layout = OTHERS[request.param]
    built = {"CHUNK": CHUNK} if layout is None else {"LAYOUT": layout}  # older ones said no more than that
    extension = SimpleNamespace(__file__="/old/extension.so", **built)
    for backend, name in ((cpu, "_cpu"), (cuda, "_cuda")):
        monkeypatch.setattr(backend, name, extension, raising=False)
        monkeypatch.setattr(backend, "_reason", None)
    backends.resolve.cache_clear()
    yield layout
    backends.resolve.cache_clear()


def assert_says_both(reason: str, layout: dict[str, Any] | None, backend: str = "cpu") -> None:
    assert "its compiled extension (/old/extension.so) was built " in reason
    assert reason.endswith(f"; rebuild it with: {reinstall_command(backend)}")
    assert ("older sources, which do not export their layout" in reason) == (layout is None)
    built = layout or {}
    for part in {**LAYOUT, **built}:
        here, there = text(LAYOUT.get(part, "nothing")), text(built.get(part, "nothing"))
        difference = f"{part}: expected {here}, the extension has {there}"
        assert (difference in reason) == (here != there)


def weights(backend: str) -> list[torch.Tensor]:
    """After three steps with a prior."""
    torch.manual_seed(5)
    params = [("w", nn.Parameter(torch.randn(300, 3))), ("b", nn.Parameter(torch.randn(7)))]
    optimizer = FusedDriftAdamW(params, prior={"w": torch.randn(300, 3)}, alpha=0.1, backend=backend)
    for _ in range(3):
        for _, p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return [p.detach() for _, p in params]


def test_a_backend_of_another_layout_is_unavailable(other: dict[str, Any] | None) -> None:
    for name in ("cpu", "cuda"):
        reason = backends.load(name).unavailable(torch.device(name))
        assert reason is not None
        assert_says_both(reason, other, name)


def test_an_optimizer_that_asks_for_it_raises_and_auto_goes_on(
    other: dict[str, Any] | None, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BackendUnavailableError) as raised:
        weights("cpu")
    assert_says_both(str(raised.value), other)
    with caplog.at_level(logging.WARNING, "drift_kernels"):
        found = weights("auto"), weights("auto")
    (record,) = caplog.records
    assert record.getMessage().startswith("backend='auto' falls back to 'reference' on cpu: 'cpu' is unavailable: its")
    assert_says_both(record.getMessage(), other)
    for each in found:
        assert all(map(torch.equal, each, weights("reference")))


# In a process of its own: an extension that was really built for another layout would read past the end of the rows.
PROGRAM = """
import json
import torch
from torch import nn
import drift_kernels
from drift_kernels.kernels import backends
from drift_kernels.prior import arithmetic

def weights(backend):
    torch.manual_seed(5)
    param = nn.Parameter(torch.randn(300))
    optimizer = drift_kernels.FusedDriftAdamW([param], backend=backend)
    param.grad = torch.randn(300)
    optimizer.step()
    return param.tolist()

from drift_kernels import _cpu
assert "extra" in _cpu.LAYOUT["row"]
try:
    weights("cpu")
except drift_kernels.BackendUnavailableError as error:
    refused = str(error)
checksum = arithmetic.checksum(torch.arange(5000.0)).hex()
same = weights("auto") == weights("reference")
print(json.dumps([drift_kernels.__file__, refused, same, arithmetic._compiled, checksum]))
"""


def objects() -> list[Product]:
    """Compiled sources in which a row has one field more: the baseline's kernels alone."""
    flags = [
        *("-std=c++17", "-O0", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
        *(f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))),
    ]
    changed = background.folder() / "csrc"
    if not changed.exists():
        copy = Path(tempfile.mkdtemp(dir=background.folder()), "csrc")
        shutil.copytree(ROOT / "csrc", copy)
        replace(copy / "table.h", "  FIELD(int64_t, numel) ", "  FIELD(uint64_t, extra) FIELD(int64_t, numel) ")
        replace(copy / "cpu/module.cpp", "#if defined(__x86_64__)", "#if 0")
        with suppress(OSError):  # another worker was first
            copy.rename(changed)
    return [
        Product(f"{name}.o", [str(grid.COMPILER), *flags, "-c", changed / f"cpu/{name}.cpp", "-o", background.OUT])
        for name in ("module", "kernels_baseline")
    ]


def begin() -> None:
    if grid.COMPILER is not None:
        for product in objects():
            product.begin()


@pytest.mark.skipif(grid.COMPILER is None, reason="there is no C++ compiler")
def test_an_extension_that_was_really_built_for_another_is_refused(tmp_path: Path) -> None:
    """The package beside such an extension. A build of a prior, whose functions know no layout, does without it too:
    they are of other sources."""
    package = tmp_path / "drift_kernels"
    shutil.copytree(ROOT / "drift_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    extension = package / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    linked = [grid.COMPILER, "-shared", "-fopenmp", *(product.path() for product in objects()), "-o", extension]
    subprocess.run([str(word) for word in linked], check=True)

    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where, refused, same, compiled, checksum = json.loads(done.stdout)
    assert Path(where).parent == package
    there = " ".join((*ROW_FIELDS[:8], "extra", *ROW_FIELDS[8:]))
    assert refused == (
        f"no backend for tensors on cpu: 'cpu' is unavailable: its compiled extension ({extension}) was built for "
        f"a different layout (row: expected {text(ROW_FIELDS)}, the extension has {there}); rebuild it with: "
        f"DRIFT_KERNELS_CPU=1 {sys.executable} -m pip install --no-cache-dir --force-reinstall --no-deps "
        f"--no-binary drift_kernels drift_kernels=={drift_kernels.__version__}"
    )
    assert same
    assert done.stderr.count("backend='auto' falls back to 'reference'") == 1
    assert not compiled
    assert checksum == arithmetic.checksum(torch.arange(5000.0)).hex()


def replace(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))

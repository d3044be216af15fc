"""The cuda backend: its machine code, for GPUs that need not be present, and what test_parity.py does not cover."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import contraction
import grid
import pytest
import torch
from background import Product
from problems import BF16, DEVICE, F32, GRID, Problem, assert_same_bits, coefficients, run, tensors_of

from benchmarks.gpu import disassembly
from benchmarks.gpu.disassembly import demangled
from benchmarks.gpu.sheet.kinds import SIZES
from drift_kernels.kernels import backends
from drift_kernels.kernels import cuda as backend
from drift_kernels.kernels.plan import CHUNK

# The kernels run on a GPU, or on the host, thread by thread.
NAME = "cuda" if DEVICE.type == "cuda" else GRID
THREADS, TURN, MAX_ROWS = 256, 8, 4080  # kThreads, kUpdateTurn and kMaxRows in csrc/cuda

# For each architecture, by kernel, such as "update<bfloat16, bfloat16, float, Nothing>".
Kernels = dict[str, dict[str, Any]]


def built() -> Path | str:
    """The extension, or why its machine code cannot be read."""
    found = disassembly.built()
    if found is None:
        return "drift_kernels._cuda was not built: there is no nvcc"
    return disassembly.missing() or found


@cache
def listings() -> dict[str, Product]:
    """The output of benchmarks/gpu/disassembly.py for every architecture."""
    found = built()
    if isinstance(found, str):
        return {}
    archs = disassembly.architectures(found)
    return {arch: Product(f"{arch}.json", [sys.executable, disassembly.__file__, found, arch]) for arch in archs}


def begin() -> None:
    grid.begin()
    for product in listings().values():
        product.begin()


@pytest.fixture(scope="module")
def extension() -> Path:
    """The built extension, for all its architectures."""
    found = built()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module")
def by_arch(extension: Path) -> dict[str, Kernels]:
    found = {arch: json.loads(product.path().read_text()) for arch, product in listings().items()}
    return {arch: dict(zip(demangled(list(of)), of.values(), strict=True)) for arch, of in found.items()}


def each(by_arch: dict[str, Kernels], kernel: str) -> Iterator[tuple[str, list[int], Counter[str]]]:
    """For each architecture and combination of dtypes: its name, the sizes of the dtypes, the opcodes."""
    for arch, kernels in by_arch.items():
        for name, facts in kernels.items():
            if name.startswith(kernel):
                dtypes = name.partition("<")[2].rstrip(">").split(", ")
                yield f"{arch} {name}", [SIZES[dtype] for dtype in dtypes], facts["sass"]


def accesses(sass: Counter[str], kind: str) -> dict[str, int]:
    """The count of streamed global accesses (evict first) by width: {".128": 3, "": 4, ".U16": 8}."""
    return {opcode.removeprefix(f"{kind}.E.EF"): n for opcode, n in sass.items() if opcode.startswith(f"{kind}.E.EF")}


def test_it_was_built_for_what_people_have_and_for_what_will_come(
    extension: Path, by_arch: dict[str, Kernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    archs = [int(arch.removeprefix("sm_")) for arch in by_arch]
    if DEVICE.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        assert 10 * major + minor in archs
    else:
        assert set(archs) >= {80, 89, 90, 100, 120}
    assert f"sm_{max(archs)}.ptx" in disassembly.run("-lptx", extension)


def test_every_combination_of_dtypes_has_a_kernel(by_arch: dict[str, Kernels]) -> None:
    for arch, kernels in by_arch.items():
        kinds = Counter(name.partition("<")[0] for name in kernels)
        # Types of (gradients, states, deltas) for float; float16; bfloat16 to nearest and stochastic; masters.
        updates = 1 * 3 * 3 + 2 * 2 * 3 + 2 * (2 * 3 * 5) + 2 * 4 * 5
        assert kinds == {"update": updates, "sum": 2 * 5 + 3, "bias": 2 * 4 + 2, "fill": 2}, arch


def expected_accesses(arch: str, sizes: list[int], turn: int, single: int, copies: int = 1) -> Counter[str]:
    """The accesses of a turn, as wide as possible, `copies` times in the code, and of `single` elements one by one."""
    widths = {32: ".ENL2.256", 16: ".128", 8: ".64", 4: "", 2: ".U16", 1: ".U8"}
    expected: Counter[str] = Counter()
    for size in filter(None, sizes):
        widest = 32 if size == 4 and arch in ("sm_100", "sm_120") else 16
        wide = min(widest, size * turn)
        expected[widths[wide]] += size * turn // wide * copies
        expected[widths[size]] += single
    return +expected


def test_an_update_moves_as_much_at_a_time_as_can_be_or_one_element(by_arch: dict[str, Kernels]) -> None:
    """Eight elements per turn if tensors are aligned, else four, two with masters or random bits (eight if the states
    are codes). The code stores a turn in two places: with the quick root and quotient, and without."""
    for name, (param, grad, state, delta), sass in each(by_arch, "update"):
        arch = name.partition(" ")[0]
        single = TURN if state == 1 else 2 if "stochastic" in name or "master" in name else 4
        residual = [2] if "master" in name else []
        loads, stores = accesses(sass, "LDG"), accesses(sass, "STG")
        expected = expected_accesses(arch, [param, grad, state, state, delta, *residual], TURN, single)
        if 1 in (state, delta):  # with scales
            assert loads.pop("", 0) > expected.pop("", 0), name
        assert loads == expected, name
        for copies in (1, 2):  # a compiler may join the ends of both
            expected = expected_accesses(arch, [param, *residual], TURN, single, copies)
            expected += expected_accesses(arch, [state, state], TURN, single, 1 if state == 1 else copies)
            if state == 1:
                expected[""] += 4
            if stores == expected:
                break
        assert stores == expected, name


def test_grad_stats_reads_as_much_at_a_time_as_can_be_or_one_element(by_arch: dict[str, Kernels]) -> None:
    """64 bytes per turn, the first before the loop; eight elements elsewhere."""
    for name, sizes, sass in each(by_arch, "sum"):
        turn = next(turn for turn in (32, 16, 8) if turn * sum(sizes) <= 64)
        found, expected = accesses(sass, "LDG"), expected_accesses(name.partition(" ")[0], sizes, turn, TURN, 2)
        if 1 in sizes:
            assert found.pop("", 0) > expected.pop("", 0), f"{name} reads no scales"
        assert found == expected, name


def test_the_bias_moves_as_much_at_a_time_as_can_be_or_one_element(by_arch: dict[str, Kernels]) -> None:
    for name, sizes, sass in each(by_arch, "bias"):
        arch = name.partition(" ")[0]
        found, expected = accesses(sass, "LDG"), expected_accesses(arch, sizes, 2 * TURN, TURN)
        if 1 in sizes:
            assert found.pop("", 0) > expected.pop("", 0), f"{name} reads no scales"
        assert found == expected, name
        assert accesses(sass, "STG") == expected_accesses(arch, sizes[:1], 2 * TURN, TURN), name


def expected_blocks(name: str) -> int:
    """Blocks per multiprocessor, as in csrc/cuda/kernels.cu; one block fills coefficients, with 512 threads."""
    kernel, _, dtypes = name.rstrip(">").partition("<")
    if kernel != "update":
        return 2 if kernel == "fill" else 4
    param, grad, state, delta = dtypes.split(", ")
    if grad == state == "float":
        return 2
    return 4 if param in ("bfloat16", "float16") and state != "int8_state" and "code" not in delta else 3


def test_nothing_spills_and_blocks_share_a_multiprocessor(by_arch: dict[str, Kernels]) -> None:
    for arch, kernels in by_arch.items():
        for name, facts in kernels.items():
            usage = facts["usage"]
            assert usage["STACK"] == usage["LOCAL"] == 0, f"{arch} {name}"
            assert not [opcode for opcode in facts["sass"] if opcode.startswith(("LDL", "STL"))], f"{arch} {name}"
            blocks = expected_blocks(name)
            assert usage["REG"] * THREADS * blocks <= 65_536, f"{arch} {name}: {usage['REG']} registers"
            assert usage["SHARED"] * blocks <= 100 * 1024, f"{arch} {name}: {usage['SHARED']} bytes shared"


def expected_divisions(name: str) -> tuple[int, int]:
    """The number of divisions by nvcc, and as many roots; and of the fused operations in the quick ones."""
    kernel, _, dtypes = name.rstrip(">").partition("<")
    types = dtypes.split(", ")
    if kernel == "sum":  # each turn before and after the next is loaded, and one by one
        turn = next(turn for turn in (32, 16, 8) if turn * sum(SIZES[dtype] for dtype in types) <= 64)
        return 0, (2 * turn + TURN) * (1 if "Nothing" in types else 2)
    if kernel != "update":
        return 0, 0
    # The wide turn, with and without the quick root and quotient, and the narrow turn.
    beside = TURN if "int8_state" in types else 2 if "stochastic" in name or "master" in name else 4
    fused = TURN * (2 + 6)
    if "int8_state" in types:  # for both: roots of codes, and for each state a scale and its inverse
        fused += 2 * (TURN * 2 + 2 * (2 + 6))
    return TURN + beside, fused


def test_every_operation_is_rounded_by_itself(extension: Path, by_arch: dict[str, Kernels]) -> None:
    """Except where operations are fused on purpose: in the sums, and in divisions and roots that are exact anyway."""
    ptx = contraction.arithmetic(extension)
    by_name = dict(zip(demangled(list(ptx)), ptx.values(), strict=True))
    for kernels in by_arch.values():
        for name, facts in kernels.items():
            _, fused = expected_divisions(name)
            contraction.assert_nothing_was_contracted(name, facts["sass"], by_name[name], fused)
    for name, counts in by_name.items():
        divisions, _ = expected_divisions(name)
        assert counts["sqrt.rn.f32"] == counts["div.rn.f32"] == divisions, name


def test_coefficients_are_filled_by_operations_that_every_library_rounds_alike(extension: Path) -> None:
    """In float64: no fma, no approximation, no function of CUDA's library."""
    ptx = contraction.arithmetic(extension, "f64")
    filling = {name: counts for name, counts in ptx.items() if "fill" in name}
    assert len(filling) == 2
    for name, counts in ptx.items():
        assert all(".rn.f64" in op and not op.startswith(("fma", "mad", "rsqrt")) for op in counts), name
    for name, counts in filling.items():
        assert counts["mul.rn.f64"] > 100, name
        assert counts["sqrt.rn.f64"] >= 3, name  # a branch may be duplicated


def test_its_cudart_is_its_own(extension: Path) -> None:
    """None of its symbols is visible, so none can be confused with torch's, and none is missing."""
    symbols = subprocess.run(["nm", "-D", extension], capture_output=True, text=True, check=True).stdout
    assert "PyInit__cuda" in symbols
    assert not re.search(r"\bcuda[A-Z]\w+|libcudart", symbols)


# The index arithmetic of the kernels, on a GPU or the host

runs = pytest.mark.skipif(backends.load(NAME).unavailable(DEVICE) is not None, reason="there is no C++ compiler")


@runs
@pytest.mark.parametrize("dtypes", [(BF16, BF16, F32, BF16), (F32, F32, F32, None)], ids=["delta", "no delta"])
def test_sizes_around_turns_and_chunks(dtypes: tuple[torch.dtype | None, ...]) -> None:
    edges = (0, 1, TURN, THREADS, THREADS * TURN // 2, THREADS * TURN, CHUNK, 2 * CHUNK)
    numels = sorted({n + more for n in edges for more in range(-1, TURN + 1) if n + more >= 0})
    problem = Problem.random(numels, dtypes)
    expected = run("reference", problem.clone(), steps=2)
    assert_same_bits(run(NAME, problem, steps=2), expected)


@runs
@pytest.mark.parametrize("dtypes", [(BF16, BF16, F32, BF16), (BF16, BF16, BF16, BF16), (F32, F32, BF16, F32)], ids=str)
def test_views_into_flat_buffers(dtypes: tuple[torch.dtype | None, ...]) -> None:
    """All operands misaligned by the same number of elements, as in flat buffers, then one of them by one more."""
    numel = CHUNK + 1001
    offsets = range(2 * TURN)
    problem = Problem.random([numel] * 6 * len(offsets), dtypes)
    expected = run("reference", problem.clone(), steps=1)
    kinds = len(tensors_of(problem.operands[0])) + 1
    place = itertools.count()

    def moved(t: torch.Tensor) -> torch.Tensor:
        row, which = divmod(next(place), kinds - 1)  # `each` goes through a row's operands, then through the gradients
        if row >= len(problem.operands):
            row, which = next(grads), kinds - 1
        offset = row // 6 + (row % 6 == which)
        return t.new_empty(numel + 2 * TURN + 1)[offset:][:numel].copy_(t)

    grads = itertools.count()
    assert_same_bits(run(NAME, problem.each(moved), steps=1), expected)


@runs
def test_more_tensors_than_one_launch_takes() -> None:
    """Three launches: the first full, the second with empty tensors only, the third with the rest."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    numels = torch.randint(0, 40, (MAX_ROWS,), generator=generator).tolist() + [0] * MAX_ROWS + [5, 0, CHUNK + 3]
    problem = Problem.random(numels, (BF16, BF16, F32, BF16))
    copy = problem.clone()
    expected = run("reference", problem.clone(), steps=1)
    assert_same_bits(run(NAME, problem, steps=1), expected)

    out, sums = (torch.full((len(numels), 2), torch.nan, dtype=torch.float64, device=DEVICE) for _ in range(2))
    backends.load(NAME).grad_stats(copy.plan(), out, with_delta=True)
    backends.load("reference").grad_stats(copy.plan(), sums, with_delta=True)
    # <g, delta> may be close to 0: its error is relative to norm(g)*norm(delta), as in test_parity.test_grad_stats.
    squares = torch.stack([o.delta.double().square().sum() for o in copy.operands if o.delta is not None])
    bound = 1e-6 * torch.stack((sums[:, 0], (sums[:, 0] * squares).sqrt()), dim=1)
    assert ((out - sums).abs() <= bound).all()


@pytest.mark.skipif(NAME != GRID or grid.COMPILER is None, reason="the kernels run on the host")
def test_the_end_of_a_tensor_of_more_than_2_to_the_31_elements() -> None:
    """The memory is only reserved; the kernels touch its last chunks."""
    numel, last = 2**31 + CHUNK + 77, 2 * CHUNK + 77
    end = Problem.random([last], (BF16, BF16, BF16, BF16))
    expected = run("reference", end.clone(), steps=1)
    huge = iter([torch.empty(numel, dtype=BF16) for _ in range(5)])

    def ending(t: torch.Tensor) -> torch.Tensor:
        tensor = next(huge)
        tensor[-last:] = t
        return tensor

    problem = end.each(ending)
    grid.update(problem.plan(), coefficients(1, "absolute").table, with_delta=True, first_chunk=(numel - last) // CHUNK)
    assert_same_bits([tensor[-last:] for tensor in problem.outputs()], expected)


def test_errors_name_the_call_or_the_missing_kernel(extension: Path) -> None:
    from drift_kernels import _cuda

    def target(*dtypes: str | None) -> _cuda.Target:
        return _cuda.Target(0, 0, 0, 0, count=0, dtypes=dtypes, device=2**20, stream=0)

    with pytest.raises(ValueError, match="the cuda backend has no update kernel for these dtypes"):
        _cuda.update(target("float16", "bfloat16", "float32", None), 0)
    with pytest.raises(ValueError, match="unknown dtype float64"):
        target("float64", "float64", "float32", None)
    with pytest.raises(RuntimeError, match=r"^cudaSetDevice failed: cudaError\w+: "):
        _cuda.update(target("float32", "float32", "float32", None), 0)


def test_it_says_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda:0")
    assert "NVIDIA GPUs only, not mps" in str(backend.unavailable(torch.device("mps")))
    if DEVICE.type == "cpu" and backend._reason is None:
        without_a_gpu = r"there is no CUDA driver|cuda\w+ failed: cudaError\w+: "
        assert re.search(without_a_gpu, str(backend.unavailable(cuda)))
    monkeypatch.setattr(backend, "_reason", "cannot import its compiled extension")
    assert "cannot import" in str(backend.unavailable(cuda))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in str(backend.unavailable(cuda))

"""The triton backend: its machine code, for GPUs that need not be present, and what test_parity.py does not cover."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from background import Product
from contraction import assert_nothing_was_contracted
from problems import BF16, DEVICE, F32, Problem, assert_same_bits, run

from drift_kernels.kernels.plan import CHUNK
from drift_kernels.kernels.triton import backend

triton = pytest.importorskip("triton", minversion="3.6")

ARCHS = [80, 90, 100]
AMD = ["gfx942", "gfx950"]
BLOCK = 8 * backend.LINES  # elements of a tile
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "None": 0}

# For each architecture, the output of tests/sass.py for each kernel.
Kernels = dict[str, dict[str, Any]]


def compiled(arch: int | str) -> Product:
    """The output of `triton.jit`, in a process where it compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    program = Path(__file__).with_name("sass.py")
    return Product(f"triton-{arch}.json", [sys.executable, program, str(arch)], environment)


def begin() -> None:
    for arch in [*ARCHS, *AMD]:
        compiled(arch).begin()


@pytest.fixture(scope="module")
def by_arch() -> dict[int, Kernels]:
    return {arch: json.loads(compiled(arch).path().read_text()) for arch in ARCHS}


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def kernels(by_arch: dict[int, Kernels], arch: int) -> Kernels:
    return by_arch[arch]


def opcodes(kernels: Kernels, kernel: str, key: str = "sass") -> Iterator[tuple[str, list[int], dict[str, int]]]:
    """For each combination of dtypes without codes: the kernel, their sizes, and the count of each opcode."""
    for name, facts in kernels.items():
        if name.startswith(kernel) and "int8" not in name:
            yield name, [SIZES[dtype] for dtype in name.split()[1:] if dtype in SIZES], facts[key]


def test_an_update_moves_16_bytes_at_a_time_or_one_element(kernels: Kernels) -> None:
    """Eight elements per thread on the aligned path, in as few accesses as possible; two on the general path."""
    for name, (param, grad, state, delta), sass in opcodes(kernels, "_update_chunk"):
        residual = [2] if "master" in name else []
        read, written = [param, grad, state, state, delta, *residual], [param, state, state, *residual]
        assert sass["LDG.E.128"] == sum(8 * size // 16 for size in read), name
        assert sass.get("LDG.E.U16", 0) == 2 * read.count(2), name
        stores = {opcode: count for opcode, count in sass.items() if opcode.startswith("STG")}
        single = {"STG.E": 2 * written.count(4), "STG.E.U16": 2 * written.count(2)}
        wide = {"STG.E.128": sum(8 * size // 16 for size in written)}
        assert stores == {opcode: count for opcode, count in (wide | single).items() if count}, name


def test_grad_stats_reads_16_bytes_at_a_time_and_a_turn_ahead(kernels: Kernels) -> None:
    """64 bytes per thread before the loop, 64 in it, or a multiple if the compiler unrolls the loop."""
    for name, sizes, sass in opcodes(kernels, "_sum_chunk"):
        wide = sass.get("LDG.E.128", 0)
        assert wide >= 2 * 64 // 16, name
        assert wide % sum(sizes) == 0, name


def test_the_bias_moves_16_bytes_at_a_time(kernels: Kernels) -> None:
    """Likewise."""
    for name, sizes, sass in opcodes(kernels, "_bias_chunk"):
        wide, stores = sass.get("LDG.E.128", 0), sass.get("STG.E.128", 0)
        assert wide > 0, name
        assert wide % (sum(sizes) // 2) == 0, name
        assert stores * sum(sizes) == wide * sizes[0], name


def test_codes_move_8_bytes_at_a_time_or_one(kernels: Kernels) -> None:
    """Eight elements per thread on the aligned path, of both states and the delta."""
    for name, facts in kernels.items():
        if "int8" in name and name.startswith("_update_chunk"):
            others = 2 + 1 + ("master" in name)
            assert facts["sass"]["STG.E.64"] == 2, name
            assert facts["sass"]["LDG.E.128"] == others - 1, name
            assert facts["sass"]["STG.E.128"] == others - 2, name


def test_nothing_spills_and_six_blocks_share_a_multiprocessor(kernels: Kernels) -> None:
    """Five blocks for sums, which have more in flight."""
    for name, facts in kernels.items():
        usage = facts["usage"]
        assert usage["LOCAL"] == usage["STACK"] == 0, name
        blocks = 5 if name.startswith("_sum_chunk") else 6
        assert usage["REG"] * facts["threads"] * blocks <= 65_536, f"{name}: {usage['REG']} registers"


def test_bfloat16_is_rounded_by_the_device_and_its_nan_made_ours(kernels: Kernels) -> None:
    """Ten elements per thread, over both paths, for tensors rounded to nearest; NaN is 0x7fff before the minimum."""
    for name, facts in kernels.items():
        if "int8" in name or not name.startswith(("_update_chunk", "_bias_chunk")):
            continue
        kinds = name.split()[1:5]
        written = [kinds[0], kinds[2], kinds[2]] if name.startswith("_update_chunk") else [kinds[0]]
        if "param_at_random" in name or "master" in name:
            written[0] = ""
        if "state_at_random" in name:
            written[1:] = []
        count = written.count("bf16")
        converted, least = (facts["halves"].get(op, 0) for op in ("cvt.rn.bf16.f32", "min.s16"))
        assert converted == least, name
        assert bool(converted) == bool(count), name
        if name.startswith("_update_chunk"):
            assert converted == 10 * count, name


def test_every_operation_is_rounded_by_itself(arch: int, kernels: Kernels) -> None:
    if reason := backend.unsuitable(arch):
        pytest.skip(reason)
    for name, facts in kernels.items():
        sass, ptx = facts["sass"], facts["ptx"]
        if name.startswith("_update_chunk"):
            assert_nothing_was_contracted(name, sass, ptx)
            assert ptx["div.rn.f32"] >= 10, name  # eight and two elements
            assert ptx["sqrt.rn.f32"] >= (20 if "int8" in name else 10), name
            if "int8" not in name:
                assert ptx["sqrt.rn.f32"] == ptx["div.rn.f32"] == 10, name
        else:
            assert all(".rn.f32" in operation and not operation.startswith(("fma", "mad")) for operation in ptx), name
            assert not [opcode for opcode in sass if opcode.startswith("FFMA")], name


def test_no_argument_makes_a_kernel_compile_again(kernels: Kernels) -> None:
    assert not {name: facts["specialized"] for name, facts in kernels.items() if facts["specialized"]}


# AMD's CDNA


@pytest.fixture(scope="module", params=AMD)
def on_amd(request: pytest.FixtureRequest) -> Kernels:
    return json.loads(compiled(request.param).path().read_text())


def test_nothing_spills_on_amd(on_amd: Kernels) -> None:
    for name, facts in on_amd.items():
        assert facts["usage"] == {"vgpr_spill_count": 0, "private_segment_fixed_size": 0}, name


def wide_accesses(opcodes_of: dict[str, int], access: str) -> int:
    return sum(n for opcode, n in opcodes_of.items() if re.fullmatch(rf"(?:global|buffer)_{access}_dwordx4", opcode))


def test_an_update_moves_16_bytes_at_a_time_on_amd(on_amd: Kernels) -> None:
    """Eight elements per thread, in warps of 64. If rows are read in every turn, their loads may be as wide."""
    for name, (param, grad, state, delta), opcodes_of in opcodes(on_amd, "_update_chunk", "opcodes"):
        residual = [2] if "master" in name else []
        read, written = [param, grad, state, state, delta, *residual], [param, state, state, *residual]
        of_rows = wide_accesses(opcodes_of, "load") - sum(8 * size // 16 for size in read)
        assert 0 <= of_rows <= (4 if "master" in name or "random" in name else 0), name
        assert wide_accesses(opcodes_of, "store") == sum(8 * size // 16 for size in written), name


def test_sums_and_biases_move_16_bytes_at_a_time_on_amd(on_amd: Kernels) -> None:
    for kernel, least in (("_sum_chunk", 2 * 64 // 16), ("_bias_chunk", 2)):
        for name, sizes, opcodes_of in opcodes(on_amd, kernel, "opcodes"):
            wide = wide_accesses(opcodes_of, "load")
            assert wide >= least, name
            assert wide % (sum(sizes) // 2) == 0, name


def test_every_operation_is_rounded_by_itself_on_amd(on_amd: Kernels) -> None:
    """A division has five fused operations, a square root two, an integer division at most two besides its reciprocal;
    there are no others. Mixed-precision ones convert float16 while adding -0 or multiplying by 1, and round once."""
    for name, facts in on_amd.items():
        count = Counter(facts["opcodes"])
        divisions, roots = count["v_div_fixup_f32"], count["v_sqrt_f32"]
        of_integers = count["v_rcp_f32"] - divisions
        fused = count["v_fma_f32"] + count["v_fmac_f32"] - 5 * divisions - 2 * roots
        assert 0 <= fused <= 2 * of_integers, name
        assert not [
            op for op in count if re.match(r"v_(?:pk_fma|pk_mad|mad_f|mac_f|fma_f16|fmac_f16|fma_mixlo|rsq)", op)
        ], name
        assert all(re.search(r", neg\(0\)|, 1\.0,", operands) for operands in facts["mixed"]), name
        if name.startswith("_update_chunk"):
            assert divisions >= 10, name
            assert roots >= 10, name


# Without a GPU, the parity tests run the kernels in Triton's interpreter.
runs = pytest.mark.skipif(backend.unavailable(DEVICE) is not None, reason=f"{backend.unavailable(DEVICE)}")


@runs
@pytest.mark.parametrize("dtypes", [(BF16, BF16, F32, BF16), (F32, F32, F32, None)], ids=["delta", "no delta"])
def test_sizes_around_blocks_and_chunks(dtypes: tuple[torch.dtype | None, ...]) -> None:
    edges = (
        0,
        1,
        BLOCK // 2,
        BLOCK,
        3 * BLOCK,
        CHUNK,
    )
    problem = Problem.random([n for edge in edges for n in (edge - 1, edge, edge + 1) if n >= 0], dtypes)
    expected = run("reference", problem.clone(), steps=1)
    assert_same_bits(run("triton", problem, steps=1), expected)


@runs
def test_each_tensor_of_a_plan_may_start_anywhere() -> None:
    """In every row another operand is not 16-byte aligned; in the last, all are aligned."""
    numel = BLOCK + 100
    problem = Problem.random([numel] * 6, (BF16, BF16, BF16, BF16))
    expected = run("reference", problem.clone(), steps=2)
    place = itertools.count()

    def moved(t: torch.Tensor) -> torch.Tensor:
        row, which = divmod(next(place), 4)
        if row >= len(problem.operands):
            row, which = next(grads), 4
        return t.new_empty(numel + 1)[int(row == which) :][:numel].copy_(t)

    grads = itertools.count()
    assert_same_bits(run("triton", problem.each(moved), steps=2), expected)


@runs
def test_a_plan_of_empty_tensors() -> None:
    problem = Problem.random([0, 0], (BF16, BF16, F32, BF16))
    run("triton", problem, steps=1)
    out = torch.full((2, 2), torch.nan, dtype=torch.float64, device=DEVICE)
    backend.grad_stats(problem.plan(), out, with_delta=True)
    assert torch.equal(out, torch.zeros_like(out))


def test_it_says_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert "mps" in str(backend.unavailable(torch.device("mps")))
    monkeypatch.setattr(triton, "JITFunction", object)  # as if everything had been compiled
    assert "TRITON_INTERPRET=1" in str(backend.unavailable(cpu))
    monkeypatch.setattr(triton, "JITFunction", ())  # as if everything were interpreted
    assert backend.unavailable(cpu) is None
    assert "TRITON_INTERPRET is set" in str(backend.unavailable(cuda))


def test_it_refuses_architectures_that_would_not_give_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "7.5" in str(backend.unsuitable(75))
    for version, reason in (("3.6.0", "contracts"), ("3.9.0", "None")):
        monkeypatch.setattr(triton, "__version__", version)
        assert backend.unsuitable(90) is None
        assert reason in str(backend.unsuitable(100))


def test_it_can_be_imported_where_triton_is_not() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from drift_kernels.kernels.triton import backend as triton
print(triton.unavailable(torch.device("cuda")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cannot import Triton")

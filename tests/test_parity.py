"""Every backend against the reference: bitwise identical params and states, given the same coefficients."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import grid
import pytest
import torch
from problems import BF16, DEVICE, F16, F32, GRID, Problem, assert_same_bits, coefficients, run, tensors_of, threads

from drift_kernels.formats.blocks import BLOCK
from drift_kernels.formats.philox import Place
from drift_kernels.kernels import backends, reference
from drift_kernels.kernels.coefficients import Coefficients
from drift_kernels.kernels.operands import Operands
from drift_kernels.kernels.plan import CHUNK, FIRST_CHUNK
from drift_kernels.kernels.triton import jit

INT8, FP8 = torch.int8, torch.float8_e4m3fn
begin = grid.begin
NUMELS = [0, 1, 63, 1000, CHUNK - 1, 65_537]

DTYPES = [
    (param, grad, state, delta)
    for param in (F32, BF16, F16)
    for grad in dict.fromkeys((param, F32))
    for state in (F32, BF16)
    for delta in (F32, BF16, None)
]


def dtype_id(dtypes: tuple[torch.dtype | None, ...]) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def available() -> list[str]:
    names = [name for name in (*backends.NAMES, GRID) if name != "reference"]
    return [name for name in names if backends.load(name).unavailable(DEVICE) is None]


def test_every_backend_is_under_test() -> None:
    too_old = "is too old" in (jit.missing or "")
    expected = {"cuda", "triton"} if DEVICE.type == "cuda" else {"cpu", "triton", GRID}
    assert set(available()) == expected - ({"triton"} if too_old else set())


@pytest.mark.parametrize(("numel", "chunks"), [(0, 0), (1, 1), (CHUNK - 1, 1), (CHUNK, 1), (CHUNK + 1, 2)])
def test_a_plan_has_no_chunk_without_elements(numel: int, chunks: int) -> None:
    plan = Problem.random([numel, 3], (BF16, BF16, F32, None)).plan()
    assert plan.chunk_count == chunks + 1
    assert plan.chunk_tensor.tolist() == [0] * chunks + [1]
    assert plan.table[:, FIRST_CHUNK].tolist() == [0, chunks]


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_update_is_the_reference_bit_for_bit(name: str, dtypes: tuple[torch.dtype | None, ...]) -> None:
    interpreted = name == "triton" and DEVICE.type == "cpu"
    numels = [0, 1, 63, 1000, CHUNK + 17] if interpreted else NUMELS
    problem = Problem.random(numels, dtypes)
    expected = run("reference", problem.clone(), steps=3)
    assert_same_bits(run(name, problem, steps=3), expected)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("delta", [F32, BF16, INT8, FP8, None], ids=str)
@pytest.mark.parametrize("grad", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    ("state", "master", "stochastic"),
    [
        *((F32, False, True), (BF16, False, True)),
        *((F32, True, False), (BF16, True, False), (BF16, True, True)),
        *((INT8, False, False), (INT8, False, True), (INT8, True, False)),
    ],
)
def test_update_without_loss_is_the_reference_bit_for_bit(
    name: str, state: torch.dtype, master: bool, stochastic: bool, grad: torch.dtype, delta: torch.dtype | None
) -> None:
    """The interpreter takes equally long for all sizes up to a block, so each test runs it with one of them."""
    interpreted = name == "triton" and DEVICE.type == "cpu"
    numels, steps = ([0, int(torch.randint(1, 64, ())), 1700], 2) if interpreted else (NUMELS, 3)
    problem = Problem.random(numels, (BF16, grad, state, delta), master, stochastic)
    expected = run("reference", problem.clone(), steps)
    assert_same_bits(run(name, problem, steps), expected)


@pytest.mark.parametrize("name", available())
def test_bits_of_shards_whose_runs_are_about_as_long_as_what_a_kernel_takes_at_once(name: str) -> None:
    widths = [8, 504, 512, 520, 1000, 1016, 1023, 1024, 1032]
    problem = Problem.random([3000] * len(widths), (BF16, F32, BF16, None), stochastic=True)
    places = [Place(origin=16, width=width, pitch=3 * width) for width in widths]
    problem.operands = [replace(o, place=place) for o, place in zip(problem.operands, places, strict=True)]
    expected = run("reference", problem.clone(), steps=1)
    assert_same_bits(run(name, problem, steps=1), expected)


@pytest.mark.parametrize("name", available())
def test_random_shapes(name: str) -> None:
    for dtypes in ((BF16, BF16, F32, BF16), (F32, F32, F32, F32)):
        numels = [int(n) for n in torch.randint(0, 3000, (40,))]
        problem = Problem.random(numels, dtypes)
        expected = run("reference", problem.clone(), steps=2)
        assert_same_bits(run(name, problem, steps=2), expected)


@pytest.mark.parametrize("name", [name for name in available() if name in ("cpu", GRID) or DEVICE.type == "cuda"])
@pytest.mark.parametrize(
    "dtypes", [(BF16, BF16, BF16, BF16), (BF16, F32, F32, BF16), (F32, F32, F32, None)], ids=dtype_id
)
def test_several_million_elements(name: str, dtypes: tuple[torch.dtype | None, ...]) -> None:
    problem = Problem.random([5_000_011, 3, 2_500_000], dtypes)
    expected = run("reference", problem.clone(), steps=2)
    assert_same_bits(run(name, problem, steps=2), expected)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize(
    ("dtypes", "modes"),
    [
        ((BF16, BF16, F32, BF16), {}),
        ((F16, F16, BF16, F32), {}),
        ((F32, F32, F32, F32), {}),
        ((BF16, BF16, BF16, BF16), {"stochastic": True}),
        ((BF16, BF16, F32, BF16), {"master": True}),
        ((BF16, BF16, INT8, INT8), {"stochastic": True}),
    ],
)
def test_special_values(name: str, dtypes: tuple[torch.dtype | None, ...], modes: dict[str, bool]) -> None:
    """NaN, infinities, zeros of both signs, subnormals and the largest values, in every operand."""
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 6e-8, 6.1e-5, 65504.0, 65519.0, 3.3e38, -3.3e38]
    values = torch.tensor(special, dtype=F32, device=DEVICE)
    problem = Problem.random([4096], dtypes, **modes)
    special_operands = [t for t in (*tensors_of(problem.operands[0]).values(), *problem.grads) if t.is_floating_point()]
    for tensor in special_operands:
        chosen = values[torch.randint(len(values), tensor.shape, device=DEVICE)].to(tensor.dtype)
        tensor.copy_(torch.where(torch.rand(tensor.shape, device=DEVICE) < 0.5, tensor, chosen))
    if problem.operands[0].exp_avg_scale is None:
        problem.operands[0].exp_avg_sq.abs_()
    expected = run("reference", problem.clone(), steps=2)
    assert_same_bits(run(name, problem, steps=2), expected)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000], ids=["positive", "negative"])
def test_a_nan_of_either_sign_makes_the_scales_of_its_block_nan(name: str, bits: int) -> None:
    problem = Problem.random([3 * BLOCK], (BF16, F32, INT8, None))
    problem.grads[0].view(torch.int32)[BLOCK + 5] = bits
    expected = run("reference", problem.clone(), steps=1)
    assert_same_bits(run(name, problem, steps=1), expected)
    for scale in (problem.operands[0].exp_avg_scale, problem.operands[0].exp_avg_sq_scale):
        assert scale is not None
        assert scale.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", available())
def test_moments_too_small_for_a_scale(name: str) -> None:
    """Blocks whose scale would be subnormal, or zero, have the smallest normal one."""
    exponents = torch.tensor([0, -100, -115, -125, -135, -145], device=DEVICE).repeat_interleave(BLOCK)
    problem = Problem.random([len(exponents)], (BF16, F32, INT8, None))
    for state in problem.outputs()[1:]:
        state.zero_()
    problem.grads[0].copy_(torch.randn(len(exponents), device=DEVICE).sign() * 2.0**exponents)
    expected = run("reference", problem.clone(), steps=1)
    assert_same_bits(run(name, problem, steps=1), expected)
    scale = problem.operands[0].exp_avg_scale
    assert scale is not None
    assert (scale == torch.finfo(F32).tiny).tolist() == [False, False, True, True, True, True]


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_stores_round_as_torch_casts(name: str, dtype: torch.dtype, fraction: float) -> None:
    """Every finite value of a narrow dtype plus a fraction of its ulp: below, on and above the tie."""
    patterns = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(dtype)
    values = patterns[patterns.isfinite()]
    ulp = (values.abs().view(torch.int16) ^ 1).view(dtype).float().sub(values.abs().float()).abs()
    delta = torch.where(ulp.isfinite(), ulp, 0.0) * fraction * values.float().sign()
    operands = Operands(values.clone(), torch.zeros(len(values)), torch.ones(len(values)), delta)
    problem = Problem([operands], [values.new_zeros(len(values))])
    problem = problem.each(lambda t: t.to(DEVICE))
    step = {"grad_coef": 1.0, "decay": 1.0, "delta_step": 1.0, "eps": 1.0, "step": 1.0}
    row = torch.tensor([[step.get(field, 0.0) for field in Coefficients._fields]], device=DEVICE)
    backends.load(name).update(problem.plan(), row, with_delta=True)
    assert_same_bits([problem.operands[0].param], [(values.float() + delta).to(dtype).to(DEVICE)])


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("modes", [{}, {"stochastic": True}, {"master": True}], ids=str)
def test_views_of_any_alignment(name: str, modes: dict[str, bool]) -> None:
    problem = Problem.random([1000, 777, 4001], (BF16, BF16, F32, BF16), **modes)
    expected = run("reference", problem.clone(), steps=2)
    offsets = itertools.cycle((1, 3, 2, 7, 5))
    moved = problem.each(lambda t: t.new_zeros(t.numel() + 8)[next(offsets) :][: t.numel()].copy_(t))
    assert_same_bits(run(name, moved, steps=2), expected)


@pytest.mark.parametrize("name", available())
def test_a_launch_may_leave_its_deltas_out(name: str) -> None:
    problem = Problem.random([1000, 5], (BF16, BF16, F32, BF16))
    without = problem.clone()
    without.operands = [replace(o, delta=None) for o in without.operands]
    expected = run("reference", without, steps=2)
    assert_same_bits(run(name, problem, steps=2, with_delta=False), expected)


@pytest.mark.parametrize("name", available())
def test_nothing_outside_the_tensors_is_written(name: str) -> None:
    buffers = [torch.full((1200,), math.nan, dtype=dtype, device=DEVICE) for dtype in (BF16, F32, F32)]
    middle = [buffer[100:1101] for buffer in buffers]
    values = Problem.random([1001], (BF16, BF16, F32, BF16))
    for view, value in zip(middle, values.outputs(), strict=True):
        view.copy_(value)
    problem = Problem([Operands(*middle, values.operands[0].delta)], values.grads)
    run(name, problem, steps=1)
    for buffer in buffers:
        assert buffer[:100].isnan().all()
        assert buffer[1101:].isnan().all()
        assert buffer[100:1101].isfinite().all()


@pytest.mark.parametrize("name", [*available(), "reference"])
@pytest.mark.parametrize("grad", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("delta", [F32, BF16, INT8, FP8, None], ids=str)
def test_grad_stats(name: str, grad: torch.dtype, delta: torch.dtype | None) -> None:
    """Within 1e-6 of the norms' product of float64 sums, and bitwise identical when repeated into a poisoned output."""
    if grad == F16 and delta in (INT8, FP8):
        pytest.skip("no gradient of float16 beside codes")
    numels = [0, 1, 63, 1000, CHUNK + 1] + ([1_000_003] if name in ("cpu", GRID) or DEVICE.type == "cuda" else [])
    problem = Problem.random(numels, (grad, grad, F32, delta))
    plan = problem.plan()
    outs = [torch.full((len(plan), 2), math.nan, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    for out in outs:
        plan.partials.fill_(math.nan)
        with threads(name):
            backends.load(name).grad_stats(plan, out, with_delta=True)
    assert torch.equal(*(out.view(torch.int64) for out in outs))

    for t, g in enumerate(problem.grads):
        g64 = g.double()
        read = reference.read_delta(problem.operands[t])
        d64 = torch.zeros_like(g64) if read is None else read.double()
        square, cross, delta_square = ((a * b).sum() for a, b in ((g64, g64), (g64, d64), (d64, d64)))
        assert abs(outs[0][t, 0] - square) <= 1e-6 * square
        assert abs(outs[0][t, 1] - cross) <= 1e-6 * (square * delta_square).sqrt()


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("offset", [0, 1])
def test_sums_keep_their_bound_where_every_rounding_errs_alike(name: str, offset: int) -> None:
    """Equal elements: the products, and the sums of a lane, are all rounded the same way.

    A lane adds n products. The rounding of a product adds 2^-24 of the sum at most, that of the k-th partial sum k/n of
    it: together (n + 3)/2. n is 64 on the cpu backend, and at most 17 elsewhere.
    """
    values = torch.rand(8, dtype=F32, device=DEVICE)
    problem = Problem.random([CHUNK] * len(values), (F32, F32, F32, F32))
    problem.grads = [value.repeat(CHUNK + offset)[offset:] for value in values]
    problem.operands = [
        replace(o, delta=torch.full_like(g, -0.7)) for o, g in zip(*vars(problem).values(), strict=True)
    ]
    out = torch.empty(len(values), 2, dtype=torch.float64, device=DEVICE)
    backends.load(name).grad_stats(problem.plan(), out, with_delta=True)
    delta = torch.tensor(-0.7, device=DEVICE).double()
    expected = CHUNK * torch.stack((values.double() ** 2, values.double() * delta), dim=1)
    products = 64 if name == "cpu" else 17
    torch.testing.assert_close(out, expected, rtol=(products + 3) / 2 * 2.0**-24, atol=0)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="instruction sets are the cpu backend's")
@pytest.mark.parametrize(
    ("dtypes", "modes"),
    [
        ((BF16, BF16, BF16, BF16), {}),
        ((F32, F32, F32, None), {}),
        ((F16, F16, BF16, F32), {}),
        ((BF16, BF16, F32, FP8), {"master": True}),
        ((BF16, BF16, BF16, BF16), {"stochastic": True}),
        ((BF16, F32, INT8, INT8), {"stochastic": True}),
    ],
)
def test_every_instruction_set_gives_the_same_bits(
    dtypes: tuple[torch.dtype | None, ...], modes: dict[str, bool]
) -> None:
    from drift_kernels import _cpu

    sets = _cpu.instruction_sets()
    problem = Problem.random([1, 1000, 40_001], dtypes, **modes)
    stats, outputs = [], []
    try:
        for name in sets:
            _cpu.select_instruction_set(name)
            copy = problem.clone()
            out = torch.empty(3, 2, dtype=torch.float64)
            backends.load("cpu").grad_stats(copy.plan(), out, with_delta=True)
            stats.append(out)
            outputs.append(run("cpu", copy, steps=2))
    finally:
        _cpu.select_instruction_set(sets[-1])
    for out, result in zip(stats, outputs, strict=True):
        assert torch.equal(out, stats[0])
        assert_same_bits(result, outputs[0])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the threads are the cpu backend's")
def test_neither_threads_nor_flushing_denormals_change_a_bit() -> None:
    problem = Problem.random([100_001, 7], (F32, F32, F32, F32))
    for o in problem.operands:
        o.param.mul_(1e-39)
        o.exp_avg.mul_(1e-39)
    expected = run("reference", problem.clone(), steps=2)
    try:
        for count, flush in ((1, False), (3, True)):
            torch.set_num_threads(count)
            torch.set_flush_denormal(flush)
            copy = problem.clone()
            plan = copy.plan()
            table = [coefficients(2, "absolute").table, coefficients(2, "decoupled").table]
            for c in table:
                backends.load("cpu").update(plan, c, with_delta=True)
            torch.set_flush_denormal(False)
            assert_same_bits(copy.outputs(), expected)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(1)

"""Under torch.compile: a training step compiled as a whole, and the primitives as custom operators."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import BF16, DEVICE, F16, F32, Problem, assert_same_bits, coefficients
from torch import Tensor, nn

from drift_kernels import FusedDriftAdamW, ops
from drift_kernels.formats.philox import WHOLE
from drift_kernels.kernels import backends, reference
from drift_kernels.kernels.plan import CHUNK

INT8, FP8 = torch.int8, torch.float8_e4m3fn

DTYPES = [
    ((F32, F32, F32, F32), {}),
    ((F32, F32, F32, None), {}),
    ((BF16, BF16, BF16, BF16), {}),
    ((BF16, F32, F32, INT8), {}),
    ((F16, F16, F32, F32), {}),
    ((BF16, BF16, F32, FP8), {"master": True}),
    ((BF16, BF16, BF16, BF16), {"stochastic": True}),
    ((BF16, BF16, INT8, INT8), {"stochastic": True}),
]

# All checks of opcheck. With float8 the first cannot run: torch cannot compare such tensors on the CPU.
CHECKS = {
    fp8: (
        *(() if fp8 else ("test_schema",)),
        *("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    for fp8 in (False, True)
}


def with_scales(problem: Problem, name: str) -> list[Tensor]:
    found = [getattr(o, field) for field in (name, f"{name}_scale") for o in problem.operands]
    return [t for t in found if t is not None]


def arguments(problem: Problem) -> tuple[Any, ...]:
    return (
        [o.param for o in problem.operands],
        problem.grads,
        with_scales(problem, "exp_avg"),
        with_scales(problem, "exp_avg_sq"),
        with_scales(problem, "delta"),
        [o.residual for o in problem.operands if o.residual is not None],
        [o.random_key for o in problem.operands if o.random_key is not None],
        coefficients(len(problem.operands)).table,
    )


@pytest.mark.parametrize(("dtypes", "modes"), DTYPES, ids=str)
def test_update_is_a_proper_operator(dtypes: tuple[torch.dtype | None, ...], modes: dict[str, bool]) -> None:
    problem = Problem.random([1000, 63], dtypes, **modes)
    torch.library.opcheck(ops.update, arguments(problem), test_utils=CHECKS[FP8 in dtypes])


@pytest.mark.parametrize(("dtypes", "modes"), DTYPES, ids=str)
def test_grad_stats_is_a_proper_operator(dtypes: tuple[torch.dtype | None, ...], modes: dict[str, bool]) -> None:
    problem = Problem.random([1000, 63], dtypes, **modes)
    given = problem.grads, with_scales(problem, "delta")
    torch.library.opcheck(ops.grad_stats, given, test_utils=CHECKS[FP8 in dtypes])


@pytest.mark.parametrize(("dtypes", "modes"), DTYPES, ids=str)
def test_the_operators_are_the_reference(dtypes: tuple[torch.dtype | None, ...], modes: dict[str, bool]) -> None:
    """Called directly, and from a compiled function."""
    problem = Problem.random([1000, CHUNK + 63, 1], dtypes, **modes)
    problem.operands = [replace(o, place=WHOLE) for o in problem.operands]
    expected, compiled = problem.clone(), problem.clone()
    backends.load("reference").update(expected.plan(), coefficients(3).table, with_delta=True)
    ops.update(*arguments(problem))
    assert_same_bits(problem.outputs(), expected.outputs())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(grads: list[Tensor], deltas: list[Tensor], *args: Any) -> Tensor:
        stats = ops.grad_stats(grads, deltas)
        ops.update(*args)
        return stats * 2

    found = step(compiled.grads, with_scales(compiled, "delta"), *arguments(compiled))
    assert_same_bits(compiled.outputs(), expected.outputs())
    for row, grad, o in zip(found, problem.grads, problem.operands, strict=True):
        stats = 2 * reference.sums(grad, reference.read_delta(o))
        torch.testing.assert_close(row, stats, rtol=1e-6, atol=float(1e-4 * stats[0]))


@pytest.mark.parametrize(
    ("position", "wrong", "words"),
    [
        (0, lambda v: [v[0], v[1].float()], "params must be contiguous, of the same dtype"),
        (1, lambda v: v[:1], r"grads must have shapes \[\(100,\), \(63,\)\], got \[\(100,\)\]"),
        (2, lambda v: [v[0], v[1].repeat(2)[::2]], "exp_avgs must be contiguous"),
        (4, lambda v: [*v, *v], "deltas must have 2 tensors if they are torch.bfloat16, got 4"),
        (6, lambda v: [1], "random_keys must have 2 entries or none, got 1"),
        (7, lambda v: v.double(), r"coefficients must be torch\.float32, got torch\.float64"),
        (3, lambda v: [t.bfloat16() for t in v], r"exp_avg_sqs must be torch\.float32, got torch\.bfloat16"),
        (3, lambda v: [], r"exp_avg_sqs must have shapes"),
        (
            5,
            lambda v: [torch.zeros(n, device=DEVICE) for n in (100, 63)],
            r"residuals must be torch\.int16, got torch\.float32",
        ),
        (1, lambda v: [t.half() for t in v], r"grads must be torch\.bfloat16 or torch\.float32, got torch\.float16"),
        (4, lambda v: [t.to(torch.int8) for t in v], r"the scales of deltas must have shapes \[\(1,\), \(1,\)\]"),
        (0, lambda v: [], "params must have at least one tensor, got none"),
        (0, lambda v: [t.double() for t in v], r"params must be torch\.float32 or .*, got torch\.float64"),
        (7, lambda v: v[:1], "coefficients must have shapes"),
    ],
)
def test_wrong_lists_are_named(position: int, wrong: Any, words: str) -> None:
    problem = Problem.random([100, 63], (BF16, BF16, F32, BF16))
    before = problem.clone().outputs()
    given = list(arguments(problem))
    given[position] = wrong(given[position])
    with pytest.raises(ValueError, match=words):
        ops.update(*given)
    assert_same_bits(problem.outputs(), before)


@pytest.mark.parametrize("attached", [False, True])
def test_a_compiled_training_step_is_the_eager_one_and_compiles_once(attached: bool) -> None:
    """lr, alpha and the gradients' addresses change in every step."""
    net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).to(DEVICE)
    other = copy.deepcopy(net)
    deltas = {name: torch.randn_like(p) for name, p in net.named_parameters() if p.dim() == 2}
    ours, eager = (
        FusedDriftAdamW(model.named_parameters(), prior=deltas, max_grad_norm=None if attached else 1.0)
        for model in (net, other)
    )
    if attached:
        ours.attach_to_backward()

    def train(model: nn.Module, optimizer: FusedDriftAdamW, x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    torch._dynamo.reset()
    compiled = torch.compile(train, backend="aot_eager")
    counted = []
    for step in range(6):
        x = torch.randn(8, 16, device=DEVICE)
        compiled(net, ours, x)
        train(other, eager, x)
        counted.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        for optimizer in (ours, eager):
            optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
            optimizer.param_groups[0]["alpha"] = 0.5**step
    assert counted[1:] == [counted[1]] * 5, "it was compiled again"
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    assert {float(state["step"]) for state in ours.state.values()} == {6.0}


def test_a_closure_may_run_compiled_code() -> None:
    net = nn.Linear(4, 4).to(DEVICE)
    ours = FusedDriftAdamW(net.parameters())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(net, backend="aot_eager")

    def closure() -> float:
        loss = compiled(torch.ones(2, 4, device=DEVICE)).sum()
        loss.backward()
        return float(loss.detach())

    ours.step(closure)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_scales_may_have_the_shape_of_an_optimizers_states() -> None:
    """Per row if rows are whole blocks; any other shape is rejected."""
    flat = Problem.random([1024], (BF16, BF16, INT8, INT8))
    rows = flat.clone()
    ops.update(*arguments(flat))
    params, grads, moments, variances, deltas, residuals, keys, table = arguments(rows)
    matrices = [[t.view(4, 256) for t in tensors] for tensors in (params, grads)]
    states = [[codes.view(4, 256), scale.view(4, 2)] for codes, scale in (moments, variances)]
    delta = [deltas[0].view(4, 256), deltas[1]]
    ops.update(*matrices, *states, delta, residuals, keys, table)
    assert_same_bits(rows.outputs(), flat.outputs())
    states[0][1] = states[0][1].view(2, 4)
    with pytest.raises(ValueError, match="the scales of exp_avgs must have shapes"):
        ops.update(*matrices, *states, delta, residuals, keys, table)

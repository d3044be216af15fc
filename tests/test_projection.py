"""Deltas projected onto the factors of adapters, compared with autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from drift_kernels.adapters import Factors, merged, projected, projection
from drift_kernels.prior import LowRankDelta, quantize
from drift_kernels.prior.deltas import Delta, expanded

EXACT = 1e-12  # of the largest element, in float64
ROWS, COLUMNS, RANK, ALPHA = 389, 253, 5, 0.7
KINDS = ("float64", "float32", "bfloat16", "int8", "float8", "low rank")


def random_delta(kind: str) -> Delta:
    delta = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    if kind == "low rank":
        return LowRankDelta(torch.randn(ROWS, 3).bfloat16(), torch.randn(3, COLUMNS).bfloat16())
    if kind in ("int8", "float8"):
        return quantize(delta.float(), {"int8": torch.int8, "float8": torch.float8_e4m3fn}[kind])
    return delta.to(getattr(torch, kind))


def exactly(delta: Delta) -> Tensor:
    """The stored numbers in float64."""
    if isinstance(delta, LowRankDelta):
        return delta.left.double() @ delta.right.double()
    return expanded(delta).double()


def random_factors(dtype: torch.dtype = torch.float64, transposed: bool = False, dora: bool = False) -> Factors:
    m, n = (COLUMNS, ROWS) if transposed else (ROWS, COLUMNS)
    row_scale = torch.rand(m, dtype=dtype) + 0.5 if dora else None
    a, b = torch.randn(RANK, n, dtype=dtype), torch.randn(m, RANK, dtype=dtype)
    return Factors(a, b, 1.3, row_scale, transposed)


def weight_of(factors: Factors) -> Tensor:
    """W(A, B) without W0."""
    made = factors.scale * factors.b @ factors.a
    made = made if factors.row_scale is None else factors.row_scale.unsqueeze(1) * made
    return made.T if factors.transposed else made


def pulled(delta: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """The gradients of A and of B of -alpha <delta, W(A, B)>, by autograd."""
    a, b = (factor.detach().clone().double().requires_grad_() for factor in (factors.a, factors.b))
    k = None if factors.row_scale is None else factors.row_scale.double()
    return torch.autograd.grad(
        -ALPHA * (delta * weight_of(Factors(a, b, factors.scale, k, factors.transposed))).sum(), (a, b)
    )


def assert_close(found: Tensor | None, expected: Tensor, bound: float) -> None:
    assert found is not None
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_projection_is_the_gradient_of_the_pull(
    kind: str, dora: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "_TILE", 128 * COLUMNS)  # several tiles, the last a part of one
    delta, factors = random_delta(kind), random_factors(transposed=transposed, dora=dora)
    grad_a, grad_b = pulled(exactly(delta), factors)
    # codes are expanded in float32
    to_a, to_b = projected(delta, factors)
    assert_close(to_a, grad_a / -ALPHA, EXACT)
    assert_close(to_b, grad_b / -ALPHA, EXACT)
    assert projected(delta, factors, of_a=False)[0] is None
    assert projected(delta, factors, of_b=False)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "low rank"])
def test_factors_of_other_dtypes_are_computed_with_in_float32(kind: str, dtype: torch.dtype) -> None:
    """To 2e-6 of the sum of the magnitudes of the terms, which may cancel."""
    delta, factors = random_delta(kind), random_factors(dtype)
    expected = pulled(exactly(delta), factors)
    sizes = pulled(exactly(delta).abs(), Factors(factors.a.abs(), factors.b.abs(), factors.scale))
    with torch.autocast("cpu", torch.bfloat16):  # a step may run under autocast
        found = projected(delta, factors)
    assert {tensor.dtype for tensor in found if tensor is not None} == {torch.float32}
    for tensor, gradient, size in zip(found, expected, sizes, strict=True):
        assert ((tensor.double() - gradient / -ALPHA).abs() <= 2e-6 * size / -ALPHA).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_a_merge_moves_the_weight_by_what_of_delta_lies_in_the_span_of_a(dora: bool, transposed: bool) -> None:
    delta, factors = random_delta("float64"), random_factors(transposed=transposed, dora=dora)
    moved = weight_of(Factors(factors.a, merged(delta, factors), factors.scale, factors.row_scale, transposed))
    span = torch.linalg.pinv(factors.a) @ factors.a
    assert_close(moved, span @ delta if transposed else delta @ span, 1e-8)


def test_a_merge_is_finite_where_a_has_dependent_rows_or_none_and_where_the_scale_is_zero() -> None:
    delta, factors = random_delta("float64"), random_factors()
    twice = factors.a[[0, 1, 2, 3, 3]]
    moved = factors.scale * merged(delta, Factors(twice, factors.b, factors.scale)) @ twice
    assert_close(moved, delta @ torch.linalg.pinv(twice) @ twice, 1e-5)
    for a, scale in ((torch.zeros_like(factors.a), 1.0), (factors.a, 0.0)):
        assert not merged(delta, Factors(a, factors.b, scale)).any()


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that an operation makes, and whether the host read a tensor."""

    numel, read = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        self.read |= func is torch.ops.aten._local_scalar_dense.default
        if isinstance(found, Tensor) and not func.is_view:
            self.numel = max(self.numel, found.numel())
        return found


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_more_than_a_tile_is_expanded_and_the_host_reads_nothing(
    kind: str, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "_TILE", 128 * COLUMNS)
    delta, factors = random_delta(kind), random_factors(torch.float32, transposed)
    with Largest() as largest:
        projected(delta, factors)
        merged(delta, factors)
    assert not largest.read
    assert largest.numel <= (RANK * ROWS if kind == "low rank" else 128 * COLUMNS)

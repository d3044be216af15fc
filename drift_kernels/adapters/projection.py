"""Projection of the delta of a weight onto the two factors of its adapter.

    W(A, B) = k * (W0 + s*B A)            A [r, n], B [m, r]; s the scale; k [m] for DoRA, 1 otherwise

The pull on W is the gradient of -alpha <delta, W>. By the chain rule, with k held constant (as DoRA does its norm),

    delta of B = s * k*delta A^T          delta of A = s * (k*B)^T delta

so that <delta of A, dA> + <delta of B, dB> = <delta, dW> for all small changes of A and B.

`decoupled` does not use this gradient: it moves the weights directly, W += step * delta. B can realise the part of
delta in the span of A's rows, with the projector P = A^T (A A^T)^-1 A:

    delta of B = (delta/k) A^T (A A^T)^-1 / s             so that k*s*B A moves by delta P
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..prior.deltas import Delta, expanded
from ..prior.low_rank import LowRankDelta

_TILE = 1 << 24  # elements of a delta that are expanded at a time
_ROWS = 128  # tiles begin at multiples of this number of rows, where blocks of codes begin too
_RIDGE = 1e-10  # relative to the mean square of A's rows: keeps the inverse finite if rows are dependent


@dataclass(frozen=True)
class Factors:
    """The factors of an adapter: `a` [r, n], `b` [m, r]; `row_scale` [m], or None for 1. If `transposed`, the weight is
    [n, m], the transpose of their product (embeddings, Conv1D)."""

    a: Tensor
    b: Tensor
    scale: float
    row_scale: Tensor | None = None
    transposed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation: float32, or float64 if a factor is float64."""
        return torch.promote_types(torch.promote_types(self.a.dtype, self.b.dtype), torch.float32)


def projected(delta: Delta, factors: Factors, of_a: bool = True, of_b: bool = True) -> tuple[Tensor | None, ...]:
    """Return the deltas of A [r, n] and B [m, r] in the factors' dtype of computation; None for one not requested.

    Args:
        delta: the delta of the weight, on the factors' device. Low-rank deltas are not expanded; others are, tile by
            tile.
    """
    a, b = factors.a.to(factors.dtype), _scaled(factors.b.to(factors.dtype), factors.row_scale)
    to_a, to_b = _products(delta, a if of_b else None, b if of_a else None, factors.transposed)
    to_b = None if to_b is None else _scaled(to_b, factors.row_scale)
    return tuple(None if found is None else found.mul_(factors.scale) for found in (to_a, to_b))


def made(factors: Factors) -> tuple[Tensor, Tensor]:
    """Return `projected` of s*B A, the part of the delta that the adapter has already learned, without forming the
    product. Does not support `row_scale`."""
    a, b, square = factors.a.to(factors.dtype), factors.b.to(factors.dtype), factors.scale**2
    return square * ((b.T @ b) @ a), square * (b @ (a @ a.T))


def merged(delta: Delta, factors: Factors) -> Tensor:
    """Return the step of B [m, r] that moves the weight by the part of delta in the span of A's rows."""
    if not factors.scale:
        return torch.zeros_like(factors.b, dtype=factors.dtype)
    inverse = None if factors.row_scale is None else 1 / factors.row_scale
    _, along = projected(delta, replace(factors, row_scale=inverse), of_a=False)
    assert along is not None
    a = factors.a.double()
    gram = a @ a.T
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean() + torch.finfo(torch.float64).tiny)
    root, _ = torch.linalg.cholesky_ex(gram)
    # `projected` has multiplied by the scale, but the result must be divided by it
    return torch.cholesky_solve(along.double().T, root).T.to(factors.dtype).div_(factors.scale**2)


def tile_rows(columns: int) -> int:
    """The number of rows of a delta that are expanded at a time."""
    return max(_TILE // columns // _ROWS, 1) * _ROWS


def _scaled(rows: Tensor, by: Tensor | None) -> Tensor:
    return rows if by is None else rows * by.to(rows.dtype).unsqueeze(1)


def _products(
    delta: Delta, a: Tensor | None, b: Tensor | None, transposed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return B^T delta [r, n] and delta A^T [m, r]; if `transposed`, with the transpose of delta."""
    if transposed:  # delta^T A^T = (A delta)^T, and B^T delta^T = (delta B)^T
        to_b, to_a = _sided(delta, right=b, left=None if a is None else a.T)
        return _transposed(to_a), _transposed(to_b)
    return _sided(delta, right=None if a is None else a.T, left=b)


def _transposed(found: Tensor | None) -> Tensor | None:
    return None if found is None else found.T.contiguous()


def _sided(delta: Delta, right: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return left^T delta and delta right, for delta [m, n], right [n, r] and left [m, r]."""
    with torch.autocast(delta.device.type, enabled=False):
        if isinstance(delta, LowRankDelta):
            return _of_low_rank(delta, right, left)
        rows, columns = delta.shape
        from_left = None if left is None else left.new_zeros(left.shape[1], columns)
        from_right = None if right is None else right.new_empty(rows, right.shape[1])
        height = tile_rows(columns)
        for begin in range(0, rows, height):
            part = slice(begin, min(begin + height, rows))
            tile = delta[part] if isinstance(delta, Tensor) else expanded(delta.part((part, slice(0, columns))))
            if right is not None and from_right is not None:
                torch.mm(tile.to(right.dtype), right, out=from_right[part])
            if left is not None and from_left is not None:
                from_left.addmm_(left[part].T, tile.to(left.dtype))
        return from_left, from_right


def _of_low_rank(delta: LowRankDelta, right: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    dtype = next(factor.dtype for factor in (right, left) if factor is not None)
    outer, inner = delta.left.to(dtype), delta.right.to(dtype)
    return None if left is None else (left.T @ outer) @ inner, None if right is None else outer @ (inner @ right)

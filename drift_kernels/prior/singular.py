"""The leading right singular vectors of deltas, and the low-rank deltas made from them.

A block Lanczos iteration for A^T A, with a random start and each block orthogonalised against all before it (Golub and
Underwood 1977; Musco and Musco 2015 show that a few steps are nearly optimal). A is read by rows, STEPS times, and once
more for the left factor, so it may be larger than memory. The bits depend on the matrix, the rank, the seed and the
machine's matrix products, but not on the number of threads.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .deltas import Delta, expanded
from .low_rank import LowRankDelta
from .norms import norm
from .threads import in_order, one_thread

Rows = Callable[[], Iterator[Tensor]]
"""Returns the rows of a matrix from the top, as float32 [some, n] tiles; can be called repeatedly."""

_STEPS = 12  # more steps find less than 0.01 of the energy, even for random matrices, whose spectra are the worst
_LEAST_BLOCK = 16
_TILE = 1 << 21  # elements


@dataclass(frozen=True)
class Fit:
    """How close a low-rank delta is to the exact one: 1 - norm(exact - delta)^2/norm(exact)^2, and their cosine; None
    if either is zero."""

    kept_energy: float | None
    cosine: float | None


def tile_rows(columns: int) -> int:
    """The number of rows of a matrix that are processed at a time.

    A multiple of 16, so that every tile of a matrix in memory is aligned to 64 bytes like a tile that is read into a
    new tensor: the bits of matrix products may depend on the alignment.
    """
    return max(_TILE // max(columns, 1) // 16, 1) * 16


def rows_of(matrix: Tensor) -> Rows:
    """The rows of a float32 matrix in memory."""
    return lambda: iter(matrix.split(tile_rows(matrix.shape[1])))


def factorise(rows: Rows, columns: int, rank: int, exact_norm: float, seed: str) -> tuple[LowRankDelta, Fit]:
    """Factorise a matrix with norm `exact_norm` into nearly optimal bfloat16 factors of this rank.

    The rows of `right` are the leading right singular vectors, rounded; `left` is the best factor for the rounded
    `right`. How the singular values are divided between the two does not matter, because rounding is relative.
    """
    vectors = right_singular_vectors(rows, columns, rank, exact_norm, seed)
    right = vectors.t().to(torch.bfloat16).contiguous()
    across, inverse = right.float().t().contiguous(), torch.linalg.inv(right.double() @ right.double().t())

    def fitted(tile: Tensor) -> tuple[Tensor, float]:
        product = (tile @ across).double()
        left = (product @ inverse).to(torch.bfloat16)
        return left, (product * left.double()).sum().item()

    with one_thread(), torch.autocast("cpu", enabled=False):
        lefts, overlaps = zip(*(result for _, result in in_order(fitted, rows())), strict=True)
    delta = LowRankDelta(torch.cat(lefts), right)
    overlap, stored_norm = math.fsum(overlaps), delta.norm()
    if not stored_norm:
        return delta, Fit(None, None)
    kept = overlap / exact_norm * 2 - (stored_norm / exact_norm) * stored_norm
    return delta, Fit(kept / exact_norm, overlap / exact_norm / stored_norm)


def top_right_singular_vectors(delta: Delta, rank: int, seed: str = "") -> tuple[Tensor, float]:
    """Return the leading right singular vectors of a delta [m, n] as rows, float32 [rank, n] on the CPU, and the
    fraction of norm(delta)^2 along them.

    The vectors are orthonormal, even if the delta has a lower rank. For a low-rank delta they are computed from its
    factors. For a delta of zeros they are random, and the fraction is 0. Raises ValueError if the delta is not a
    matrix, or has fewer columns than `rank`.
    """
    if len(delta.shape) != 2 or not 0 < rank <= delta.shape[1]:
        raise ValueError(f"a delta of shape {list(delta.shape)} does not have {rank} right singular vectors")
    if isinstance(delta, LowRankDelta):
        return _of_factors(delta, rank, seed)
    matrix = expanded(delta).detach().to("cpu", torch.float32).contiguous()
    size = norm(matrix)
    vectors = right_singular_vectors(rows_of(matrix), matrix.shape[1], rank, size, seed)
    seen = norm(_times(rows_of(matrix), vectors)) / size if size else 0.0
    return vectors.t().contiguous(), min(seen**2, 1.0)


def right_singular_vectors(rows: Rows, columns: int, rank: int, size: float, seed: str) -> Tensor:
    """Return the leading right singular vectors of a matrix of norm `size`, float32 [columns, rank], orthonormal."""
    with one_thread(), torch.autocast("cpu", enabled=False):
        block = max(_LEAST_BLOCK, -(-rank // 16) * 8)
        width = min(columns, _STEPS * block)
        basis, image = (torch.empty(columns, width, dtype=torch.float32, device="cpu") for _ in range(2))
        new = _random(columns, min(block, width), seed)
        for begin in range(0, width, block):
            done, here = basis[:, :begin], slice(begin, min(begin + block, width))
            new = new[:, : here.stop - begin]
            for _ in range(3):  # low-rank matrices first leave only rounding errors, within the span of `done`
                new = torch.linalg.qr(new - done @ (done.t() @ new))[0]
            basis[:, here] = new
            new = image[:, here] = _image(rows, new, size)
        projected = (basis.t() @ image).double()
        vectors = torch.linalg.eigh((projected + projected.t()) / 2)[1][:, width - rank :].flip(1)
        return torch.linalg.qr(basis @ vectors.float())[0]


def _image(rows: Rows, vectors: Tensor, size: float) -> Tensor:
    """A^T A vectors / size, which neither overflows nor underflows if A does not."""
    scale = 1 / size if size else 0.0
    total = torch.zeros_like(vectors)
    for _, part in in_order(lambda tile: tile.t() @ ((tile @ vectors) * scale), rows()):
        total += part
    return total


def _times(rows: Rows, right: Tensor) -> Tensor:
    """The product A right."""
    with one_thread(), torch.autocast("cpu", enabled=False):
        return torch.cat([product for _, product in in_order(lambda tile: tile @ right, rows())])


def _of_factors(delta: LowRankDelta, rank: int, seed: str) -> tuple[Tensor, float]:
    """With right^T = q t, delta = (left t^T) q^T."""
    with one_thread():
        left, right = delta.left.detach().to("cpu").double(), delta.right.detach().to("cpu").double()
        q, t = torch.linalg.qr(right.t())
        squares, vectors = torch.linalg.eigh(t @ (left.t() @ left) @ t.t())
        squares, vectors = squares.flip(0).clamp_(min=0), vectors.flip(1)
        found = (q @ vectors)[:, :rank]
        if found.shape[1] < rank:
            further = _random(len(found), rank - found.shape[1], seed).double()
            further -= found @ (found.t() @ further)
            found = torch.linalg.qr(torch.cat([found, further], 1))[0]
        total = squares.sum().item()
        return found.t().float().contiguous(), squares[:rank].sum().item() / total if total else 0.0


def _random(rows: int, columns: int, seed: str) -> Tensor:
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    generator = torch.Generator("cpu").manual_seed(number)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")

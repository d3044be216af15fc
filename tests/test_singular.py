"""Leading right singular vectors compared with LAPACK's, and factors compared with the best possible."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_global_settings import SETTINGS
from torch import Tensor

from drift_kernels.prior import LowRankDelta, quantize, singular, threads
from drift_kernels.prior.deltas import Delta, expanded
from drift_kernels.prior.norms import norm
from drift_kernels.prior.singular import factorise, rows_of, top_right_singular_vectors

BF16 = torch.bfloat16


def with_spectrum(rows: int, columns: int, values: Tensor) -> Tensor:
    size = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(n, size, dtype=torch.float64))[0] for n in (rows, columns))
    return (left * values[:size] @ right.t()).float()


def power_law(exponent: float) -> Tensor:
    return torch.arange(1, 5000, dtype=torch.float64) ** -exponent


def bulk(size: float, exponent: float) -> Tensor:
    """A power law with noise, as in deltas of bfloat16 checkpoints."""
    noise = torch.linspace(1, 0.02, 800, dtype=torch.float64) * size
    return (noise.square() + power_law(exponent)[:800].square()).sqrt()


MATRICES = {
    "random": lambda: torch.randn(900, 700),
    "random, wide": lambda: torch.randn(300, 1500),
    "power law 0.25": lambda: with_spectrum(900, 700, power_law(0.25)),
    "power law 0.5": lambda: with_spectrum(700, 900, power_law(0.5)),
    "power law 1": lambda: with_spectrum(900, 700, power_law(1)),
    "in noise": lambda: with_spectrum(900, 800, bulk(0.15, 0.8)),
    "difference of bfloat16": lambda: torch.randn(900, 700).to(BF16).float() - torch.randn(900, 700).to(BF16).float(),
    "smaller than its blocks": lambda: torch.randn(50, 60),
    "tall and thin": lambda: torch.randn(2000, 20),
}
# Matrices with directions in which the iteration finds nothing: it ends early, or its blocks are rounding errors.
DEGENERATE = {
    "rank 3": lambda: torch.randn(300, 3) @ torch.randn(3, 400),
    "rank 3 in bfloat16": lambda: (torch.randn(300, 3) @ torch.randn(3, 400)).to(BF16).float(),
    "one element": lambda: torch.zeros(300, 400).index_put_((torch.tensor(7), torch.tensor(9)), torch.tensor(2e-3)),
    "three rows": lambda: torch.cat([torch.zeros(200, 400), torch.randn(3, 400)]),
    "three columns": lambda: torch.cat([torch.zeros(300, 400), torch.randn(300, 3)], 1),
    "equal elements": lambda: torch.full((300, 400), 0.1),
    "identity": lambda: torch.eye(300),
    "half an identity": lambda: torch.block_diag(torch.eye(200), torch.zeros(100, 200)),
}


def best(matrix: Tensor, rank: int) -> float:
    squares = torch.linalg.svdvals(matrix.double()).square()
    return float(squares[:rank].sum() / squares.sum())


def assert_orthonormal(vectors: Tensor) -> None:
    exact = vectors.double()
    torch.testing.assert_close(exact @ exact.t(), torch.eye(len(vectors)).double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rank", [1, 16, 19])
@pytest.mark.parametrize("kind", MATRICES)
def test_factors_keep_what_the_best_ones_keep(kind: str, rank: int) -> None:
    """To 0.5 % for random matrices, whose singular values are closest together, to 0.01 % for others, with 0.002 % due
    to rounding. The reported energy and cosine match the expanded delta in float64."""
    matrix = MATRICES[kind]()
    delta, fit = factorise(rows_of(matrix), matrix.shape[1], rank, norm(matrix), kind)
    assert (delta.shape, delta.rank, delta.dtype) == (matrix.shape, rank, BF16)
    exact, stored = matrix.double().flatten(), (delta.left.double() @ delta.right.double()).flatten()
    kept = 1 - float((exact - stored).square().sum() / exact.square().sum())
    assert fit.kept_energy == pytest.approx(kept, abs=1e-6)
    assert fit.cosine == pytest.approx(float(exact @ stored / exact.norm() / stored.norm()), abs=1e-6)
    loss = 5e-3 if "random" in kind or "difference" in kind else 1e-4
    assert best(matrix, rank) * (1 - loss) < kept < best(matrix, rank) + 1e-6
    _, before_rounding = top_right_singular_vectors(matrix, rank, kind)
    assert kept > before_rounding * (1 - 2e-5)


@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_matrices(kind: str) -> None:
    """Everything within the rank is kept, up to bfloat16 rounding, and the vectors are still orthonormal."""
    matrix = DEGENERATE[kind]()
    vectors, energy = top_right_singular_vectors(matrix, 16)
    assert_orthonormal(vectors)
    assert energy == pytest.approx(best(matrix, 16), rel=2e-5)
    _, fit = factorise(rows_of(matrix), matrix.shape[1], 16, norm(matrix), kind)
    assert fit.kept_energy == pytest.approx(best(matrix, 16), rel=2e-5)


def test_a_delta_of_zeros() -> None:
    delta, fit = factorise(rows_of(torch.zeros(30, 40)), 40, 3, 0.0, "")
    assert (fit.kept_energy, fit.cosine, delta.norm()) == (None, None, 0.0)
    vectors, energy = top_right_singular_vectors(torch.zeros(30, 40), 3)
    assert_orthonormal(vectors)
    assert energy == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e15])
def test_neither_tiny_nor_huge_deltas_lose_anything(scale: float) -> None:
    """Although the squares of their elements are outside float32's range."""
    matrix = with_spectrum(300, 200, power_law(0.5))
    _, expected = factorise(rows_of(matrix), 200, 16, norm(matrix), "")
    scaled = matrix * scale
    _, fit = factorise(rows_of(scaled), 200, 16, norm(scaled), "")
    assert fit.kept_energy == pytest.approx(expected.kept_energy, rel=1e-5)


def gapped() -> Tensor:
    """A matrix with 16 singular values, and others far below."""
    return with_spectrum(300, 500, torch.cat([torch.linspace(3, 2, 16, dtype=torch.float64), power_law(0.3) * 0.3]))


def kinds(matrix: Tensor) -> Iterator[Delta]:
    yield matrix
    yield matrix.to(BF16)
    yield quantize(matrix, torch.int8)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    yield LowRankDelta((u[:, :40] * s[:40]).contiguous(), v[:40].contiguous())
    yield LowRankDelta((u[:, :16] * s[:16]).to(BF16).contiguous(), v[:16].to(BF16).contiguous())


@pytest.mark.parametrize("kind", range(5))
def test_vectors_span_what_lapacks_do(kind: int) -> None:
    """As projections, to 2e-5, since the vectors may be rotated within the span; its energy to 1e-5. (For a delta with
    a gap below its 16th singular value; otherwise the answer is not unique.)"""
    delta = list(kinds(gapped()))[kind]
    vectors, energy = top_right_singular_vectors(delta, 16)
    assert (vectors.shape, vectors.dtype) == ((16, 500), torch.float32)
    assert vectors.is_contiguous()
    _, values, right = torch.linalg.svd(expanded(delta).double(), full_matrices=False)
    assert_orthonormal(vectors)
    projection, expected = vectors.double().t() @ vectors.double(), right[:16].t() @ right[:16]
    assert float(torch.linalg.matrix_norm(projection - expected, 2)) < 2e-5
    assert energy == pytest.approx(float(values[:16].square().sum() / values.square().sum()), rel=1e-5)


def test_more_vectors_than_the_factors_rank() -> None:
    delta = LowRankDelta(torch.randn(30, 2), torch.randn(2, 9))
    vectors, energy = top_right_singular_vectors(delta, 9)
    assert_orthonormal(vectors)
    product = delta.expand()
    torch.testing.assert_close(product @ vectors[:2].t() @ vectors[:2], product, rtol=1e-4, atol=1e-5)
    assert energy == pytest.approx(1.0)


@pytest.mark.parametrize(("shape", "rank"), [((5,), 1), ((2, 3, 4), 1), ((5, 3), 4), ((5, 3), 0)])
def test_what_has_no_such_vectors(shape: tuple[int, ...], rank: int) -> None:
    with pytest.raises(ValueError, match=f"does not have {rank} right singular vectors"):
        top_right_singular_vectors(torch.randn(shape), rank)


def bits(matrix: Tensor, seed: str) -> list[Tensor]:
    delta, _ = factorise(rows_of(matrix), matrix.shape[1], 8, norm(matrix), seed)
    return [delta.left, delta.right, top_right_singular_vectors(matrix, 8, seed)[0]]


def test_the_bits_follow_from_matrix_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not depend on the number of threads, torch's or ours, or on torch's generator."""
    monkeypatch.setattr(singular, "_TILE", 1 << 14)  # many tiles
    matrix = torch.randn(700, 300)
    expected = bits(matrix, "name")
    before = torch.get_num_threads()
    for torchs, ours in ((1, 1), (2, 3), (4, 2)):
        monkeypatch.setattr(threads, "WORKERS", ours)
        torch.set_num_threads(torchs)
        torch.manual_seed(ours)
        try:
            assert all(map(torch.equal, bits(matrix, "name"), expected))
            assert torch.get_num_threads() == torchs
        finally:
            torch.set_num_threads(before)
    assert not any(map(torch.equal, bits(matrix, "other"), expected))


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_changes_the_bits(setting: str) -> None:
    matrix = torch.randn(70, 300)
    expected = bits(matrix, "")
    with SETTINGS[setting]():
        assert all(map(torch.equal, bits(matrix, ""), expected))

"""Powers of beta, and sums over rows: the same order of operations wherever they are computed."""

from __future__ import annotations

import math
from fractions import Fraction

import grid
import pytest
import torch
from problems import DEVICE, F32, assert_same_bits

from drift_kernels.kernels import counts
from drift_kernels.kernels.coefficients import UNSCALED, CoefficientTable, Hyperparameters, OrderedSum
from drift_kernels.kernels.filling import MAX_GROUPS, Filling

begin = grid.begin


def test_powers_are_the_same_as_numbers_as_vectors_and_in_the_kernel() -> None:
    some = [0, 1, 2, 3, 7, 8, 255, 256, 257, 999, 65_535, 65_536, 10**6, 2**24 - 1, 2**24]
    some += torch.randint(2**24, (700,)).tolist()
    n = len(some)
    betas = torch.rand(2, n, dtype=torch.float64)
    betas[1] = 1 - 10 ** (-6 * betas[1])
    steps = torch.tensor(some, dtype=F32)
    powered = counts.powers(counts.squares(betas), steps)
    for beta, found in zip(betas, powered, strict=True):
        for b, t, value in zip(beta.tolist(), some, found.tolist(), strict=True):
            assert counts.power(b, t) == value
            if t < 300 and value > 1e-290:
                exact = Fraction(b) ** t
                assert abs(Fraction(value) - exact) <= exact * Fraction(t, 2**52), (b, t)

    table = CoefficientTable(torch.device("cpu"), steps - 1, [0.0] * n, [0.0] * n)
    other = CoefficientTable(torch.device("cpu"), steps - 1, [0.0] * n, [0.0] * n)
    groups = []
    for row in range(n):
        h = Hyperparameters(0.1, *betas[:, row].tolist(), 1e-8, 0.1, False, 0.0, "absolute", False)
        table.set_hyperparameters(slice(row, row + 1), h)
        groups.append(h)
    table.advance()
    table.set_gradient_coefficients(table.bias(with_stats=False), None)
    found = torch.empty_like(other.table)
    for first in range(0, n, MAX_GROUPS):
        some_groups = groups[first : first + MAX_GROUPS]
        other = CoefficientTable(torch.device("cpu"), steps - 1, [0.0] * n, [0.0] * n)
        group_of = [min(max(row - first, 0), len(some_groups) - 1) for row in range(n)]
        filling = Filling(other, group_of)
        filling.prepare(some_groups, UNSCALED, advances=True, with_stats=False, max_grad_norm=None)
        grid.fill_coefficients(filling)
        found[first : first + MAX_GROUPS] = other.table[first : first + MAX_GROUPS]
    assert_same_bits([found], [table.table])


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("n", [1, 3, 40])
def test_corrections_follow_counts_and_betas_row_by_row(n: int, on_host: bool) -> None:
    """Rows that were equal may differ later. Compared with the formulas, number by number."""
    steps, betas = torch.zeros(n), [(0.9, 0.999)] * n
    rows = counts.HostCounts(steps, torch.device("cpu")) if on_host else counts.DeviceCounts(steps)
    rows.set_betas(slice(0, n), *betas[0])
    for change in ("none", "counts", "betas", "count", "all"):
        if change == "counts":
            steps += 7
        elif change == "betas":
            betas[n - 1] = (0.8, 0.95)
            rows.set_betas(slice(n - 1, n), *betas[n - 1])
        elif change == "count":
            steps[n // 2] += 1
        elif change == "all":
            steps += torch.randint(1000, (n,))
            betas = [(row / n, 1 - 0.1 ** (row % 12 + 1)) for row in range(n)]
            for row in range(n):
                rows.set_betas(slice(row, row + 1), *betas[row])
        found = rows.corrections()
        for row, (count, (beta1, beta2)) in enumerate(zip(steps.tolist(), betas, strict=True)):
            bc1, bc2 = (1 - counts.power(beta, int(count)) for beta in (beta1, beta2))
            expected = (bc1, 1 / math.sqrt(bc2) if bc2 else math.inf, count)
            assert tuple(float(column[row]) for column in found) == expected, (change, row)


@pytest.mark.parametrize("n", [1, 2, 3, 255, 511, 512, 513, 1700])
def test_the_order_of_a_sum(n: int) -> None:
    numbers = torch.randn(n, dtype=torch.float64) * 10 ** torch.linspace(-8, 8, n, dtype=torch.float64)
    ordered = OrderedSum(n, DEVICE)
    for _ in range(2):  # it can be filled again
        ordered.addends.copy_(numbers)
        lanes = [0.0] * 512
        for row, number in enumerate(numbers.tolist()):
            lanes[row % 512] += number
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [lanes[lane] + lanes[lane + half] for lane in range(half)]
        assert float(ordered.total()) == lanes[0]

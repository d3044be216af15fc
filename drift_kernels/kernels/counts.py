"""Step counts and the bias corrections 1 - beta1^t and 1/sqrt(1 - beta2^t), bitwise identical on every device.

The pow functions of different libraries differ in the last bit. So a power is computed by multiplications in a fixed
order: with x_k = beta^(2^k) (each the square of the one before) if bit k of t is set, and x_k = 1 otherwise,

    beta^t = the product of x_0 ... x_31 over a tree of neighbours: ((x_0*x_1)*(x_2*x_3)) * ...

csrc/cuda/coefficients.h does the same. Counts on the host are computed there, equal ones once; counts on a GPU are
never read by the host.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..formats.rounding import sqrt64

BITS = 32
MANY = 8  # with more distinct pairs of count and betas, vectors are faster than Python numbers


def product(leaves: Tensor) -> Tensor:
    """The product of [2^k, ...] over the first dimension, as a tree of neighbours."""
    while len(leaves) > 1:
        leaves = leaves[0::2] * leaves[1::2]
    return leaves[0]


def squares(betas: Tensor) -> Tensor:
    """float64 [32, ...]: betas^(2^k)."""
    leaves = [betas]
    for _ in range(BITS - 1):
        leaves.append(leaves[-1] * leaves[-1])
    return torch.stack(leaves)


def powers(squared: Tensor, counts: Tensor) -> Tensor:
    """betas^counts, given `squares(betas)`, [32, 2, n], and counts, [n]."""
    bits = torch.arange(BITS, dtype=torch.int64, device=counts.device)[:, None, None]
    return product(torch.where(counts.to(torch.int64) >> bits & 1 != 0, squared, 1.0))


def power(beta: float, count: int) -> float:
    """The same for two numbers."""
    low, second, third, high = (_of_byte(beta, place, count >> 8 * place & 255) for place in range(BITS // 8))
    return (low * second) * (third * high)


@lru_cache(maxsize=4096)
def _of_byte(beta: float, place: int, byte: int) -> float:
    """The subtree of eight bits of the count."""
    if byte == 0:
        return 1.0
    for _ in range(8 * place):
        beta *= beta
    leaves = []
    for bit in range(8):
        leaves.append(beta if byte >> bit & 1 else 1.0)
        beta *= beta
    while len(leaves) > 1:
        leaves = [a * b for a, b in zip(leaves[0::2], leaves[1::2], strict=True)]
    return leaves[0]


class Corrections(NamedTuple):
    """float64 [n] each, on the device: 1 - beta1^t, 1/sqrt(1 - beta2^t), and t."""

    bc1: Tensor
    inv_sqrt_bc2: Tensor
    counts: Tensor


class Counts(Protocol):
    def set_betas(self, rows: slice, beta1: float, beta2: float) -> None:
        """Set the betas of these rows."""

    def corrections(self) -> Corrections:
        """Return the corrections for the current counts."""


class HostCounts:
    """Counts on the host, for a table on `device`. Equal rows are computed once."""

    def __init__(self, steps: Tensor, device: torch.device) -> None:
        self._steps = steps.numpy()  # the same memory
        self._betas = np.zeros((2, len(steps)))
        self._device = device
        self._sent = torch.empty(len(Corrections._fields), len(steps), dtype=torch.float64, device="cpu")
        self._out = self._sent.numpy()
        self._here = Corrections._make(self._sent.unbind())
        self._first: np.ndarray = np.empty(0, np.int64)  # the first row of each kind
        self._kind: np.ndarray = np.empty(0, np.int64)  # the kind of each row
        self._known = False

    def set_betas(self, rows: slice, beta1: float, beta2: float) -> None:
        self._betas[0, rows], self._betas[1, rows] = beta1, beta2
        self._known = False

    def corrections(self) -> Corrections:
        # All counts advance together, so equal rows stay equal unless users write to them.
        if not (self._known and self._as_known()):
            kinds = np.vstack((self._steps, self._betas))
            _, self._first, self._kind = np.unique(kinds, axis=1, return_index=True, return_inverse=True)
            self._kind = self._kind.reshape(-1)
            self._known = True
        values = self._of_kinds(self._betas[:, self._first], self._steps[self._first])
        if len(self._first) == 1:
            self._out[:] = values
        else:
            np.take(values, self._kind, axis=1, out=self._out)
        if self._device.type == "cpu":
            return self._here
        return Corrections._make(self._sent.to(self._device, non_blocking=True).unbind())

    def _as_known(self) -> bool:
        firsts = self._steps[self._first]
        return bool((self._steps == (firsts if len(firsts) == 1 else firsts[self._kind])).all())

    def _of_kinds(self, betas: np.ndarray, counts: np.ndarray) -> list[list[float]] | np.ndarray:
        """[3, kinds]."""
        if len(counts) > MANY:
            given = torch.from_numpy(counts)
            return np.stack([t.numpy() for t in _corrected(powers(squares(torch.from_numpy(betas)), given), given)])
        rows = []
        for beta1, beta2, count in zip(*betas.tolist(), counts.tolist(), strict=True):
            bc2 = 1 - power(beta2, int(count))
            rows.append((1 - power(beta1, int(count)), 1 / math.sqrt(bc2) if bc2 > 0 else math.inf, count))
        return [list(column) for column in zip(*rows, strict=True)]


class DeviceCounts:
    """Counts on the table's device, which the host never reads."""

    def __init__(self, steps: Tensor) -> None:
        self._steps = steps
        self._betas = torch.zeros(2, len(steps), dtype=torch.float64, device=steps.device)
        self._squares: Tensor | None = None

    def set_betas(self, rows: slice, beta1: float, beta2: float) -> None:
        self._betas[0, rows], self._betas[1, rows] = beta1, beta2
        self._squares = None

    def corrections(self) -> Corrections:
        if self._squares is None:
            self._squares = squares(self._betas)
        return _corrected(powers(self._squares, self._steps), self._steps)


def _corrected(powered: Tensor, counts: Tensor) -> Corrections:
    bc1, bc2 = (1 - powered).unbind()
    return Corrections(bc1, sqrt64(bc2).reciprocal(), counts.double())


def counts_of(steps: Tensor, device: torch.device) -> Counts:
    return HostCounts(steps, device) if steps.device.type == "cpu" else DeviceCounts(steps)

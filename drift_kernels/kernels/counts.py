"""Step counts, and what they make of a step: 1 - beta1^t and 1/sqrt(1 - beta2^t), the same bits wherever computed.

Libraries' pow differ in the last bit. Here a power is multiplications in a fixed order: with x_k = beta^(2^k) where bit
k of t is set, and 1 elsewhere, each square made of the one before,

    beta^t = the product of x_0 ... x_31 by a tree of neighbours: ((x_0*x_1)*(x_2*x_3)) * ...

csrc/cuda/coefficients.h has the same. Counts on the host are looked at there, equal ones once; those on a GPU never.
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
MANY = 8  # different counts and betas, from which on vectors take less time than numbers


def product(leaves: Tensor) -> Tensor:
    """Of [2^k, ...] over the first dimension, by a tree of neighbours."""
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
    """betas^counts, of `squares(betas)`, [32, 2, n], and counts, [n]."""
    bits = torch.arange(BITS, dtype=torch.int64, device=counts.device)[:, None, None]
    return product(torch.where(counts.to(torch.int64) >> bits & 1 != 0, squared, 1.0))


def power(beta: float, count: int) -> float:
    """The same of two numbers."""
    low, second, third, high = (_of_byte(beta, place, count >> 8 * place & 255) for place in range(BITS // 8))
    return (low * second) * (third * high)


@lru_cache(maxsize=4096)
def _of_byte(beta: float, place: int, byte: int) -> float:
    """The part of the tree above eight bits of the count."""
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
        """Those of these rows."""

    def corrections(self) -> Corrections:
        """For the counts as they are."""


class HostCounts:
    """Of counts on the host, for a table on `device`. Rows that are equal are computed once."""

    def __init__(self, steps: Tensor, device: torch.device) -> None:
        self._steps = steps.numpy()  # the same memory
        self._betas = np.zeros((2, len(steps)))
        self._device = device
        self._sent = torch.empty(len(Corrections._fields), len(steps), dtype=torch.float64, device="cpu")
        self._out = self._sent.numpy()
        self._here = Corrections._make(self._sent.unbind())
        self._first: np.ndarray = np.empty(0, np.int64)  # of each kind of row, the first
        self._kind: np.ndarray = np.empty(0, np.int64)  # of each row
        self._known = False

    def set_betas(self, rows: slice, beta1: float, beta2: float) -> None:
        self._betas[0, rows], self._betas[1, rows] = beta1, beta2
        self._known = False

    def corrections(self) -> Corrections:
        # All counts rise together, so that rows which are equal stay so, but for what users write into them.
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
        return Corrections._make(self._sent.to(self._device, non_blocking=True).unbind())  # blocking, it would wait

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
    """Of counts on the table's device, which the host does not read."""

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

"""Tensors as they were when something was prepared for them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor


class Seen:
    """Whether tensors are the very same as before, and all still there. It keeps none of them alive.

    An id is an object's own for as long as it lives; of one that has gone, a weak reference tells. So
    `torch.utils.swap_tensors`, which refuses tensors with weak references, refuses these for as long as this lives.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._ids = _ids(tensors)
        self._gone: list[object] = []
        self._refs = [weakref.ref(tensor, self._gone.append) for tensor in tensors]

    def are(self, tensors: Iterable[Tensor]) -> bool:
        """It is asked in every step, of thousands of them."""
        return _ids(tensors) == self._ids and not self._gone


def _ids(things: Iterable[object]) -> bytes:
    """The id of each. As bytes: thousands of Python's integers take longer to make and to compare than all else."""
    return np.fromiter(things, dtype=object).tobytes()

"""A record of tensors, to detect when one of them is replaced."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor


class Seen:
    """A check that tensors are still the same objects as before. It does not keep them alive.

    Ids identify objects that are alive, and weak references tell which ones are gone. As a consequence,
    `torch.utils.swap_tensors`, which refuses tensors with weak references, refuses these while this object exists.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._ids = _ids(tensors)
        self._gone: list[object] = []
        self._refs = [weakref.ref(tensor, self._gone.append) for tensor in tensors]

    def are(self, tensors: Iterable[Tensor]) -> bool:
        """Whether these are the same tensors, all still alive. Called in every step, with thousands of tensors."""
        return _ids(tensors) == self._ids and not self._gone


def _ids(things: Iterable[object]) -> bytes:
    """The id of each object, as bytes: thousands of Python integers would dominate the cost of the comparison."""
    return np.fromiter(things, dtype=object).tobytes()

"""Objects as they were when a plan was made for them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import numpy as np
from torch import Tensor


class Seen:
    """Tensors, and what else lay between them: whether others are the very same, and all still there.

    It keeps no tensor alive. (Of what is no tensor, one may be taken for another: no plan depends on these.)
    """

    def __init__(self, things: Iterable[object]) -> None:
        things = list(things)
        self._ids = _ids(things)
        self._gone: list[object] = []
        # An id is an object's own for as long as it lives: of one that has gone, `_gone` tells.
        self._refs = [weakref.ref(thing, self._gone.append) for thing in things if isinstance(thing, Tensor)]

    def are(self, things: Iterable[object]) -> bool:
        """It is asked in every step, of thousands of them."""
        return _ids(things) == self._ids and not self._gone


def _ids(things: Iterable[object]) -> bytes:
    """The id of each. As bytes: thousands of Python's integers take longer to make and to compare than all else."""
    return np.fromiter(things, dtype=object).tobytes()

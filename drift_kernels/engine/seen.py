"""Objects as they were when a plan was made for them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import chain

import numpy as np
from torch import Tensor


class Seen:
    """Whether things are the very same as before, and all still there. It keeps none of them alive.

    An id is an object's own for as long as it lives; of one that has gone, a weak reference tells. There are none to
    what lasts: `torch.utils.swap_tensors`, by which modules may be converted, refuses tensors with weak references.

    Args:
        lasting: things that live for as long as the others do.
        others: tensors, and what else lies between them, of which one may be taken for another.
    """

    def __init__(self, lasting: Iterable[object], others: Iterable[object]) -> None:
        others = list(others)
        self._ids = _ids(chain(lasting, others))
        self._gone: list[object] = []
        self._refs = [weakref.ref(thing, self._gone.append) for thing in others if isinstance(thing, Tensor)]

    def are(self, things: Iterable[object]) -> bool:
        """`things`: what lasts, then the others. It is asked in every step, of thousands of them."""
        return _ids(things) == self._ids and not self._gone


def _ids(things: Iterable[object]) -> bytes:
    """The id of each. As bytes: thousands of Python's integers take longer to make and to compare than all else."""
    return np.fromiter(things, dtype=object).tobytes()

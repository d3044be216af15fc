"""What tensors are at this moment: the host looks before every step, so that no kernel is given what has moved, or has
another shape or dtype than its plan says."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..sharding import dtensor_type, local
from ..torch_private import LOCAL_TENSOR
from .layout import mismatch

try:
    from drift_kernels import _cpu
except ImportError:  # installed without a compiler; cpu.py keeps the reason
    _compiled = False
else:
    _compiled = mismatch(_cpu, "cpu") is None and hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


class Description(NamedTuple):
    """Of several tensors (of a DTensor, what this rank holds), and of what lies between them.

    Attributes:
        addresses: int64 each; 0 for what is no tensor, and for one without memory of its own.
        facts: equal where all shapes, dtypes and devices are, and whether there is memory.
        contiguous: whether all the tensors are.
    """

    addresses: bytes
    facts: object
    contiguous: bool


def describe(tensors: list[Any], *, exact: bool = False) -> Description:
    """Of tensors and None; if `exact`, facts are equal only for the very same objects with the same strides."""
    if _compiled:
        return Description(*_cpu.describe(_describer(dtensor_type()), tensors, exact))
    return _by_getters(tensors, exact)


def describe_values(dicts: dict[Any, dict[str, Any]]) -> Description:
    """Of all the values of the values, in order, exactly."""
    if _compiled:
        return Description(*_cpu.describe_values(_describer(dtensor_type()), dicts))
    return _by_getters(chain.from_iterable((*values.values(), None) for values in dicts.values()), True)


@cache
def _describer(dtensor: type | None) -> Any:
    """By DLPack's exchange API, which takes 20 to 60 ns a tensor."""
    return _cpu.Describer(torch.Tensor.__dlpack_c_exchange_api__, torch.Tensor, dtensor, LOCAL_TENSOR)


def _by_getters(things: Iterable[Any], exact: bool) -> Description:
    """By Python's getters, which takes several times as long."""
    own = [local(thing) if isinstance(thing, Tensor) else None for thing in things]
    addresses = array("q", [0 if tensor is None else address_of(tensor) for tensor in own])
    facts = [
        None if t is None else (t.shape, t.dtype, t.device, t.layout, address != 0 or t.numel() == 0)
        for t, address in zip(own, addresses, strict=True)
    ]
    dense = [t for t in own if t is not None and t.layout == torch.strided]
    contiguous = all(t.is_contiguous() for t in dense)
    strides = [t.stride() for t in dense] if exact and not contiguous else None
    return Description(addresses.tobytes(), (facts, strides, list(map(id, own)) if exact else None), contiguous)


def address_of(tensor: Tensor) -> int:
    """Where its elements are; 0 if it has none, or no memory of its own: sparse, on the meta device, freed, fake, or a
    wrapper around other tensors."""
    try:
        return tensor.data_ptr() if tensor.untyped_storage().data_ptr() else 0
    except RuntimeError:
        return 0

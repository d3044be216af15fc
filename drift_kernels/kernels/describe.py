"""The current addresses, shapes and dtypes of tensors. The host checks these before every step, so that no kernel gets
a tensor that has moved or no longer matches its plan."""

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
    """A description of several tensors (for a DTensor, of its local tensor) and of any other objects among them.

    Attributes:
        addresses: int64 each; 0 for an object that is not a tensor, or for a tensor without its own memory.
        facts: compares equal if all shapes, dtypes and devices are equal, and the same tensors have memory.
        contiguous: whether all tensors are contiguous.
    """

    addresses: bytes
    facts: object
    contiguous: bool


def describe(tensors: list[Any], *, exact: bool = False) -> Description:
    """Describe tensors and Nones. If `exact`, facts are equal only for the same objects with the same strides."""
    if _compiled:
        return Description(*_cpu.describe(_describer(dtensor_type()), tensors, exact))
    return _by_getters(tensors, exact)


def describe_values(dicts: dict[Any, dict[str, Any]]) -> Description:
    """Describe all values of the inner dicts, in order, with `exact`."""
    if _compiled:
        return Description(*_cpu.describe_values(_describer(dtensor_type()), dicts))
    return _by_getters(chain.from_iterable((*values.values(), None) for values in dicts.values()), True)


@cache
def _describer(dtensor: type | None) -> Any:
    """Uses DLPack's exchange API, which takes 20 to 60 ns per tensor."""
    return _cpu.Describer(torch.Tensor.__dlpack_c_exchange_api__, torch.Tensor, dtensor, LOCAL_TENSOR)


def _by_getters(things: Iterable[Any], exact: bool) -> Description:
    """The same with Python's getters, several times slower."""
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
    """The address of its elements; 0 if it has none, or no memory of its own: if it is sparse, on the meta device,
    freed, fake, or a wrapper around other tensors."""
    try:
        return tensor.data_ptr() if tensor.untyped_storage().data_ptr() else 0
    except RuntimeError:
        return 0

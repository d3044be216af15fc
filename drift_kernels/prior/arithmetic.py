"""The computations of a build on each piece: the delta, the inner products that describe it, and checksums of what was
read.

They take one compiled pass (csrc/cpu/subtract.h) if the package was built with a compiler and supports the dtypes, and
otherwise run in torch, with the same deltas and checksums.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.layout import mismatch
from .files import byte_view
from .quantized import QuantizedDelta, quantize

try:
    from drift_kernels import _cpu
except ImportError:  # installed without a compiler; kernels/cpu.py keeps the reason
    _compiled = False
else:  # these functions do not use the layout, but an extension with another layout may have other functions
    _compiled = mismatch(_cpu, "cpu") is None

_COMPILED_WEIGHTS = (torch.bfloat16, torch.float16, torch.float32)
_CHECKSUM_ROW = 1024  # words


class Products(NamedTuple):
    """Inner products in float64. `delta` is the stored delta; `exact` is the float32 delta, if that is quantised."""

    expert_expert: float = 0.0
    expert_base: float = 0.0
    base_base: float = 0.0
    delta_delta: float = 0.0
    delta_exact: float = 0.0
    exact_exact: float = 0.0

    def plus(self, other: Products) -> Products:
        return Products._make(a + b for a, b in zip(self, other, strict=True))


def subtract(expert: Tensor, base: Tensor, origin: Tensor, delta: Tensor) -> Products:
    """Set delta = expert - origin, computed in float32 and rounded to delta's dtype; return the inner products.

    All are 1-D, contiguous CPU tensors of equal length.
    """
    dtypes = {tensor.dtype for tensor in (expert, base, origin)}
    if _compiled and dtypes.issubset(_COMPILED_WEIGHTS):
        if len(dtypes) > 1:
            same = origin is base
            expert, base = expert.float(), base.float()
            origin = base if same else origin.float()
        weight_dtype, delta_dtype = (str(tensor.dtype).removeprefix("torch.") for tensor in (expert, delta))
        sources = expert.data_ptr(), base.data_ptr(), origin.data_ptr()
        return Products(*_cpu.subtract(*sources, delta.data_ptr(), delta.numel(), weight_dtype, delta_dtype))
    delta.copy_(expert.float() - origin.float())
    return Products(dot(expert, expert), dot(expert, base), dot(base, base), dot(delta, delta))


def subtract_quantized(
    expert: Tensor, base: Tensor, origin: Tensor, exact: Tensor, dtype: torch.dtype
) -> tuple[QuantizedDelta, Products]:
    """Like `subtract`, with exact = expert - origin in float32; return the delta, which is `exact` as codes of
    `dtype`."""
    products = subtract(expert, base, origin, exact)
    delta = quantize(exact, dtype)
    expanded = delta.expand()
    return delta, products._replace(
        delta_delta=dot(expanded, expanded), delta_exact=dot(expanded, exact), exact_exact=products.delta_delta
    )


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product of two floating-point tensors, in float64."""
    return torch.dot(a.double(), b.double()).item()


def checksum(flat: Tensor) -> bytes:
    """Return a checksum of the bytes of a 1-D CPU tensor, at close to memory speed; a cryptographic hash of all bytes
    would take longer than the build.

    The bytes are arranged in rows of 64-bit words, and every row and every column is summed modulo 2^64. Any change of
    fewer than four words is detected: if it cancels in the sums of rows, it shows in those of columns. This protects
    against accidents, not against forgery.
    """
    content = flat.view(torch.uint8)
    size = content.numel() // (8 * _CHECKSUM_ROW) * 8 * _CHECKSUM_ROW
    words = content[:size].view(torch.int64).view(-1, _CHECKSUM_ROW)
    if _compiled:
        rows = torch.empty(len(words), dtype=torch.int64, device="cpu")
        columns = torch.zeros(_CHECKSUM_ROW, dtype=torch.int64, device="cpu")
        _cpu.sum_words(words.data_ptr(), len(words), _CHECKSUM_ROW, rows.data_ptr(), columns.data_ptr())
    else:
        rows, columns = words.sum(1), words.sum(0)
    digest = hashlib.sha256()
    for part in (columns, rows, content[size:]):
        digest.update(byte_view(part))
    return digest.digest()

"""What a build computes of each piece: the delta, the inner products that describe it, and checksums of what was read.

In one compiled pass (csrc/cpu/subtract.h) where the package was built with a compiler and the dtypes allow; otherwise
in torch, with the same deltas and the same checksums.
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
else:  # these two functions know no layout; but with another one they are of other sources, and may be others too
    _compiled = mismatch(_cpu, "cpu") is None

_COMPILED_WEIGHTS = (torch.bfloat16, torch.float16, torch.float32)
_CHECKSUM_ROW = 1024  # words


class Products(NamedTuple):
    """Inner products in float64. `delta` is the delta as stored; `exact`, where it is quantised, the one in float32."""

    expert_expert: float = 0.0
    expert_base: float = 0.0
    base_base: float = 0.0
    delta_delta: float = 0.0
    delta_exact: float = 0.0
    exact_exact: float = 0.0

    def plus(self, other: Products) -> Products:
        return Products._make(a + b for a, b in zip(self, other, strict=True))


def subtract(expert: Tensor, base: Tensor, origin: Tensor, delta: Tensor) -> Products:
    """delta = expert - origin, in float32, rounded to delta's dtype: 1-D, contiguous CPU tensors of one length."""
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
    """As `subtract`; exact = expert - origin, float32, and the delta is `exact` in codes of `dtype`."""
    products = subtract(expert, base, origin, exact)
    delta = quantize(exact, dtype)
    expanded = delta.expand()
    return delta, products._replace(
        delta_delta=dot(expanded, expanded), delta_exact=dot(expanded, exact), exact_exact=products.delta_delta
    )


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product of two floating tensors, in float64."""
    return torch.dot(a.double(), b.double()).item()


def checksum(flat: Tensor) -> bytes:
    """A checksum of the bytes of a 1-D CPU tensor, near memory speed; a cryptographic one would outlast the build.

    The bytes are laid out as rows of 64-bit words, and every row and every column is summed modulo 2^64. Any change of
    fewer than four words shows, since one that hides in the rows' sums shows in the columns'. It guards against
    accidents, and not against a forger.
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

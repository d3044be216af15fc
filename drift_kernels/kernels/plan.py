"""A Plan is the tensors of one launch: their addresses, once, and those of the gradients, anew when one changes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..formats.philox import WHOLE, Place

# Elements of a chunk, the unit of work and of a reduction's first stage (kChunk in csrc/table.h).
CHUNK = 16384

# The columns of Plan.table: struct Row in csrc/table.h. The first eight are addresses, of operands of these names.
ADDRESSES = (
    "param",
    "residual",
    "exp_avg",
    "exp_avg_scale",
    "exp_avg_sq",
    "exp_avg_sq_scale",
    "delta",
    "delta_scale",
)
ROW_FIELDS = (*ADDRESSES, "numel", "first_chunk", "random_key", "origin", "width", "pitch")
NUMEL, FIRST_CHUNK, RANDOM_KEY = range(len(ADDRESSES), len(ADDRESSES) + 3)
PLACE = slice(len(ADDRESSES) + 3, len(ROW_FIELDS))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


@dataclass(frozen=True)
class Operands:
    """The tensors of one parameter but its gradient, contiguous; None for those that it does not have.

    Attributes:
        exp_avg, exp_avg_sq: of param's shape, float32, bfloat16, or int8 and uint8 codes (formats/blocks.py).
        exp_avg_scale, exp_avg_sq_scale: float32 [blocks], beside codes.
        delta: of param's shape, float32, bfloat16, or int8 or float8_e4m3fn codes of a small prior.
        delta_scale: float32 [blocks], beside codes.
        residual: int16 of param's shape, the other half of a master (`formats.rounding.split`).
        random_key: seed + 2^32 * the parameter's index, for stochastic rounding of what is bfloat16, but a param that
            has a master.
        place: where the tensors lie in the whole ones that they are shards of, for the same.
    """

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    delta: Tensor | None = None
    residual: Tensor | None = None
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None
    delta_scale: Tensor | None = None
    random_key: int | None = None
    place: Place = WHOLE


class Plan:
    """The tensors of one launch, all of one device and one combination of dtypes.

    The plan refers to its operands for its lifetime, and to gradients only between `set_grads` and `release_grads`, so
    that `zero_grad(set_to_none=True)` frees them.

    Args:
        operands: of n parameters; what the first has, all have.
        grad_dtype: dtype that every gradient will have.
    """

    def __init__(self, operands: Sequence[Operands], grad_dtype: torch.dtype) -> None:
        self.operands = list(operands)
        self.grads: list[Tensor] = []
        self.grad_dtype = grad_dtype
        first = self.operands[0]
        self.device = first.param.device
        self.has_deltas = first.delta is not None

        numels = torch.tensor([o.param.numel() for o in self.operands], dtype=torch.int64)
        chunks = (numels + (CHUNK - 1)) // CHUNK
        self.chunk_count = int(chunks.sum())
        self._chunks = chunks
        self.table = torch.zeros(len(self.operands), len(ROW_FIELDS), dtype=torch.int64)  # on the host
        self.table[:, NUMEL] = numels
        self.table[:, FIRST_CHUNK] = chunks.cumsum(0) - chunks
        for column, name in enumerate(ADDRESSES):
            if getattr(first, name) is not None:
                tensors = [getattr(o, name) for o in self.operands]
                self.table[:, column] = torch.tensor(addresses(tensors), dtype=torch.int64)
        if first.random_key is not None:
            self.table[:, RANDOM_KEY] = torch.tensor([o.random_key for o in self.operands], dtype=torch.int64)
            self.table[:, PLACE] = torch.tensor([astuple(o.place) for o in self.operands], dtype=torch.int64)
        self.grad_table = torch.zeros(len(self.operands), dtype=torch.int64)  # the gradients' addresses, on the host
        self._grad_addresses: list[int] = []

    def __len__(self) -> int:
        return len(self.operands)

    def set_grads(self, grads: Sequence[Tensor]) -> None:
        """Takes this step's gradients (a non-contiguous one is copied) and refreshes their addresses if one changed."""
        self.grads = list(grads)
        if not all(map(Tensor.is_contiguous, self.grads)):
            self.grads = [g.contiguous() for g in self.grads]
        grad_addresses = addresses(self.grads)
        if grad_addresses != self._grad_addresses:
            self._grad_addresses = grad_addresses
            self.grad_table = torch.frombuffer(array("q", grad_addresses), dtype=torch.int64)
            self.__dict__.pop("device_grad_table", None)

    def release_grads(self) -> None:
        self.grads = []

    @cached_property
    def device_table(self) -> Tensor:
        """`table` where the kernels can read it: itself on the CPU, otherwise a copy."""
        return self.table.to(self.device)

    @cached_property
    def device_grad_table(self) -> Tensor:
        """`grad_table` likewise, copied again when an address changed."""
        return self.grad_table.to(self.device, non_blocking=True)

    @cached_property
    def chunk_tensor(self) -> Tensor:
        """int32 [chunk_count] on the device: the row that each chunk belongs to."""
        rows = torch.arange(len(self), dtype=torch.int32)
        return rows.repeat_interleave(self._chunks).to(self.device)

    @cached_property
    def partials(self) -> Tensor:
        """float64 [chunk_count, 2] on the device: room for the first stage of `grad_stats`."""
        return torch.empty(self.chunk_count, 2, dtype=torch.float64, device=self.device)

    def dtype_names(self, with_delta: bool) -> tuple[str, str, str, str | None]:
        """The kinds of param, grad, state and delta, which have the names of their dtypes; no delta where there is none
        or it is left out.

        But a bfloat16 with a residual is a `master_bfloat16`, one that is rounded at random a `stochastic_bfloat16`.
        """
        first = self.operands[0]
        delta = dtype_name(first.delta.dtype) if with_delta and first.delta is not None else None
        param = self._kind(first.param.dtype) if first.residual is None else "master_bfloat16"
        return param, dtype_name(self.grad_dtype), self._kind(first.exp_avg.dtype), delta

    def _kind(self, dtype: torch.dtype) -> str:
        at_random = self.operands[0].random_key is not None and dtype == torch.bfloat16
        return f"stochastic_{dtype_name(dtype)}" if at_random else dtype_name(dtype)

"""A Plan: the addresses of the tensors of one launch, read once, and of the gradients, updated when they change."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from functools import cached_property

import torch
from torch import Tensor

from .operands import DTypeNames, DTypes, Operands, dtype_name

# Elements of a chunk, the unit of work and of the first stage of a reduction (kChunk in csrc/table.h).
CHUNK = 16384

# The columns of Plan.table: struct Row in csrc/table.h. The first eight are the addresses of the operands so named.
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


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


class Plan:
    """The tensors of one launch, all on one device and with one combination of dtypes.

    A plan works on addresses and refers to tensors only until `release`. Whoever launches it afterwards must ensure
    that they still exist, and lend the tensors that a backend reads (`operands`, `set_grads`).

    Args:
        operands: those of n parameters; all must have the same tensors as the first.
        grad_dtype: the dtype of every gradient. Kernels read gradients of float32 parameters as float32; others are
            cast.

    Attributes:
        operands: as given, or as lent since; empty after `release`.
        grad_dtype: as given.
        grads: the gradients of this step, contiguous and in the dtype that is read; empty after `release`.
        dtypes: the dtypes of the launch.
        master: whether parameters have a residual.
        at_random: whether bfloat16 states, and bfloat16 parameters without a master weight, are rounded stochastically.
        numel: the total number of elements of all parameters.
        has_empty: whether a parameter has no elements.
        nbytes: the total number of bytes of each operand.
    """

    def __init__(self, operands: Sequence[Operands], grad_dtype: torch.dtype) -> None:
        first = operands[0]
        self.device = first.param.device
        states, deltas = (None if t is None else t.dtype for t in (first.exp_avg, first.delta))
        self.grad_dtype = grad_dtype
        read_as = torch.float32 if first.param.dtype == torch.float32 else grad_dtype
        self.dtypes = DTypes(first.param.dtype, read_as, states, deltas)
        self.master = first.residual is not None
        self.at_random = first.random_key is not None
        self._names = self._kinds()
        self._names_without_delta = (*self._names[:3], None)
        self.operands = list(operands)
        self.grads: list[Tensor] = []
        self._count = len(operands)

        numels = torch.tensor([o.param.numel() for o in operands], dtype=torch.int64, device="cpu")
        chunks = (numels + (CHUNK - 1)) // CHUNK
        self.chunk_count, self.numel = int(chunks.sum()), int(numels.sum())
        self._chunks = chunks
        self.has_empty = bool((numels == 0).any())
        self.table = torch.zeros(len(operands), len(ROW_FIELDS), dtype=torch.int64, device="cpu")
        self.table[:, NUMEL] = numels
        self.table[:, FIRST_CHUNK] = chunks.cumsum(0) - chunks
        self.nbytes: dict[str, int] = {}
        for column, name in enumerate(ADDRESSES):
            if getattr(first, name) is not None:
                tensors = [getattr(o, name) for o in operands]
                self.table[:, column] = torch.tensor(addresses(tensors), dtype=torch.int64, device="cpu")
                self.nbytes[name] = sum(t.nbytes for t in tensors)
        if self.at_random:
            drawn = [[o.random_key, *astuple(o.place)] for o in operands]
            self.table[:, RANDOM_KEY:] = torch.tensor(drawn, dtype=torch.int64, device="cpu")
        self.grad_table = torch.zeros(len(operands), dtype=torch.int64, device="cpu")  # the gradients' addresses
        self._grad_addresses = b""
        self._copied: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return self._count

    @cached_property
    def arrived(self) -> Tensor:
        """int32 [n] on the device, zeros: space to count the chunks whose partial sums are done."""
        return torch.zeros(len(self), dtype=torch.int32, device=self.device)

    @property
    def has_deltas(self) -> bool:
        return self.dtypes.delta is not None

    def set_grads(self, grads: Sequence[Tensor], grad_addresses: bytes | None = None) -> None:
        """Take the gradients of this step, and update their addresses if one has changed. Gradients that are not
        contiguous, or not in the dtype that is read, are copied.

        `grad_addresses`: int64 each, if known; then all gradients must be contiguous.
        """
        self.grads, self._copied = list(grads), []
        if grad_addresses is None or self.grad_dtype != self.dtypes.grad:
            self.grads = [g.to(self.dtypes.grad).contiguous() for g in grads]
            self._copied = [(grad, copy) for grad, copy in zip(grads, self.grads, strict=True) if copy is not grad]
            grad_addresses = array("q", addresses(self.grads)).tobytes()
        if grad_addresses != self._grad_addresses:
            self._grad_addresses = grad_addresses
            self.grad_table = torch.frombuffer(bytearray(grad_addresses), dtype=torch.int64)
            self.__dict__.pop("device_grad_table", None)

    def write_back(self) -> None:
        """Copy the results back to those gradients that were copied."""
        for grad, copy in self._copied:
            grad.copy_(copy)

    def release(self) -> None:
        """Drop all references to tensors, so that their owners can free them (`zero_grad(set_to_none=True)`, say)."""
        self.operands, self.grads, self._copied = [], [], []

    @cached_property
    def device_table(self) -> Tensor:
        """`table` on the device that the kernels run on; no copy on the CPU."""
        return self.table.to(self.device)

    @cached_property
    def device_grad_table(self) -> Tensor:
        """`grad_table` likewise, copied again when an address has changed."""
        return self.grad_table.to(self.device, non_blocking=True)

    @cached_property
    def chunk_tensor(self) -> Tensor:
        """int32 [chunk_count] on the device: the row that each chunk belongs to."""
        rows = torch.arange(len(self), dtype=torch.int32, device="cpu")
        return rows.repeat_interleave(self._chunks).to(self.device)

    @cached_property
    def partials(self) -> Tensor:
        """float64 [chunk_count, 2] on the device: space for the sums of every chunk."""
        return torch.empty(self.chunk_count, 2, dtype=torch.float64, device=self.device)

    def dtype_names(self, with_delta: bool) -> DTypeNames:
        """The dtype names of param, grad, state and delta; None for one that is absent or left out.

        A bfloat16 parameter with a residual is `master_bfloat16`; bfloat16 with stochastic rounding is
        `stochastic_bfloat16`.
        """
        return self._names if with_delta else self._names_without_delta

    def _kinds(self) -> DTypeNames:
        param, grad, state, delta = (None if dtype is None else dtype_name(dtype) for dtype in self.dtypes)
        if self.at_random:
            param, state = (f"stochastic_{name}" if name == "bfloat16" else name for name in (param, state))
        return "master_bfloat16" if self.master else param, grad, state, delta

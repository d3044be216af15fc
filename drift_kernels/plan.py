"""A Plan is the tensors of one launch: their addresses, once, and those of the gradients, anew when one changes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

# Elements of a chunk, the unit of work and of a reduction's first stage (kChunk in csrc/table.h).
CHUNK = 16384

# The columns of Plan.table: struct Row in csrc/table.h.
ROW_FIELDS = ("param", "residual", "exp_avg", "exp_avg_sq", "delta", "numel", "first_chunk", "random_key")
PARAM, RESIDUAL, EXP_AVG, EXP_AVG_SQ, DELTA, NUMEL, FIRST_CHUNK, RANDOM_KEY = range(len(ROW_FIELDS))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


class Plan:
    """The tensors of one launch, all of one device and one combination of dtypes.

    The plan refers to params, states and deltas for its lifetime, and to gradients only between `set_grads` and
    `release_grads`, so that `zero_grad(set_to_none=True)` frees them.

    Args:
        params: n contiguous tensors.
        grad_dtype: dtype that every gradient will have.
        exp_avgs, exp_avg_sqs: n contiguous states of the params' shapes.
        deltas: n contiguous deltas of the params' shapes, or None for a launch without a prior.
        residuals: n contiguous int16 tensors of the shapes of params that are bfloat16, for master weights, or None.
        random_keys: n numbers, seed + 2^32 * the parameter's index, for stochastic rounding of what is bfloat16 (but a
            param that has a master), or None.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grad_dtype: torch.dtype,
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        deltas: Sequence[Tensor] | None,
        residuals: Sequence[Tensor] | None = None,
        random_keys: Sequence[int] | None = None,
    ) -> None:
        self.params = list(params)
        self.grads: list[Tensor] = []
        self.exp_avgs = list(exp_avgs)
        self.exp_avg_sqs = list(exp_avg_sqs)
        self.deltas = None if deltas is None else list(deltas)
        self.residuals = None if residuals is None else list(residuals)
        self.random_keys = None if random_keys is None else list(random_keys)
        self.device = self.params[0].device
        self.param_dtype = self.params[0].dtype
        self.grad_dtype = grad_dtype
        self.state_dtype = self.exp_avgs[0].dtype
        self.delta_dtype = None if self.deltas is None else self.deltas[0].dtype

        numels = torch.tensor([p.numel() for p in self.params], dtype=torch.int64)
        chunks = (numels + (CHUNK - 1)) // CHUNK
        self.chunk_count = int(chunks.sum())
        self._chunks = chunks
        self.table = torch.zeros(len(self.params), len(ROW_FIELDS), dtype=torch.int64)  # on the host
        self.table[:, NUMEL] = numels
        self.table[:, FIRST_CHUNK] = chunks.cumsum(0) - chunks
        for column, tensors in (
            (PARAM, self.params),
            (EXP_AVG, self.exp_avgs),
            (EXP_AVG_SQ, self.exp_avg_sqs),
            (DELTA, self.deltas or []),
            (RESIDUAL, self.residuals or []),
        ):
            self.table[: len(tensors), column] = torch.tensor(addresses(tensors), dtype=torch.int64)
        if self.random_keys is not None:
            self.table[:, RANDOM_KEY] = torch.tensor(self.random_keys, dtype=torch.int64)
        self.grad_table = torch.zeros(len(self.params), dtype=torch.int64)  # the gradients' addresses, on the host
        self._grad_addresses: list[int] = []

    def __len__(self) -> int:
        return len(self.params)

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
        delta = dtype_name(self.delta_dtype) if with_delta and self.delta_dtype is not None else None
        param = self._kind(self.param_dtype) if self.residuals is None else "master_bfloat16"
        return param, dtype_name(self.grad_dtype), self._kind(self.state_dtype), delta

    def _kind(self, dtype: torch.dtype) -> str:
        at_random = self.random_keys is not None and dtype == torch.bfloat16
        return f"stochastic_{dtype_name(dtype)}" if at_random else dtype_name(dtype)

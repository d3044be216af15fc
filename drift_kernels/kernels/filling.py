"""The arguments of a kernel that fills coefficients: addresses, numbers and param groups, in words of 8 bytes.

csrc/filling.h has the same words under the same names; csrc/cuda/coefficients.h computes from them what coefficients.py
computes. The terms of a scaling are passed as numbers, so that a new mode in scalings.py needs no change there.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .coefficients import CoefficientTable, GradScale, Hyperparameters, Row

MAX_GROUPS = 240  # kMaxGroups in csrc/filling.h


def _scalar(name: str) -> tuple[str, str, str]:
    """The words of a scalar: a number, or the address of a tensor and the size of its element in bytes."""
    return name, f"{name}_address", f"{name}_bytes"


FILLING_FIELDS = (
    *("count", "groups", "advances", "with_stats", "clips", "max_grad_norm"),
    *_scalar("scale"),
    *_scalar("found_inf"),
    *("stats", "delta_norm", "inv_delta_norm", "norm_ratio", "factor", "group_of", "steps", "coefficients"),
    *("bias", "cosine", "ratio", "grad_norm"),
)
GROUP_FIELDS = (
    *_scalar("lr"),
    *("weight_decay", "beta1", "beta2", "sign"),
    *_scalar("alpha"),
    *("absolute", "normalized", "by_ratio", "by_cosine", "decoupled", "eps"),
)
_AT = {name: index for index, name in enumerate(FILLING_FIELDS)}
_IN_GROUP = {name: index for index, name in enumerate(GROUP_FIELDS)}


class Filling:
    """The words for filling a table, and the tensors that they point to.

    Args:
        table: the table to fill.
        group_of: the param group of each row.

    Attributes:
        address: the address of the words.
        device: the device of the table.
    """

    def __init__(self, table: CoefficientTable, group_of: list[int]) -> None:
        self.table = table
        self.device = table.table.device
        n = len(group_of)
        self._words = np.zeros(len(FILLING_FIELDS) + MAX_GROUPS * len(GROUP_FIELDS), np.int64)
        self._numbers = self._words.view(np.float64)
        self.address: int = self._words.ctypes.data
        self._groups: dict[int, Hyperparameters] = {}
        # Counts on the host have a copy on the device, where the kernel advances it. If they change otherwise, it is
        # copied again.
        self._counted_on_host = self._is_elsewhere(table)
        self._steps = torch.empty_like(table.steps, device=self.device) if self._counted_on_host else table.steps
        self._expected: Tensor | None = None
        ones = torch.ones(n, dtype=torch.float64, device=self.device)
        self._tensors = {
            "stats": table.stats,
            "delta_norm": table.delta_norm,
            "inv_delta_norm": table.inv_delta_norm,
            "norm_ratio": table.norm_ratio,
            "factor": ones if table.factor is None else table.factor,
            "group_of": torch.tensor(group_of, dtype=torch.int32, device=self.device),
            "steps": self._steps,
            "coefficients": table.table,
            "bias": torch.empty_like(ones),
        }
        self._words[_AT["count"]] = n
        for name, tensor in self._tensors.items():
            self._words[_AT[name]] = tensor.data_ptr()
        self._lent: list[Tensor] = []  # scalars of this step that the kernel still has to read or write

    @staticmethod
    def _is_elsewhere(table: CoefficientTable) -> bool:
        return table.steps.device != table.table.device

    def prepare(
        self,
        groups: list[Hyperparameters],
        grad_scale: GradScale,
        *,
        advances: bool,
        with_stats: bool,
        max_grad_norm: float | None,
    ) -> Tensor | None:
        """Take the values of a step, and allocate the table's statistics. If `advances`, advance counts on the host.

        Returns the tensor that the norm will be written to, float64 []; None without clipping.
        """
        words, table = self._words, self.table
        self._lent = []
        given = (len(groups), advances, with_stats, max_grad_norm is not None)
        words[_AT["groups"] : _AT["max_grad_norm"]] = given
        self._set_scalar(_AT["scale"], 1.0 if grad_scale.scale is None else grad_scale.scale)
        self._set_scalar(_AT["found_inf"], 0.0 if grad_scale.found_inf is None else grad_scale.found_inf)
        for index, h in enumerate(groups):
            before = self._groups.get(index)
            if h.must_be_written(before):
                self._set_group(len(FILLING_FIELDS) + index * len(GROUP_FIELDS), h)
                self._groups[index] = h
        if advances and self._counted_on_host:
            if self._expected is None or not torch.equal(table.steps, self._expected):
                self._steps.copy_(table.steps)
            table.steps += 1
            self._expected = table.steps.clone()
        table.forget_written()
        if not with_stats:
            table.prior_cosine = table.prior_ratio = None
            return None
        table.prior_cosine, table.prior_ratio = figures = torch.empty_like(self._tensors["bias"].expand(2, -1)).unbind()
        words[_AT["cosine"]], words[_AT["ratio"]] = (tensor.data_ptr() for tensor in figures)
        if max_grad_norm is None:
            return None
        norm = torch.empty((), dtype=torch.float64, device=self.device)
        self._lent.append(norm)
        self._numbers[_AT["max_grad_norm"]], words[_AT["grad_norm"]] = max_grad_norm, norm.data_ptr()
        return norm

    def _set_group(self, at: int, h: Hyperparameters) -> None:
        values = {**Row.of(h)._asdict(), "eps": h.eps}
        for name, value in values.items():
            if name in ("lr", "alpha"):
                self._set_scalar(at + _IN_GROUP[name], value)
            else:
                self._numbers[at + _IN_GROUP[name]] = value

    def _set_scalar(self, at: int, value: Tensor | float) -> None:
        if isinstance(value, Tensor):
            # GradScaler's tensors may be on another device; a copy to a GPU is ordered by the stream.
            dtype = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float64
            tensor = value.detach().to(self.device, dtype, non_blocking=self.device.type != "cpu")
            self._lent.append(tensor)
            self._words[at + 1], self._words[at + 2] = tensor.data_ptr(), tensor.element_size()
        else:
            self._numbers[at], self._words[at + 2] = value, 0

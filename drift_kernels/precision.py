"""How parameters and states are held: dtypes, rounding, masters; and the states that this takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("drift_kernels")

STATES = ("exp_avg", "exp_avg_sq")
RESIDUAL = "param_residual"

STATE_DTYPES = (torch.float32, torch.bfloat16)
ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class Precision:
    """What the constructor says of it.

    Attributes:
        state_dtype: of exp_avg and exp_avg_sq, float32 or bfloat16.
        stochastic: whether what is bfloat16 is rounded at random, but a parameter that has a master.
        master_weights: whether a bfloat16 parameter has a residual, which makes it a float32.
    """

    state_dtype: torch.dtype
    stochastic: bool
    master_weights: bool

    @classmethod
    def of(cls, state_dtype: torch.dtype, rounding: str, master_weights: bool) -> Precision:
        """Raises ValueError for a dtype or a rounding that there is not; warns of states that lose their updates."""
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype must be torch.float32 or torch.bfloat16, got {state_dtype}")
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        if state_dtype == torch.bfloat16 and rounding == "nearest":
            logger.warning(
                "bfloat16 states rounded to nearest lose small updates (exp_avg_sq cannot decay at beta2 = 0.999): "
                "rounding='stochastic' keeps them"
            )
        return cls(state_dtype, rounding == "stochastic", bool(master_weights))

    def check_param(self, name: str, param: Tensor) -> None:
        """Raises TypeError, naming the parameter, for one that is not bfloat16 and cannot be held so."""
        asked = "master_weights=True" if self.master_weights else "rounding='stochastic'" if self.stochastic else None
        if asked is not None and param.dtype != torch.bfloat16:
            raise TypeError(f"{asked} is for bfloat16 parameters, and parameter {name} has dtype {param.dtype}")

    def new_state(self, param: Tensor) -> dict[str, Any]:
        """Zeros: the state before the first step. A master begins as its parameter."""
        state = {"step": torch.zeros((), dtype=torch.float32)}
        for key, dtype in self._tensors().items():
            state[key] = torch.zeros(param.shape, dtype=dtype, device=param.device)
        return state

    def check_state(self, name: str, param: Tensor, saved: Mapping[str, Any]) -> None:
        """Raises ValueError, naming the parameter, for a saved state that does not fit it."""
        missing = {"step", *STATES} - set(saved)
        if missing:
            raise ValueError(f"the state of parameter {name} lacks {', '.join(sorted(missing))}: not a state of AdamW")
        for key in (*STATES, RESIDUAL):
            if key in saved and saved[key].shape != param.shape:
                raise ValueError(
                    f"the state {key} of parameter {name} has shape {tuple(saved[key].shape)}, "
                    f"the parameter {tuple(param.shape)}"
                )
        if RESIDUAL in saved and saved[RESIDUAL].dtype != torch.int16:
            raise ValueError(f"the state {RESIDUAL} of parameter {name} has dtype {saved[RESIDUAL].dtype}, not int16")

    def restored_state(self, param: Tensor, saved: Mapping[str, Any]) -> dict[str, Any]:
        """A saved state as this precision holds it, in memory of its own. A master that was not saved begins anew."""
        state = self.new_state(param)
        state["step"].copy_(torch.as_tensor(saved["step"]).reshape(()))
        for key in self._tensors():
            if key in saved:
                state[key].copy_(saved[key])
        return state

    def _tensors(self) -> dict[str, torch.dtype]:
        states = dict.fromkeys(STATES, self.state_dtype)
        return {**states, RESIDUAL: torch.int16} if self.master_weights else states

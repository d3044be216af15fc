"""How parameters and states are held: dtypes, codes, rounding, masters; and the states that this takes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..formats.blocks import BLOCK, MOMENT, VARIANCE, blocks_of, decode_state, encode_state, scale_shape
from ..sharding import is_sharded, keeps_blocks, local, part_for, wrap

STATES = ("exp_avg", "exp_avg_sq")
SCALES = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale"}
RESIDUAL = "param_residual"

# Operands of a plan, and the states that they are.
OPERAND_STATES = {**{key: key for key in (*STATES, *SCALES.values())}, "residual": RESIDUAL}

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
CODES = {"exp_avg": MOMENT, "exp_avg_sq": VARIANCE}
WORTH_CODES = 4096  # elements; smaller tensors have float32 states instead of codes
ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class Precision:
    """What the constructor says of it.

    Attributes:
        state_dtype: of exp_avg and exp_avg_sq, float32, bfloat16, or int8 for codes (formats/blocks.py).
        stochastic: whether what is bfloat16 is rounded at random, but a parameter that has a master.
        master_weights: whether a bfloat16 parameter has a residual, which makes it a float32.
    """

    state_dtype: torch.dtype
    stochastic: bool
    master_weights: bool

    @classmethod
    def of(cls, state_dtype: torch.dtype | str, rounding: str, master_weights: bool) -> Precision:
        """Raises ValueError for a dtype or a rounding that there is not; warns of states that lose their updates."""
        dtype = getattr(torch, state_dtype, None) if isinstance(state_dtype, str) else state_dtype
        if dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype must be torch.float32, torch.bfloat16 or torch.int8, got {state_dtype}")
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        if dtype == torch.bfloat16 and rounding == "nearest":
            warnings.warn(
                "bfloat16 states rounded to nearest lose small updates (exp_avg_sq cannot decay at beta2 = 0.999): "
                "rounding='stochastic' keeps them",
                stacklevel=3,
            )
        return cls(dtype, rounding == "stochastic", bool(master_weights))

    def check_param(self, name: str, param: Tensor) -> None:
        """Raises TypeError, naming the parameter, for one of a dtype that cannot be held so."""
        asked = "master_weights=True" if self.master_weights else "rounding='stochastic'" if self.stochastic else None
        if asked is not None and param.dtype != torch.bfloat16:
            raise TypeError(f"{asked} is for bfloat16 parameters, and parameter {name} has dtype {param.dtype}")
        if self.state_dtype == torch.int8 and param.dtype == torch.float16:
            raise TypeError(f"int8 states are for bfloat16 and float32 parameters, and parameter {name} is float16")

    @torch.inference_mode(False)
    def new_state(self, param: Tensor) -> dict[str, Any]:
        """Zeros, sharded as the parameter is: the state before the first step. A master begins as its parameter."""
        state = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
        coded = self._has_codes(param)
        uncoded = torch.float32 if self.state_dtype == torch.int8 else self.state_dtype
        own = local(param)

        def zeros(dtype: torch.dtype) -> Tensor:
            return wrap(torch.zeros(own.shape, dtype=dtype, device=own.device), param)

        for key in STATES:
            state[key] = zeros(CODES[key] if coded else uncoded)
            if coded:
                scale = torch.zeros(scale_shape(tuple(own.shape)), dtype=torch.float32, device=own.device)
                state[SCALES[key]] = wrap(scale, param, scale_shape(tuple(param.shape)))
        if self.master_weights:
            state[RESIDUAL] = zeros(torch.int16)
        return state

    def _has_codes(self, param: Tensor) -> bool:
        """Whether its states are codes: not those of a small parameter, or of one whose blocks a sharding may cut."""
        enough = self.state_dtype == torch.int8 and param.numel() >= WORTH_CODES
        return enough and (not is_sharded(param) or keeps_blocks(param, BLOCK))

    def restored_state(self, param: Tensor, saved: Mapping[str, Any]) -> dict[str, Any]:
        """A saved state as this precision holds it, in memory of its own. A master that was not saved begins anew."""
        state = self.new_state(param)
        state["step"].fill_(float(saved["step"]))

        def fill(key: str, value: Tensor) -> None:
            target = local(state[key])
            target.copy_(value.reshape(target.shape))

        for key, scale in SCALES.items():
            if scale in state and scale in saved:
                fill(key, part_for(state[key], saved[key]))
                whole = saved[scale] if is_sharded(saved[scale]) else saved[scale].view(state[scale].shape)
                fill(scale, part_for(state[scale], whole))
            elif scale in state:
                coded, scales = encode_state(part_for(state[key], uncoded(key, saved)).float(), CODES[key])
                fill(key, coded)
                fill(scale, scales)
            else:
                fill(key, part_for(state[key], uncoded(key, saved)))
        if RESIDUAL in state and RESIDUAL in saved:
            fill(RESIDUAL, part_for(state[RESIDUAL], saved[RESIDUAL]))
        return state


def uncoded(key: str, state: Mapping[str, Any]) -> Tensor:
    """exp_avg or exp_avg_sq of a state as floating numbers."""
    if SCALES[key] not in state:
        return state[key]
    return wrap(decode_state(local(state[key]), local(state[SCALES[key]])), state[key])


def float32_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with its codes or bfloat16 numbers as float32, as `torch.optim.AdamW` has it for float32 parameters."""
    others = {key: value for key, value in state.items() if key not in (*STATES, *SCALES.values())}
    return {**others, **{key: uncoded(key, state).float() for key in STATES if key in state}}


def check_state(name: str, param: Tensor, saved: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the parameter, for a saved state that does not fit it."""
    missing = {"step", *STATES} - set(saved)
    if missing:
        raise ValueError(f"the state of parameter {name} lacks {', '.join(sorted(missing))}: not a state of AdamW")
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = dict.fromkeys(STATES, (param.shape, None))
    for key, scale in SCALES.items():
        if scale in saved or not saved[key].dtype.is_floating_point:
            wanted[key] = param.shape, CODES[key]
            wanted[scale] = scale_shape(tuple(param.shape)), torch.float32
    if RESIDUAL in saved:
        wanted[RESIDUAL] = param.shape, torch.int16
    for key, (shape, dtype) in wanted.items():
        found = saved.get(key)
        if found is None:
            raise ValueError(f"the state of parameter {name} has codes without {key}")
        flat = key in SCALES.values() and tuple(found.shape) == (blocks_of(param.numel()),)
        if tuple(found.shape) != tuple(shape) and not flat:
            raise ValueError(
                f"the state {key} of parameter {name} has shape {tuple(found.shape)}, expected {tuple(shape)}"
            )
        if dtype is not None and found.dtype != dtype:
            raise ValueError(f"the state {key} of parameter {name} has dtype {found.dtype}, expected {dtype}")

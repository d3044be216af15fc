"""How parameters and states are stored: dtypes, codes, rounding, master weights, and the states that these need."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..formats.blocks import BLOCK, MOMENT, VARIANCE, blocks_of, decode_state, encode_state, scale_shape
from ..sharding import is_sharded, keeps_blocks, local, part_for, wrap

STATES = ("exp_avg", "exp_avg_sq")

# Codes and their scales have separate keys: a reader that does not know codes (torch.optim.AdamW, say) then finds a
# moment missing, instead of taking codes for it.
CODES = {"exp_avg": "exp_avg_codes", "exp_avg_sq": "exp_avg_sq_codes"}
SCALES = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale"}
RESIDUAL = "param_residual"

# The delta of an adapter's parameter, if it is kept for several steps.
PROJECTED = "prior_delta"

# The point that a prior pulls a parameter to, if its pull fades on the way there.
TARGET = "prior_target"
KEPT = frozenset((PROJECTED, TARGET))  # what a prior keeps in states, in its own dtype

# The keys of tensors in a state -> the operand of a plan that each one is. OWN: all keys of this package.
OPERANDS = {
    **{key: key for key in (*STATES, *SCALES.values())},
    **{codes: key for key, codes in CODES.items()},
    RESIDUAL: "residual",
}
OWN = frozenset(("step", *OPERANDS))
MOMENTS = (*STATES, *CODES.values())

StateDType = Literal["float32", "fp32", "bfloat16", "bf16", "int8"]
STATE_DTYPES = dict(
    zip(get_args(StateDType), (torch.float32,) * 2 + (torch.bfloat16,) * 2 + (torch.int8,), strict=True)
)
CODE_DTYPES = {"exp_avg": MOMENT, "exp_avg_sq": VARIANCE}
WORTH_CODES = 4096  # elements; smaller tensors have float32 states instead of codes
Rounding = Literal["nearest", "stochastic"]
ROUNDINGS = get_args(Rounding)


@dataclass(frozen=True)
class Precision:
    """How the constructor's arguments ask for parameters and states to be stored.

    Attributes:
        state_dtype: dtype of exp_avg and exp_avg_sq: float32, bfloat16, or int8 for codes (formats/blocks.py).
        stochastic: whether bfloat16 states, and bfloat16 parameters without a master weight, are rounded
            stochastically.
        master_weights: whether bfloat16 parameters have a residual, with which they make a float32.
    """

    state_dtype: torch.dtype
    stochastic: bool
    master_weights: bool

    @classmethod
    def of(cls, state_dtype: torch.dtype | StateDType, rounding: Rounding, master_weights: bool) -> Precision:
        """Raise ValueError for an unknown dtype or rounding; warn of states that would lose their updates."""
        dtype = STATE_DTYPES.get(state_dtype) if isinstance(state_dtype, str) else state_dtype
        if dtype is None or dtype not in STATE_DTYPES.values():
            known = ", ".join(map(repr, STATE_DTYPES))
            raise ValueError(f"state_dtype must be one of {known}, or the torch.dtype of one, got {state_dtype!r}")
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        if dtype == torch.bfloat16 and rounding == "nearest":
            warnings.warn(
                "bfloat16 states rounded to nearest lose small updates (exp_avg_sq cannot decay at beta2 = 0.999): "
                "use rounding='stochastic' to keep them",
                stacklevel=3,
            )
        return cls(dtype, rounding == "stochastic", bool(master_weights))

    def check_param(self, name: str, param: Tensor) -> None:
        """Raise TypeError, naming the parameter, if its dtype does not support this precision."""
        if param.dtype != torch.float16:
            return
        asked = {
            "master_weights=True": self.master_weights,
            "rounding='stochastic'": self.stochastic,
            "state_dtype=torch.int8": self.state_dtype == torch.int8,
        }
        for option in (option for option, is_asked in asked.items() if is_asked):
            raise TypeError(
                f"{option} supports bfloat16 and float32 parameters only, but parameter {name} has dtype "
                "torch.float16: cast it, or give it to a separate optimizer"
            )

    def at_random(self, param: Tensor) -> bool:
        """Whether the parameter and its states are rounded stochastically. float32 parameters need no rounding."""
        return self.stochastic and param.dtype == torch.bfloat16

    @torch.inference_mode(False)
    def new_state(self, param: Tensor) -> dict[str, Any]:
        """The state before the first step: zeros, sharded like the parameter. A master weight starts equal to it."""
        state = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
        own = local(param)

        def zeros(dtype: torch.dtype) -> Tensor:
            return wrap(torch.zeros(own.shape, dtype=dtype, device=own.device), param)

        for key in STATES:
            if self._has_codes(param):
                state[CODES[key]] = zeros(CODE_DTYPES[key])
                scale = torch.zeros(scale_shape(tuple(own.shape)), dtype=torch.float32, device=own.device)
                state[SCALES[key]] = wrap(scale, param, scale_shape(tuple(param.shape)))
            else:
                state[key] = zeros(self._uncoded_dtype(param))
        if self.master_weights and param.dtype == torch.bfloat16:
            state[RESIDUAL] = zeros(torch.int16)
        return state

    def _has_codes(self, param: Tensor) -> bool:
        """Whether its states are codes: not if the parameter is small, or if its sharding may cut blocks."""
        enough = self.state_dtype == torch.int8 and param.numel() >= WORTH_CODES
        return enough and (not is_sharded(param) or keeps_blocks(param, BLOCK))

    def _uncoded_dtype(self, param: Tensor) -> torch.dtype:
        """No kernel rounds the states of a float32 parameter stochastically: these are float32."""
        rounds_to_nearest = self.stochastic and not self.at_random(param)
        return torch.float32 if self.state_dtype == torch.int8 or rounds_to_nearest else self.state_dtype

    def restored_state(self, param: Tensor, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of a saved state in this precision. A master weight that was not saved starts anew."""
        state = self.new_state(param)
        state["step"].fill_(float(saved["step"]))

        def fill(key: str, value: Tensor) -> None:
            target = local(state[key])
            target.copy_(value.reshape(target.shape))

        for key, codes in CODES.items():
            scale = SCALES[key]
            if codes not in state:
                fill(key, part_for(state[key], uncoded(key, saved)))
            elif codes in saved:
                fill(codes, part_for(state[codes], saved[codes]))
                whole = saved[scale] if is_sharded(saved[scale]) else saved[scale].view(state[scale].shape)
                fill(scale, part_for(state[scale], whole))
            else:
                coded, scales = encode_state(part_for(state[codes], saved[key]).float(), CODE_DTYPES[key])
                fill(codes, coded)
                fill(scale, scales)
        if RESIDUAL in state and RESIDUAL in saved:
            fill(RESIDUAL, part_for(state[RESIDUAL], saved[RESIDUAL]))
        return state


def has_begun(state: Mapping[str, Any]) -> bool:
    """Whether it holds a state of this package, rather than nothing or only what a user stores in it."""
    return not OWN.isdisjoint(state)


def held(key: str, state: Mapping[str, Any]) -> Tensor | None:
    """exp_avg or exp_avg_sq of a state as stored, which may be codes."""
    return state.get(CODES[key], state.get(key))


def uncoded(key: str, state: Mapping[str, Any]) -> Tensor:
    """exp_avg or exp_avg_sq of a state in floating point."""
    if CODES[key] not in state:
        return state[key]
    return wrap(decode_state(local(state[CODES[key]]), local(state[SCALES[key]])), state[CODES[key]])


def float32_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with its moments in float32, as `torch.optim.AdamW` holds them for float32 parameters."""
    others = {key: value for key, value in state.items() if key not in (*MOMENTS, *SCALES.values())}
    return {**others, **{key: uncoded(key, state).float() for key in STATES if held(key, state) is not None}}


def with_keys_of_codes(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a saved state from earlier versions, which stored codes under the keys of the moments."""
    old = {
        key: codes
        for key, codes in CODES.items()
        if codes not in saved and isinstance(saved.get(key), Tensor) and saved[key].dtype == CODE_DTYPES[key]
    }
    return {old.get(key, key): value for key, value in saved.items()}


def check_state(name: str, param: Tensor, saved: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the parameter, if the saved state does not fit it."""
    missing = [key for key in ("step", *STATES) if key not in saved and CODES.get(key) not in saved]
    if missing:
        raise ValueError(f"the state of parameter {name} lacks {', '.join(missing)}: not a state of AdamW")
    shape, scales = tuple(param.shape), scale_shape(tuple(param.shape))
    for key, codes in CODES.items():
        if codes in saved:
            _check_tensor(name, codes, saved, CODE_DTYPES[key], shape)
            _check_tensor(name, SCALES[key], saved, torch.float32, scales, (blocks_of(param.numel()),))
        else:
            _check_tensor(name, key, saved, None, shape)
    if RESIDUAL in saved:
        _check_tensor(name, RESIDUAL, saved, torch.int16, shape)


def _check_tensor(
    name: str, key: str, saved: Mapping[str, Any], dtype: torch.dtype | None, *shapes: tuple[int, ...]
) -> None:
    """`dtype`: None for any floating-point dtype."""
    found = saved.get(key)
    if not isinstance(found, Tensor):
        have = "codes without" if found is None and key in SCALES.values() else f"{type(found).__name__} for"
        raise ValueError(f"the state of parameter {name} has {have} {key}")
    if tuple(found.shape) not in shapes:
        raise ValueError(f"the state {key} of parameter {name} has shape {tuple(found.shape)}, expected {shapes[0]}")
    if not found.dtype.is_floating_point if dtype is None else found.dtype != dtype:
        expected = "a floating-point dtype" if dtype is None else dtype
        raise ValueError(f"the state {key} of parameter {name} has dtype {found.dtype}, expected {expected}")

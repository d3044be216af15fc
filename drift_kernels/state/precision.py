"""How parameters and states are held: dtypes, codes, rounding, masters; and the states that this takes."""

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

# Codes have keys of their own: who knows none (torch.optim.AdamW, a checkpoint that is loaded into other states) then
# misses a moment, and does not take codes for it. Each beside its scales.
CODES = {"exp_avg": "exp_avg_codes", "exp_avg_sq": "exp_avg_sq_codes"}
SCALES = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale"}
RESIDUAL = "param_residual"

# The delta of an adapter's parameter, where it stays for several steps.
PROJECTED = "prior_delta"

# Where a prior pulls a parameter, if its pull is to fade on the way.
TARGET = "prior_target"
KEPT = frozenset((PROJECTED, TARGET))  # what a prior keeps in states, in a dtype of its own

# The keys of tensors in a state, and which operand of a plan each is; and all keys that are this package's.
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
    def of(cls, state_dtype: torch.dtype | StateDType, rounding: Rounding, master_weights: bool) -> Precision:
        """Raises ValueError for a dtype or a rounding that there is not; warns of states that lose their updates."""
        dtype = STATE_DTYPES.get(state_dtype) if isinstance(state_dtype, str) else state_dtype
        if dtype is None or dtype not in STATE_DTYPES.values():
            known = ", ".join(map(repr, STATE_DTYPES))
            raise ValueError(f"state_dtype must be one of {known}, or such a torch.dtype, got {state_dtype!r}")
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
        if param.dtype != torch.float16:
            return
        asked = {
            "master_weights=True": self.master_weights,
            "rounding='stochastic'": self.stochastic,
            "state_dtype=torch.int8": self.state_dtype == torch.int8,
        }
        for option in (option for option, is_asked in asked.items() if is_asked):
            raise TypeError(
                f"{option} is for bfloat16 and float32 parameters, and parameter {name} has dtype torch.float16, for "
                "which there are no such kernels: cast it, or give it to an optimizer of its own"
            )

    def at_random(self, param: Tensor) -> bool:
        """Whether the parameter and its states are rounded at random. A float32 one has nothing to round."""
        return self.stochastic and param.dtype == torch.bfloat16

    @torch.inference_mode(False)
    def new_state(self, param: Tensor) -> dict[str, Any]:
        """Zeros, sharded as the parameter is: the state before the first step. A master begins as its parameter."""
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
        """Whether its states are codes: not those of a small parameter, or of one whose blocks a sharding may cut."""
        enough = self.state_dtype == torch.int8 and param.numel() >= WORTH_CODES
        return enough and (not is_sharded(param) or keeps_blocks(param, BLOCK))

    def _uncoded_dtype(self, param: Tensor) -> torch.dtype:
        """Beside a float32 parameter there are no kernels that round states at random."""
        rounds_to_nearest = self.stochastic and not self.at_random(param)
        return torch.float32 if self.state_dtype == torch.int8 or rounds_to_nearest else self.state_dtype

    def restored_state(self, param: Tensor, saved: Mapping[str, Any]) -> dict[str, Any]:
        """A saved state as this precision holds it, in memory of its own. A master that was not saved begins anew."""
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
    """Whether there is a state of this package in it, and not nothing, or only what a user keeps there."""
    return not OWN.isdisjoint(state)


def held(key: str, state: Mapping[str, Any]) -> Tensor | None:
    """exp_avg or exp_avg_sq of a state as it is held: codes, where they are codes."""
    return state.get(CODES[key], state.get(key))


def uncoded(key: str, state: Mapping[str, Any]) -> Tensor:
    """exp_avg or exp_avg_sq of a state as floating numbers."""
    if CODES[key] not in state:
        return state[key]
    return wrap(decode_state(local(state[CODES[key]]), local(state[SCALES[key]])), state[CODES[key]])


def float32_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with its codes or bfloat16 numbers as float32, as `torch.optim.AdamW` has it for float32 parameters."""
    others = {key: value for key, value in state.items() if key not in (*MOMENTS, *SCALES.values())}
    return {**others, **{key: uncoded(key, state).float() for key in STATES if held(key, state) is not None}}


def with_keys_of_codes(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state whose codes have the keys of moments, as they once had, with the keys of codes."""
    old = {
        key: codes
        for key, codes in CODES.items()
        if codes not in saved and isinstance(saved.get(key), Tensor) and saved[key].dtype == CODE_DTYPES[key]
    }
    return {old.get(key, key): value for key, value in saved.items()}


def check_state(name: str, param: Tensor, saved: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the parameter, for a saved state that does not fit it."""
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
    """`dtype`: None for any floating one."""
    found = saved.get(key)
    if not isinstance(found, Tensor):
        have = "codes without" if found is None and key in SCALES.values() else f"{type(found).__name__} for"
        raise ValueError(f"the state of parameter {name} has {have} {key}")
    if tuple(found.shape) not in shapes:
        raise ValueError(f"the state {key} of parameter {name} has shape {tuple(found.shape)}, expected {shapes[0]}")
    if not found.dtype.is_floating_point if dtype is None else found.dtype != dtype:
        expected = "a floating one" if dtype is None else dtype
        raise ValueError(f"the state {key} of parameter {name} has dtype {found.dtype}, expected {expected}")

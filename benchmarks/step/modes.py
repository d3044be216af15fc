"""The modes of FusedDriftAdamW: how it stores states, master weights and the prior, and the bytes that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from drift_kernels.formats import blocks
from drift_kernels.kernels.operands import dtype_name
from drift_kernels.state.precision import WORTH_CODES

STATES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
ROUNDINGS = ("nearest", "stochastic")
MASTER = {"no": False, "yes": True}
PRIORS = {"same": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
PRIOR_DEVICES = {"same": False, "cpu": True}

SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8", "uint8": "8-bit"}
SCALE_BYTES = 4  # per block of codes
RESIDUAL_BYTES = 2


@dataclass(frozen=True)
class Storage:
    """The bytes of a tensor's states and delta, as functions of its number of elements."""

    states: Callable[[int], int]
    delta: Callable[[int], int]

    @classmethod
    def plain(cls, state_bytes: int, delta_bytes: int) -> Storage:
        """A fixed number of bytes per element: of all states together, and of the delta."""
        return cls(lambda numel: state_bytes * numel, lambda numel: delta_bytes * numel)


@dataclass(frozen=True)
class Mode:
    """The precision options of FusedDriftAdamW, and how its prior is stored.

    Attributes:
        states: float32, bfloat16, or int8 for codes.
        rounding: of bfloat16 tensors, "nearest" or "stochastic".
        master: whether each parameter has a residual, which makes it a float32.
        prior: int8 or float8_e4m3fn for a small prior; None for deltas in the dtype of the parameters.
        prior_on_host: whether a GPU's kernels read the prior from pinned host memory.
    """

    states: torch.dtype
    rounding: str = "nearest"
    master: bool = False
    prior: torch.dtype | None = None
    prior_on_host: bool = False

    @property
    def label(self) -> str:
        """The label in tables and plots: "int8 states, stochastic, int8 prior"."""
        parts = [f"{SHORT_DTYPES[dtype_name(self.states)]} states"]
        parts += ["stochastic"] if self.rounding == "stochastic" else []
        parts += ["master"] if self.master else []
        prior = [self.prior_name] if self.prior is not None else []
        prior += ["host"] if self.prior_on_host else []
        parts += [f"{' '.join(prior)} prior"] if prior else []
        return ", ".join(parts)

    @property
    def prior_name(self) -> str:
        """The prior's dtype as in `--prior-dtype`."""
        return next(name for name, dtype in PRIORS.items() if dtype == self.prior)

    @property
    def options(self) -> dict[str, Any]:
        """The options of FusedDriftAdamW, without the prior."""
        return {"state_dtype": self.states, "rounding": self.rounding, "master_weights": self.master}

    @property
    def prior_device(self) -> str | None:
        """The `prior_device` of FusedDriftAdamW, if there is a prior."""
        return "cpu" if self.prior_on_host else None

    def refusal(self, dtype: torch.dtype, device: str = "cpu") -> str | None:
        """Why parameters of a dtype on a device do not support the mode, in one line; None if they do."""
        if self.prior_on_host and device == "cpu":
            return "a prior on the host needs a GPU"
        stochastic = self.rounding == "stochastic"
        if dtype != torch.bfloat16 and (stochastic or self.master or self.prior is not None):
            return "stochastic rounding, master weights and small priors need bfloat16 parameters"
        if dtype == torch.float16 and self.states == torch.int8:
            return "int8 states need bfloat16 or float32 parameters"
        if stochastic and self.master and self.states != torch.bfloat16:
            return "with master weights, only bfloat16 states are rounded stochastically"
        return None

    def storage(self, dtype: torch.dtype) -> Storage:
        """The storage for parameters of a dtype, without step counts, which no kernel reads."""

        def states(numel: int) -> int:
            residual = RESIDUAL_BYTES * numel if self.master else 0
            if self.states != torch.int8:
                return residual + 2 * self.states.itemsize * numel
            return residual + (2 * coded_bytes(numel) if numel >= WORTH_CODES else 2 * 4 * numel)

        uncoded = 4 if dtype == torch.float16 else dtype.itemsize  # a prior is never float16
        return Storage(states, coded_bytes if self.prior is not None else lambda numel: uncoded * numel)


def coded_bytes(numel: int) -> int:
    """The bytes of one-byte codes and the scales of their blocks."""
    return numel + SCALE_BYTES * blocks.blocks_of(numel)


def combinations(
    states: Iterable[str],
    roundings: Iterable[str],
    masters: Iterable[str],
    priors: Iterable[str],
    prior_devices: Iterable[str],
) -> list[Mode]:
    """Return every combination of these, named as in the options of benchmarks.step, without duplicates."""
    every = product(states, roundings, masters, priors, prior_devices)
    return list(
        dict.fromkeys(
            Mode(STATES[state], rounding, MASTER[master], PRIORS[prior], PRIOR_DEVICES[device])
            for state, rounding, master, prior, device in every
        )
    )


BY_LABEL = {mode.label: mode for mode in combinations(STATES, ROUNDINGS, MASTER, PRIORS, PRIOR_DEVICES)}


def refusals(modes: Iterable[Mode], dtype: torch.dtype, device: str) -> dict[str, list[Mode]]:
    """The modes that parameters of a dtype on a device do not support, by reason."""
    found: dict[str, list[Mode]] = {}
    for mode in modes:
        reason = mode.refusal(dtype, device)
        if reason is not None:
            found.setdefault(reason, []).append(mode)
    return found


def label_of(row: Mapping[str, Any]) -> str:
    """The label of a row's mode; only the states for rivals and for rows older than the other keys."""
    if row["states"] is None:
        return ""
    if row.get("rounding") is None:
        return f"{SHORT_DTYPES[row['states']]} states"
    prior = PRIORS[row["prior_dtype"] or "same"]
    on_host = PRIOR_DEVICES[row.get("prior_device") or "same"]
    return Mode(STATES[row["states"]], row["rounding"], row["master"], prior, on_host).label

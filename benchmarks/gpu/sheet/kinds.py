"""What the names of our kernels tell: the tensors that they access, and the modes whose steps launch them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from drift_kernels.formats import blocks
from drift_kernels.kernels.scalings import SCALINGS

from ...captions import Row

# Bytes per element, by the dtype's name in csrc/dtypes.h.
SIZES = {
    "float": 4,
    "bfloat16": 2,
    "float16": 2,
    "stochastic_bfloat16": 2,
    "master_bfloat16": 2,
    "int8_state": 1,
    "int8_code": 1,
    "fp8_code": 1,
    "Nothing": 0,
}
RESIDUAL = 2  # bytes per parameter with a master weight
SCALE = 4 / blocks.BLOCK  # bytes per element stored as a code

SHORT = {
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "int8_state": "int8",
    "int8_code": "int8",
    "fp8_code": "fp8",
}
NAMES = {"float32": "float"}  # torch's dtypes that have another name in csrc
TRITON_NAMES = {"fp32": "float", "bf16": "bfloat16", "fp16": "float16", "None": "Nothing"}
TRITON_CODES = {"int8": "int8_code", "uint8": "fp8_code"}  # for deltas
TRITON = "triton "  # prefix of the triton backend's kernels
PRIORS = {"int8": "int8_code", "fp8": "fp8_code"}

HEADLINES = (
    "update<bfloat16, bfloat16, float, bfloat16>",
    "update<bfloat16, bfloat16, bfloat16, bfloat16>",
    "update<bfloat16, bfloat16, bfloat16, Nothing>",
    "update<master_bfloat16, bfloat16, float, bfloat16>",
    "update<stochastic_bfloat16, bfloat16, stochastic_bfloat16, bfloat16>",
    "update<stochastic_bfloat16, bfloat16, int8_state, int8_code>",
    "update<master_bfloat16, bfloat16, int8_state, bfloat16>",
    "update<float, float, float, float>",
    "sum<bfloat16, bfloat16>",
    "sum<bfloat16, Nothing>",
    "sum<float, float>",
    "bias<bfloat16, bfloat16>",
    "triton update<bfloat16, bfloat16, bfloat16, bfloat16>",
    "triton update<stochastic_bfloat16, bfloat16, stochastic_bfloat16, bfloat16>",
    "triton sum<bfloat16, bfloat16>",
)


@dataclass(frozen=True)
class Traffic:
    """The memory traffic per element, in bytes.

    Attributes:
        values: without the scales of codes.
        scales: the scales of codes, which threads share.
    """

    values: float
    scales: float

    @property
    def all(self) -> float:
        return self.values + self.scales


def parts(kernel: str) -> tuple[str, list[str]] | None:
    """A kernel's kind and dtypes; None if it does not stream tensors."""
    found = re.fullmatch(r"(update|sum|bias)<(.*)>", kernel.removeprefix(TRITON))
    return None if found is None else (found[1], found[2].split(", "))


def traffic(kernel: str) -> Traffic | None:
    """The traffic of a kernel such as "update<bfloat16, bfloat16, int8_state, int8_code>"."""
    found = parts(kernel)
    if found is None:
        return None
    kind, dtypes = found
    sizes = [SIZES[dtype] for dtype in dtypes]
    coded = [SCALE if size == 1 else 0 for size in sizes]
    if kind == "update":
        param, grad, state, delta = sizes
        residual = RESIDUAL if dtypes[0].startswith("master") else 0
        return Traffic(2 * (param + residual) + grad + 4 * state + delta, 4 * coded[2] + coded[3])
    grad, delta = sizes
    return Traffic((2 if kind == "bias" else 1) * grad + delta, coded[1])


def label(kernel: str) -> str:
    """A kernel's label: "update bf16, int8 states, stochastic, int8 prior"."""
    found = parts(kernel)
    if found is None:
        return kernel
    kind, dtypes = found
    plain = [dtype.removeprefix("stochastic_").removeprefix("master_") for dtype in dtypes]
    words = [f"{kind} {SHORT[plain[0]]}"]
    if kind == "update":
        words += [f"{SHORT[plain[1]]} gradients"] if plain[1] != plain[0] else []
        words += [f"{SHORT[plain[2]]} states"]
        words += ["stochastic"] if any(dtype.startswith("stochastic") for dtype in dtypes) else []
        words += ["master"] if dtypes[0].startswith("master") else []
    words += ["no prior" if plain[-1] == "Nothing" else f"{SHORT[plain[-1]]} prior"]
    return ("Triton " if kernel.startswith(TRITON) else "") + ", ".join(words)


def of_triton(name: str) -> str | None:
    """Translate a kernel's name in tests/sass.py, such as "_update_chunk bf16 bf16 fp32 bf16 master", to ours."""
    function, *words = name.split()
    found = re.fullmatch(r"_(update|sum|bias)_chunk", function)
    if found is None:
        return None
    *dtypes, delta = (word for word in words if word in TRITON_NAMES or word in TRITON_CODES)
    named = ["int8_state" if dtype == "int8" else TRITON_NAMES[dtype] for dtype in dtypes]
    if "state_at_random" in words:
        named[2] = f"stochastic_{named[2]}"
    if "master" in words or "param_at_random" in words:
        named[0] = f"{'master' if 'master' in words else 'stochastic'}_{named[0]}"
    named.append(TRITON_CODES.get(delta) or TRITON_NAMES[delta])
    return f"{TRITON}{found[1]}<{', '.join(named)}>"


def launched(row: Row) -> list[str] | None:
    """The kernels launched by a step of ours that benchmarks.step measured on a GPU; None if the model does not cover
    it.

    It does not cover steps whose prior covers only part of the parameters, or is read from the host.
    """
    biased = row["scaling"] != "none"
    if row["contender"] not in ("cuda", "triton") or (biased and row["biased_params"] != row["params"]):
        return None
    if row["prior_device"] not in (None, "same"):
        return None
    dtype = NAMES.get(row["dtype"], row["dtype"])
    same = "float" if dtype == "float16" else dtype  # a prior is never float16
    delta = PRIORS.get(row["prior_dtype"], same) if biased else "Nothing"
    state = "int8_state" if row["states"] == "int8" else NAMES.get(row["states"], row["states"])
    param = dtype
    if row["rounding"] == "stochastic":
        param, state = (f"stochastic_{name}" if name == "bfloat16" else name for name in (param, state))
    if row["master"]:
        param = f"master_{dtype}"
    needs_sums = row["clip"] or (biased and SCALINGS[row["scaling"]].needs_stats)
    prefix = TRITON if row["contender"] == "triton" else ""
    update = f"{prefix}update<{param}, {dtype}, {state}, {delta}>"
    return [f"{prefix}sum<{dtype}, {delta}>", update] if needs_sums else [update]

"""A few steps over awkward tensors, to run under compute-sanitizer: python -m benchmarks.gpu.sanitize

Covers every scaling, with and without clipping, and every way of storing parameters, states and priors; sizes around
the kernels' vectors and chunks; and tensors that are aligned only to their element size. The tests check that results
are correct; here they must only be finite and have changed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from typing import Any

import torch
from torch import Tensor

from drift_kernels import FusedDriftAdamW
from drift_kernels.kernels.scalings import SCALINGS
from drift_kernels.prior import quantize

SIZES = [1, 3, 7, 8, 17, 63, 1000, 4099, 16385, 70001]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = ({"state_dtype": torch.float32}, {"state_dtype": torch.bfloat16})
# For bfloat16 parameters with a small prior.
LOSSLESS = (
    {"rounding": "stochastic", "state_dtype": torch.bfloat16},
    {"master_weights": True},
    {"rounding": "stochastic", "state_dtype": torch.int8},
    {"master_weights": True, "state_dtype": torch.int8},
)
STEPS = 2
Options = dict[str, Any]


def tensors(dtype: torch.dtype, device: torch.device, scale: float) -> list[Tensor]:
    """Return one tensor of each size; every other one is a view that starts one element into its memory."""
    bases = [scale * torch.randn(size + 1, device=device) for size in SIZES]
    return [base.to(dtype)[i % 2 :][:size] for i, (base, size) in enumerate(zip(bases, SIZES, strict=True))]


def step(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    scaling: str | None,
    precision: Options,
    max_grad_norm: float | None,
) -> None:
    """Raise AssertionError if a parameter is not finite or has not changed."""
    params = tensors(dtype, device, 1.0)
    before = [param.clone() for param in params]
    for param, grad in zip(params, tensors(dtype, device, 0.1), strict=True):
        param.grad = grad
    names = [f"layers.{i}.mlp.up_proj.weight" for i in range(len(params))]
    prior = None
    if scaling is not None:  # the last parameter has no delta
        deltas = tensors(dtype, device, 0.05)
        if precision in LOSSLESS:
            deltas = [
                quantize(delta.float(), torch.int8 if i % 2 else torch.float8_e4m3fn) for i, delta in enumerate(deltas)
            ]
        prior = dict(zip(names[:-1], deltas, strict=False))
    optimizer = FusedDriftAdamW(
        list(zip(names, params, strict=True)),
        lr=0.1,
        prior=prior,
        alpha=math.sqrt(0.5),  # a fraction could cancel an element's gradient, and the element would not change
        prior_scaling=scaling or "absolute",
        **precision,
        max_grad_norm=max_grad_norm,
        backend=backend,
    )
    for _ in range(STEPS):
        optimizer.step()
    for name, param, old in zip(names, params, before, strict=True):
        assert param.isfinite().all(), f"{name} is not finite"
        assert (param != old).any(), f"{name} has not changed"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", help="default: the backend named like the device")
    args = parser.parse_args(argv)
    backend, device = args.backend or args.device, torch.device(args.device)
    cases = list(itertools.product(DTYPES, (None, *SCALINGS), PLAIN, (None, 1.0)))
    cases += itertools.product((torch.bfloat16,), (None, *SCALINGS), LOSSLESS, (None, 1.0))
    for case in cases:
        step(backend, device, *case)
    print(f"{len(cases)} cases of {STEPS} steps on backend {backend!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One gradnorm step, with both its kernels, for ncu --profile-from-start off: python -m benchmarks.gpu.profile_step"""

from __future__ import annotations

import torch

from ..step.contender import drift
from ..step.modes import Mode
from ..step.problem import Problem
from ..step.shapes import fit, named_shapes

MODEL, PARAMS, WARM_STEPS = "qwen2.5-vl-7b", 256_000_000, 2


def main() -> None:
    device = torch.device("cuda")
    shapes = named_shapes(MODEL, fit(MODEL, PARAMS))
    problem = Problem.random(shapes, ["all"], torch.bfloat16, device)
    ours = drift(problem, "cuda", "gradnorm", Mode(torch.bfloat16))
    for _ in range(WARM_STEPS):
        ours.step()
    torch.cuda.synchronize(device)
    torch.cuda.profiler.start()
    ours.step()
    torch.cuda.synchronize(device)
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()

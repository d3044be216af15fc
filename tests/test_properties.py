"""The whole optimizer on random problems: the cpu backend is bitwise identical to the reference backend.

Only for steps without gradient statistics, on which backends agree to 1e-6, not bitwise.
"""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from drift_kernels import FusedDriftAdamW

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])

tensors = st.fixed_dictionaries(
    {
        "shape": st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple),
        "dtype": DTYPES,
        "float32_grad": st.booleans(),
        "delta": st.sampled_from([None, torch.float32, torch.bfloat16]),
        "absent": st.sets(st.integers(0, 3)),  # steps in which it has no gradient
    }
)
groups = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 0.1),
        "betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.9999)),
        "eps": st.floats(1e-12, 1e-3),
        "weight_decay": st.floats(0, 1),
        "alpha": st.floats(-2, 2),
        "prior_scaling": st.sampled_from(["absolute", "decoupled"]),
        "maximize": st.booleans(),
    }
)
problems = st.lists(st.tuples(groups, st.lists(tensors, min_size=1, max_size=4)), min_size=1, max_size=3)


def run(backend: str, problem: list, state_dtype: torch.dtype, seed: int) -> tuple[list[torch.Tensor], FusedDriftAdamW]:
    generator = torch.Generator().manual_seed(seed)

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    param_groups, deltas, specs, params = [], {}, [], []
    for g, (options, members) in enumerate(problem):
        named = []
        for i, spec in enumerate(members):
            param = nn.Parameter(random(spec["shape"], spec["dtype"]))
            if spec["float32_grad"] and hasattr(param, "grad_dtype"):
                param.grad_dtype = torch.float32
            named.append((f"group{g}.{i}", param))
            specs.append(spec)
            params.append(param)
            if spec["delta"] is not None:
                deltas[f"group{g}.{i}"] = random(spec["shape"], spec["delta"])
        param_groups.append({"params": named, **options})
    optimizer = FusedDriftAdamW(param_groups, prior=deltas or None, state_dtype=state_dtype, backend=backend)
    for step in range(4):
        for spec, param in zip(specs, params, strict=True):
            wide = spec["float32_grad"] and hasattr(param, "grad_dtype")
            grad = random(spec["shape"], torch.float32 if wide else spec["dtype"])
            param.grad = None if step in spec["absent"] else grad
        optimizer.step()
    return [p.detach() for p in params], optimizer


@given(problem=problems, state_dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 2**32))
def test_cpu_is_reference(problem: list, state_dtype: torch.dtype, seed: int) -> None:
    (actual, ours), (expected, theirs) = (run(name, problem, state_dtype, seed) for name in ("cpu", "reference"))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)
    for p, q in zip(ours.param_groups, theirs.param_groups, strict=True):
        for a, e in zip(p["params"], q["params"], strict=True):
            assert ours.state[a].keys() == theirs.state[e].keys()
            for key, value in ours.state[a].items():
                torch.testing.assert_close(value, theirs.state[e][key], rtol=0, atol=0, equal_nan=True)

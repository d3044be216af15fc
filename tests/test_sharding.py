"""Sharded parameters (DTensors) against the same run in one process, in real processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from drift_kernels import FusedDriftAdamW, PriorMismatchError
from drift_kernels.coefficients import SCALINGS
from drift_kernels.lossless import Place
from drift_kernels.prior import Prior, QuantizedDelta, quantize
from drift_kernels.sharding import Shard as Part

BF16, INT8 = torch.bfloat16, torch.int8

# Rows of whole blocks, of none, of an odd number of elements; fewer rows than ranks; fewer elements than ranks.
SHAPES = {
    "layers.0.mlp.up_proj.weight": (33, 256),
    "layers.0.mlp.down_proj.weight": (64, 136),
    "layers.0.self_attn.q_proj.weight": (37, 31),
    "layers.0.self_attn.k_proj.weight": (3, 1024),
    "layers.0.self_attn.k_proj.bias": (3,),
    "layers.0.input_layernorm.weight": (66,),
}
CUT = "layers.0.mlp.down_proj.weight"  # whose blocks of codes a sharding may cut: it has float32 states then
SKIPS = "layers.0.self_attn.q_proj.weight"  # has no gradient in every third step

# Placements of all parameters in a mesh of a shape; a vector's are those of its only dimension.
FSDP = ((-1,), (Shard(0),))
MESHES = {
    2: {"fsdp": FSDP, "tensor parallel": ((2,), (Shard(1),)), "replicated": ((2,), (Replicate(),))},
    4: {
        "fsdp": FSDP,
        "rows and columns": ((2, 2), (Shard(0), Shard(1))),
        "hsdp": ((2, 2), (Replicate(), Shard(0))),
        "twice by rows": ((2, 2), (Shard(0), Shard(0))),
    },
}
STOCHASTIC = {"rounding": "stochastic"}
EXACT: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "stochastic": {**STOCHASTIC, "state_dtype": BF16},
    "masters": {"master_weights": True},
    "int8": {**STOCHASTIC, "state_dtype": INT8},
    "int8 prior": {**STOCHASTIC, "codes": INT8},
    "decoupled": {"dtype": torch.float32, "prior_scaling": "decoupled"},
}


def values(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def make_prior(codes: torch.dtype | None = None) -> Prior:
    deltas: dict[str, Tensor | QuantizedDelta] = dict(values(1, BF16))
    del deltas["layers.0.input_layernorm.weight"]
    return Prior.from_mapping(
        {name: quantize(delta.float(), codes) if codes else delta for name, delta in deltas.items()}
    )


class Run:
    """Steps on gradients that the seed gives, of parameters as `place` shards them."""

    def __init__(self, mesh: Any = None, placements: tuple[Placement, ...] = (), **options: Any) -> None:
        self.mesh, self.placements = mesh, placements
        self.dtype = options.pop("dtype", BF16)
        self.params = {name: nn.Parameter(self.sharded(t)) for name, t in values(0, self.dtype).items()}
        options = {"prior": make_prior(options.pop("codes", None)), "prior_scaling": "absolute", "seed": 7} | options
        self.optimizer = FusedDriftAdamW(self.params.items(), lr=1e-2, alpha=0.3, **options)

    def sharded(self, tensor: Tensor) -> Tensor:
        if self.mesh is None:
            return tensor
        own = [Shard(min(p.dim, tensor.dim() - 1)) if isinstance(p, Shard) else p for p in self.placements]
        return distribute_tensor(tensor, self.mesh, own)

    def steps(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            for name, grad in values(100 + step, self.dtype).items():
                skipped = name == SKIPS and step % 3 == 2
                self.params[name].grad = None if skipped else self.sharded(grad)  # type: ignore[assignment]
            self.optimizer.step()

    def result(self) -> dict[str, Tensor]:
        return {name: whole(param.detach()) for name, param in self.params.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_runs(world: int, cases: dict[str, dict[str, Any]]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """The parameters after 20 steps, by placement and case."""
    results = {}
    for label, (shape, placements) in MESHES[world].items():
        mesh = init_device_mesh("cpu", (world,) if shape == (-1,) else shape)
        for case, options in cases.items():
            run = Run(mesh, placements, **options)
            run.steps(0, 20)
            results[label, case] = run.result()
    return results


def alone(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    results = {}
    for case, options in cases.items():
        run = Run(**options)
        run.steps(0, 20)
        results[case] = run.result()
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_absolute_without_clipping_has_the_bits_of_one_process(world: int, tmp_path: Path) -> None:
    expected = alone(EXACT)
    for found in ranks.run(sharded_runs, world, tmp_path, world, EXACT):
        for (label, case), params in found.items():
            for name, param in params.items():
                if case == "int8" and name == CUT:
                    continue
                assert torch.equal(param, expected[case][name]), (label, case, name)


@pytest.mark.parametrize("world", [2, 4])
def test_all_scalings_and_clipping_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    """Sums over shards are added in another order: within 1e-6 of the largest weight after 20 steps."""
    cases = {
        f"{scaling}, {clip}": {"dtype": torch.float32, "prior_scaling": scaling, "max_grad_norm": clip}
        for scaling in SCALINGS
        for clip in (None, 1.0)
    }
    cases["normalized"] = {"dtype": torch.float32, "normalize_to_param": True}
    expected = alone(cases)
    for found in ranks.run(sharded_runs, world, tmp_path, world, cases):
        for (label, case), params in found.items():
            for name, param in params.items():
                error = (param - expected[case][name]).abs().max() / expected[case][name].abs().max()
                assert error <= 1e-6, (label, case, name, error)

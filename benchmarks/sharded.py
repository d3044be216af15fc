"""The host cost of sharding: step() on DTensors against the same plain tensors, interleaved in one process.

    python -m benchmarks.sharded --json rows.json

Uses 729 tensors of 8 elements (the list `tiny`), so that all time is host time; a mesh of one rank, with gloo.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from drift_kernels import FusedDriftAdamW
from drift_kernels.kernels.scalings import GRADIENT_SCALINGS

from .rows import row_metadata
from .step import shapes
from .step.measure import Spread
from .step.problem import ADAMW, ALPHA, Problem


def make(problem: Problem, scaling: str, mesh: DeviceMesh | None) -> FusedDriftAdamW:
    """An optimizer whose parameters have gradients; with a mesh, in the form that fully_shard leaves them."""
    params = []
    for tensor, grad in zip(problem.params, problem.grads, strict=True):
        param = nn.Parameter(tensor.clone() if mesh is None else distribute_tensor(tensor.clone(), mesh, [Shard(0)]))
        # fully_shard wraps each gradient in a new DTensor with its parameter's spec.
        param.grad = grad if mesh is None else DTensor(grad, param._spec, requires_grad=False)  # type: ignore[arg-type]
        params.append(param)
    named: list[tuple[str, Tensor]] = list(zip(problem.names, params, strict=True))
    prior = problem.loaded_prior(None)
    return FusedDriftAdamW(named, **ADAMW, alpha=ALPHA, prior=prior, prior_scaling=scaling)


def measure(reps: int) -> list[dict[str, Any]]:
    mesh = init_device_mesh("cpu", (1,))
    named_shapes = shapes.named_shapes(shapes.TINY)
    problem = Problem.random(named_shapes, ["all"], torch.bfloat16, torch.device("cpu"))
    rows = []
    for scaling in GRADIENT_SCALINGS:
        optimizers = {"plain": make(problem, scaling, None), "DTensor": make(problem, scaling, mesh)}
        times: dict[str, list[float]] = {kind: [] for kind in optimizers}
        for optimizer in optimizers.values():
            optimizer.step()
        for _ in range(reps):
            for kind in random.sample(list(optimizers), len(optimizers)):
                start = time.perf_counter()
                optimizers[kind].step()
                times[kind].append(1e3 * (time.perf_counter() - start))
        plain = Spread.of(times["plain"]).median
        for kind, of_kind in times.items():
            spread = Spread.of(of_kind)
            row = {"benchmark": "sharded", "params": kind, "scaling": scaling, "tensors": len(named_shapes)}
            rows.append({**row, "host_ms": spread._asdict(), "ratio_to_plain": spread.median / plain, "reps": reps})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=__doc__)
    parser.add_argument("--reps", type=int, default=300, help="repetitions of each step (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    args = parser.parse_args()
    metadata = row_metadata()
    with TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        rows = [row | metadata for row in measure(args.reps)]
        dist.destroy_process_group()
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    table = Table("scaling", "parameters", "host ms", "quartiles", "x plain", title="step() of 729 tensors")
    for row in rows:
        host = row["host_ms"]
        times = f"{host['median']:.3f}", f"{host['low']:.3f}-{host['high']:.3f}"
        table.add_row(row["scaling"], row["params"], *times, f"{row['ratio_to_plain']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

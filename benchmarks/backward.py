"""Steps inside the backward pass (`attach_to_backward`): peak memory and time of training steps, with and without.

    python -m benchmarks.backward [--json rows.json]

Each row is measured in a separate process, which trains a stack of linear layers on one CPU core and reports how far
its resident memory rose above that before the first forward pass, with parameters and prior already built.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from drift_kernels import FusedDriftAdamW

from .rows import ROOT, row_metadata

# Layers and width: one shape with much memory, one where the cost per tensor dominates.
SHAPES = {"wide": (24, 1280), "narrow": (364, 8)}
WAYS = ("torch fused", "after the backward", "in the backward")
BATCH = 16

# glibc keeps freed heap blocks of up to 32 MB, so a freed gradient would still count. From this size on, it returns
# blocks to the system at once.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


def model(layers: int, width: int) -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(layers)])


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(shape: str, way: str, scaling: str | None, steps: int) -> dict[str, Any]:
    """Measure one row in this process; call it once per process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # other work on the machine could delay one of several threads, and with it all of them
    net = model(*SHAPES[shape])
    named = list(net.named_parameters())
    deltas = {name: torch.randn_like(p) for name, p in named if p.dim() == 2} if scaling else None
    optimizer: torch.optim.Optimizer
    if way == "torch fused":
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    else:
        optimizer = FusedDriftAdamW(named, prior=deltas, prior_scaling=scaling or "absolute")
        if way == "in the backward":
            optimizer.attach_to_backward()
    x = torch.randn(BATCH, SHAPES[shape][1])
    before, times = resident_bytes(), []
    for _ in range(steps):
        start = time.perf_counter()
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append((time.perf_counter() - start) * 1e3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    low, median, high = statistics.quantiles(times[2:], n=4, method="inclusive")
    return {
        "shape": shape,
        "tensors": len(named),
        "param_bytes": sum(p.nbytes for _, p in named),
        "way": way,
        "scaling": scaling,
        "peak_extra_bytes": peak - before,
        "step_ms": {"median": median, "low": low, "high": high},
        "steps": steps,
    }


def rows(steps: int) -> list[dict[str, Any]]:
    """Measure every row, each in a fresh process, one after another."""
    metadata, found = row_metadata(), []
    for shape, scaling, way in product(SHAPES, (None, "adaptive_cosine"), WAYS):
        if scaling is None or way != "torch fused":
            case = json.dumps({"shape": shape, "way": way, "scaling": scaling, "steps": steps})
            command = [sys.executable, "-m", "benchmarks.backward", "--case", case]
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | MALLOC
            )
            if done.returncode != 0:
                raise RuntimeError(f"{case} failed:\n{done.stderr}")
            found.append({**json.loads(done.stdout), **metadata})
    return found


def table(found: list[dict[str, Any]]) -> Table:
    shown = Table(title="forward, backward and step")
    for column in ("shape", "prior", "way", "parameters, MB", "peak increase, MB", "ms"):
        shown.add_column(column)
    for row in found:
        megabytes = [f"{row[key] / 1e6:.1f}" for key in ("param_bytes", "peak_extra_bytes")]
        shown.add_row(row["shape"], row["scaling"] or "-", row["way"], *megabytes, f"{row['step_ms']['median']:.1f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="steps per row; the first two are not timed")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # the row that a child process measures
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(**json.loads(arguments.case))))
        return
    found = rows(arguments.steps)
    Console().print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

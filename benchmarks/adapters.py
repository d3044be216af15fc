"""The cost of renewing the deltas of LoRA adapters: one layer of Qwen2.5-7B, its seven projections, random values.

    python -m benchmarks.adapters --json rows.json

Measured for each way to store the prior, interleaved in one process, beside a plain pass over the same bf16 deltas
(one read of each byte, at the speed of torch's sum) and a step of the adapters without a prior. Times are for one
layer.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from drift_kernels import FusedDriftAdamW, Prior
from drift_kernels.adapters import AdapterPrior, Factors
from drift_kernels.prior import LowRankDelta, quantize

from .rows import row_metadata
from .step import shapes
from .step.measure import Spread

PRIOR_RANK = 64


@dataclass(frozen=True)
class Adapter:
    """An adapter without a base weight: only its shape matters."""

    weight: str
    a: nn.Parameter
    b: nn.Parameter
    scale: float = 2.0
    is_dora: bool = False

    @property
    def names(self) -> tuple[str, str]:
        return f"{self.weight}.lora_A", f"{self.weight}.lora_B"

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def params(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b

    def factors(self) -> Factors:
        return Factors(self.a.detach(), self.b.detach(), self.scale)

    def base_weight(self) -> Tensor:
        return torch.ones(self.shape)


def adapters(rank: int, scale: float) -> list[Adapter]:
    named = shapes.named_shapes("qwen2.5-vl-7b", scale, layers=1)
    weights = [(n, shape) for n, shape in named if shapes.covered(n, ["attn", "mlp"]) and n.endswith("weight")]
    return [
        Adapter(name, nn.Parameter(torch.randn(rank, n) / n**0.5), nn.Parameter(torch.randn(m, rank)))
        for name, (m, n) in weights
    ]


def contenders(rank: int, scale: float, device: torch.device) -> dict[str, Callable[[], object]]:
    exact = {a.weight: (0.01 * torch.randn(a.shape)).to(device, torch.bfloat16) for a in adapters(rank, scale)}
    stored: dict[str, dict[str, Any]] = {
        "no prior": {},
        "bf16": exact,
        "int8": {name: quantize(delta.float(), torch.int8) for name, delta in exact.items()},
        f"rank {PRIOR_RANK}": {
            name: LowRankDelta(
                torch.randn(m, PRIOR_RANK, dtype=torch.bfloat16, device=device),
                torch.randn(PRIOR_RANK, n, dtype=torch.bfloat16, device=device),
            )
            for name, (m, n) in ((name, delta.shape) for name, delta in exact.items())
        },
    }
    steps: dict[str, Callable[[], object]] = {"reading bf16": lambda: [delta.sum() for delta in exact.values()]}
    for kind, deltas in stored.items():
        own = adapters(rank, scale)
        named = [pair for adapter in own for pair in zip(adapter.names, adapter.params(), strict=True)]
        for _, param in named:
            param.data = param.data.to(device)
            param.grad = torch.randn_like(param)
        prior = AdapterPrior(Prior.from_mapping(deltas), own) if deltas else None
        steps[kind] = FusedDriftAdamW(named, prior=prior, prior_scaling="absolute").step
    return steps


def measure(rank: int, scale: float, reps: int, device: torch.device) -> list[dict[str, Any]]:
    steps = contenders(rank, scale, device)
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for step in steps.values():
        step()
    for _ in range(reps):
        for kind in random.sample(list(steps), len(steps)):
            _synchronize(device)
            start = time.perf_counter()
            steps[kind]()
            _synchronize(device)
            times[kind].append(1e3 * (time.perf_counter() - start))
    elements = sum(m * n for m, n in (adapter.shape for adapter in adapters(rank, scale)))
    read = Spread.of(times["reading bf16"]).median
    return [
        {
            "benchmark": "adapters",
            "kind": kind,
            "rank": rank,
            "elements": elements,
            "ms": Spread.of(of_kind)._asdict(),
            "ratio_to_reading": Spread.of(of_kind).median / read,
            "reps": reps,
        }
        for kind, of_kind in times.items()
    ]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__)
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="divide the widths by this (default: %(default)s)")
    parser.add_argument("--reps", type=int, default=15, help="repetitions of each step (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    metadata = row_metadata(device)
    rows = [row | metadata for row in measure(args.rank, args.scale, args.reps, device)]
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    title = f"a step of rank {args.rank} adapters, one layer of Qwen2.5-7B ({rows[0]['elements']:,} elements)"
    table = Table("prior", "ms", "quartiles", "x reading bf16", title=title)
    for row in rows:
        spread = row["ms"]
        quartiles = f"{spread['low']:.1f}-{spread['high']:.1f}"
        table.add_row(row["kind"], f"{spread['median']:.1f}", quartiles, f"{row['ratio_to_reading']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

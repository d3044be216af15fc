"""Building a prior against `cp` of the same checkpoints: time, and peak memory of the building process.

    python -m benchmarks.build_prior [--gb 2] [--repeats 5] [--json FILE]
    python -m benchmarks.build_prior --rank 64 --model qwen-7b --repeats 1 [--json FILE]

Two synthetic checkpoints (bf16, sharded, the shapes of a small Llama) are written to a temporary folder. In each
repetition, in random order, `cp` copies them and `drift-prior build`, in a separate process, builds a prior of all
their tensors. Both read from the page cache. The build also syncs its output to disk; `cp` does not, so a copy with
`sync` is shown too. The build's time includes starting Python and importing torch, which is also shown separately.

With --rank, only low-rank builds are measured, and nothing is copied. Their time does not depend on the values; random
values have the flattest possible spectrum. --model selects other shapes: qwen-7b has the layers of Qwen2.5-7B (26 GB on
disk), qwen-7b-embed its embedding and head with one layer (5 GB).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file

from .rows import row_metadata

HIDDEN, INTERMEDIATE, KV, VOCABULARY = 2048, 5632, 512, 32003
SHARD_BYTES = 500_000_000


Shapes = list[tuple[str, tuple[int, ...]]]


def layer(hidden: int, intermediate: int, kv: int, number: int, bias: bool = False) -> Shapes:
    """The names and shapes of a layer."""
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    tensors: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in matrices.items()}
    if bias:
        tensors |= {f"self_attn.{name}_proj.bias": matrices[f"self_attn.{name}_proj"][:1] for name in "qkv"}
    tensors |= {f"{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    return [(f"model.layers.{number}.{name}", shape) for name, shape in tensors.items()]


def llama(total_bytes: int) -> Shapes:
    """The shapes of a small Llama of about `total_bytes` in bf16."""
    found: Shapes = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    number = 0
    while sum(2 * torch.Size(shape).numel() for _, shape in found) < total_bytes:
        found += layer(HIDDEN, INTERMEDIATE, KV, number)
        number += 1
    return found


def qwen_7b(layers: int) -> Shapes:
    return [tensor for number in range(layers) for tensor in layer(3584, 18944, 512, number, bias=True)]


MODELS: dict[str, Callable[[int], Shapes]] = {
    "llama": llama,
    "qwen-7b": lambda _: qwen_7b(28),
    "qwen-7b-embed": lambda _: (
        [(name, (152064, 3584)) for name in ("model.embed_tokens.weight", "lm_head.weight")] + qwen_7b(1)
    ),
}


def make_checkpoint(folder: Path, shapes: Shapes, seed: int) -> int:
    """Write a checkpoint of random weights; return its size in bytes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes:
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
        shard[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.iterdir())


# A process inherits the peak memory of its parent, so a small process in between starts the command and reports.
_WATCHER = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(status, time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
"""


class Run(NamedTuple):
    seconds: float
    cpu_seconds: float  # over all threads
    peak_rss_mb: float


def run(command: list[str]) -> Run:
    watched = subprocess.run([sys.executable, "-c", _WATCHER, *command], capture_output=True, text=True, check=True)
    status, seconds, cpu_seconds, peak = map(float, watched.stdout.split())
    if status:
        raise RuntimeError(f"{command} failed with status {status:.0f}")
    return Run(seconds, cpu_seconds, peak * (1 if sys.platform == "darwin" else 1024) / 1e6)


def commands_for(folder: Path, rank: int | None) -> dict[str, list[str]]:
    sources = [str(folder / role) for role in ("expert", "base")]
    copy, out = str(folder / "copy"), str(folder / "prior")
    build = [sys.executable, "-m", "drift_kernels.cli", "build", "--expert", sources[0], "--base", sources[1]]
    build += ["--modules", "full", "--out", out]
    import_torch = {"import torch": [sys.executable, "-c", "import torch"]}
    if rank is not None:
        return import_torch | {f"drift-prior build --rank {rank}": [*build, "--rank", str(rank)]}
    return import_torch | {
        "cp": ["cp", "-r", *sources, copy],
        "cp and sync": ["sh", "-c", 'cp -r "$1" "$2" "$3" && sync "$3"/*/*', "sh", *sources, copy],
        "drift-prior build": build,
    }


def measure(folder: Path, commands: Mapping[str, list[str]], repeats: int) -> dict[str, list[Run]]:
    results: dict[str, list[Run]] = {name: [] for name in commands}
    order = list(commands)
    shuffle = random.Random(0).shuffle
    for _ in track(range(repeats), "measuring", console=Console(stderr=True)):
        shuffle(order)
        for name in order:
            os.sync()
            (folder / "copy").mkdir()
            results[name].append(run(commands[name]))
            for leftover in ("copy", "prior"):
                shutil.rmtree(folder / leftover, ignore_errors=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of each checkpoint of --model llama (default: 2)")
    parser.add_argument(
        "--model", choices=MODELS, default="llama", help="the model that gives the shapes (default: llama)"
    )
    parser.add_argument("--rank", type=int, help="measure only builds of this rank")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder (default: the system's)")
    parser.add_argument("--json", type=Path, help="write one row per command")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        total = sum(
            make_checkpoint(folder / role, MODELS[arguments.model](int(arguments.gb * 1e9)), seed)
            for seed, role in enumerate(track(("expert", "base"), "making checkpoints", console=Console(stderr=True)))
        )
        results = measure(folder, commands_for(folder, arguments.rank), arguments.repeats)
    metadata = row_metadata()
    medians = {name: statistics.median(run.seconds for run in runs) for name, runs in results.items()}
    table = Table(title=f"two checkpoints, {total / 1e9:.2f} GB in total; medians of {arguments.repeats}")
    table.add_column("command", no_wrap=True)
    for title in ("seconds", "fastest", "slowest", "CPU seconds", "against cp", "GB/s read", "peak RSS, MB"):
        table.add_column(title, justify="right")
    rows = []
    for command, runs in results.items():
        seconds = sorted(run.seconds for run in runs)
        row = {
            "command": command,
            "model": arguments.model,
            "bytes": total,
            "seconds": medians[command],
            "fastest": seconds[0],
            "slowest": seconds[-1],
            "cpu_seconds": statistics.median(run.cpu_seconds for run in runs),
            "against_cp": medians[command] / medians["cp"] if "cp" in medians else None,
            "peak_rss_mb": max(run.peak_rss_mb for run in runs),
        }
        table.add_row(
            command,
            *(f"{row[key]:.2f}" for key in ("seconds", "fastest", "slowest", "cpu_seconds")),
            "-" if row["against_cp"] is None else f"{row['against_cp']:.2f}",
            f"{total / medians[command] / 1e9:.2f}",
            f"{row['peak_rss_mb']:.0f}",
        )
        rows.append(row | metadata)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

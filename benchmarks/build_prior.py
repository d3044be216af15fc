"""Building a prior against `cp` of the same checkpoints: time, and the peak memory of the building process.

    python -m benchmarks.build_prior [--gb 2] [--repeats 5] [--json FILE]

Two synthetic checkpoints (bf16, sharded, the shapes of a small Llama) are made in a temporary folder. In an order drawn
anew each time, they are copied with cp and built into a prior of all their tensors by `drift-prior build`, a process of
its own. Both read from the page cache, and the build also brings its output to the disk; `cp` does not, so a copy with
`sync` is shown too. The build's time holds the start of Python and torch, which is shown by itself.
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
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file

from .rows import row_metadata

HIDDEN, INTERMEDIATE, KV, VOCABULARY = 2048, 5632, 512, 32003
SHARD_BYTES = 500_000_000


def shapes(total_bytes: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama of about `total_bytes` in bf16."""
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV, HIDDEN),
        "self_attn.v_proj": (KV, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    written = 2 * VOCABULARY * HIDDEN
    number = 0
    while written < total_bytes:
        for name, shape in layer.items():
            yield f"model.layers.{number}.{name}.weight", shape
            written += 2 * torch.Size(shape).numel()
        number += 1


def make_checkpoint(folder: Path, total_bytes: int, seed: int) -> int:
    """Write a checkpoint of random weights; returns its bytes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes(total_bytes):
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
        shard[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.iterdir())


# A process inherits the peak memory of the one that started it: a small one stands between, and reports.
_WATCHER = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(status, time.perf_counter() - start, usage.ru_maxrss)
"""


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident MB of a command."""
    watched = subprocess.run([sys.executable, "-c", _WATCHER, *command], capture_output=True, text=True, check=True)
    status, seconds, peak = map(float, watched.stdout.split())
    if status:
        raise RuntimeError(f"{command} failed with status {status:.0f}")
    return seconds, peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def measure(folder: Path, total_bytes: int, repeats: int) -> dict[str, list[tuple[float, float]]]:
    sources = [str(folder / role) for role in ("expert", "base")]
    copy, out = str(folder / "copy"), str(folder / "prior")
    build = [sys.executable, "-m", "drift_kernels.cli", "build", "--expert", sources[0], "--base", sources[1]]
    commands = {
        "cp": ["cp", "-r", *sources, copy],
        "cp and sync": ["sh", "-c", 'cp -r "$1" "$2" "$3" && sync "$3"/*/*', "sh", *sources, copy],
        "import torch": [sys.executable, "-c", "import torch"],
        "drift-prior build": [*build, "--modules", "attn,mlp,norms,embed", "--out", out],
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    order = list(commands)
    shuffle = random.Random(0).shuffle
    for _ in track(range(repeats), "measuring", console=Console(stderr=True)):
        shuffle(order)
        for name in order:
            os.sync()
            (folder / "copy").mkdir()
            results[name].append(run(commands[name]))
            for leftover in (copy, out):
                shutil.rmtree(leftover, ignore_errors=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of each checkpoint (default: 2)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes (default: the system's)")
    parser.add_argument("--json", type=Path, help="write one row per command")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        total = sum(
            make_checkpoint(folder / role, int(arguments.gb * 1e9), seed)
            for seed, role in enumerate(track(("expert", "base"), "making checkpoints", console=Console(stderr=True)))
        )
        results = measure(folder, total, arguments.repeats)
    metadata = row_metadata()
    medians = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in results.items()}
    table = Table(title=f"two checkpoints, {total / 1e9:.2f} GB together; medians of {arguments.repeats}")
    table.add_column("command", no_wrap=True)
    for title in ("seconds", "fastest", "slowest", "against cp", "GB/s read", "peak RSS, MB"):
        table.add_column(title, justify="right")
    rows = []
    for command, runs in results.items():
        seconds = sorted(run[0] for run in runs)
        row = {
            "command": command,
            "bytes": total,
            "seconds": medians[command],
            "fastest": seconds[0],
            "slowest": seconds[-1],
            "against_cp": medians[command] / medians["cp"],
            "peak_rss_mb": max(run[1] for run in runs),
        }
        table.add_row(
            command,
            *(f"{row[key]:.2f}" for key in ("seconds", "fastest", "slowest", "against_cp")),
            f"{total / medians[command] / 1e9:.2f}",
            f"{row['peak_rss_mb']:.0f}",
        )
        rows.append(row | metadata)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

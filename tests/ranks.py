"""Real processes connected by gloo, for distributed tests."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(minutes=10)  # for hangs; less than pytest's, so that the ranks report where

# Ranks are forked from a process that has done the slow imports, and nothing else.
FORK_SERVER = mp.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    [
        *("torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"),
        *("torch.distributed.tensor.parallel", "hypothesis", "pytest", "safetensors.torch"),
    ]
)


def run(function: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """Run function(*args) in `world` processes, each with its rank; return their results. If one raises, the test fails
    with its traceback."""
    folder = folder / f"{function.__name__}-{world}-{len(list(folder.iterdir()))}"
    folder.mkdir()
    processes = [FORK_SERVER.Process(target=_rank, args=(function, rank, world, folder, args)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    errors = sorted(folder.glob("error-*"))
    assert not errors, "\n".join(f"{path.name}:\n{path.read_text()}" for path in errors)
    assert not any(process.exitcode for process in processes), [process.exitcode for process in processes]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(function: Callable[..., Any], rank: int, world: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # otherwise Accelerate gives every rank all cores
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        torch.save(function(*args), folder / f"{rank}.pt")
        dist.barrier()
    except Exception:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # gloo's threads can abort a process during teardown

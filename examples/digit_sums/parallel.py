"""Seeds side by side: a process and a progress bar each."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .experiment import SeedRun
from .settings import Arm, Settings


def run_seeds(
    seeds: Sequence[int], settings: Settings, arms: Sequence[Arm], out: Path, console: Console
) -> list[dict[str, Any]]:
    """The records of all seeds, in order. Checkpoints and priors stay in `out`/seed-N."""
    columns = (
        TextColumn("{task.fields[seed]}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    spawn = multiprocessing.get_context("spawn")
    workers = min(len(seeds), os.cpu_count() or 1)
    with (
        spawn.Manager() as manager,
        ProcessPoolExecutor(workers, spawn, prepare_process) as pool,
        Progress(*columns, console=console) as progress,
    ):
        steps = manager.Queue()
        total = settings.total_steps(arms)
        bars = {seed: progress.add_task("waiting", total=total, start=False, seed=f"seed {seed}") for seed in seeds}
        futures = [pool.submit(_run_seed, seed, settings, arms, out / f"seed-{seed}", steps) for seed in seeds]
        running = set(futures)
        while running:
            done, running = wait(running, timeout=0.2)
            while not steps.empty():
                seed, description = steps.get()
                progress.start_task(bars[seed])
                progress.update(bars[seed], advance=1, description=description)
            if any(future.exception() for future in done):
                pool.shutdown(cancel_futures=True)
                break
        for seed in seeds:
            progress.update(bars[seed], description="")
        return [future.result() for future in futures]


def prepare_process() -> None:
    """One thread, so that results do not depend on the machine's core count; and no chatter from transformers."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of how PEFT calls transformers


def _run_seed(seed: int, settings: Settings, arms: Sequence[Arm], folder: Path, steps: Queue[Any]) -> dict[str, Any]:
    return SeedRun(seed, settings, folder, lambda name: steps.put((seed, name))).run(arms)

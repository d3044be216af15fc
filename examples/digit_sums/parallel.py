"""Runs in parallel, one process per core, with a progress bar."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .cells import Cell, Cells
from .checkpoints import Checkpoints
from .run import Runner, stage_of
from .settings import Arm, Run, Settings, World


class Pool:
    """Makes runs, or returns completed ones.

    Args:
        settings: of all runs.
        root: folder of the checkpoints and the results.
        made_by: commit and versions, stored with each result.
        console: where the progress bar is drawn.
    """

    def __init__(self, settings: Settings, root: Path, made_by: Mapping[str, Any], console: Console) -> None:
        self.settings, self.root, self.made_by, self.console = settings, root, made_by, console
        self.cells = Cells(root, settings)

    def cells_of(self, runs: Iterable[Run], what: str) -> dict[Run, Cell]:
        """Return the cell of each run. First makes the models that the runs need; `what` names the runs in the bar."""
        runs = list(dict.fromkeys(runs))
        missing = [run for run in runs if self.cells.get(run) is None]
        if len(missing) < len(runs):
            there = f"{what}: {len(runs) - len(missing)} of {len(runs)} runs are already done"
            self.console.print(there, highlight=False, soft_wrap=True)
        if missing:
            self._make_models(missing)
            jobs = [(_make_run, (run, self.settings, self.root, self.made_by)) for run in missing]
            steps = sum(stage_of(run.arm, self.settings).steps for run in missing)
            self._work(f"{what}: {len(missing)} runs", jobs, steps)
        return {run: _there(self.cells.get(run)) for run in runs}

    def expert_scores(self, seeds: Iterable[int], world: World) -> list[float]:
        """The share of text sums that each seed's expert gets right."""
        seeds = list(seeds)
        self._make_models([Run(seed, world, Arm()) for seed in seeds])
        made = [Checkpoints(seed, self.settings, world, self.root, _ignore) for seed in seeds]
        return [checkpoints.expert_score() for checkpoints in made]

    def _make_models(self, runs: Sequence[Run]) -> None:
        """Make the models with one job per seed and family, whose experts share their base."""
        worlds: dict[tuple[int, str], list[World]] = {}
        missing: dict[Path, int] = {}
        for run in runs:
            world = World(run.world.family, run.world.expert_steps)
            steps = Checkpoints(run.seed, self.settings, world, self.root, _ignore).missing()
            if steps and world not in (known := worlds.setdefault((run.seed, world.family), [])):
                known.append(world)
            missing |= steps
        if worlds:
            jobs = [(_make_models, (seed, found, self.settings, self.root)) for (seed, _), found in worlds.items()]
            self._work(f"models of {len(jobs)} seeds", jobs, sum(missing.values()))

    def _work(self, what: str, jobs: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], steps: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        done_steps = spawn.Queue()
        workers = min(len(jobs), os.cpu_count() or 1)
        with (
            _closing(ProcessPoolExecutor(workers, spawn, prepare_process, (done_steps,))) as pool,
            Progress(*_columns(), console=self.console) as progress,
        ):
            bar = progress.add_task(what, total=steps, now="")
            running: set[Future[None]] = {pool.submit(job, *arguments) for job, arguments in jobs}
            with noting_interrupts() as interrupted:
                while running and not interrupted:
                    done, running = wait(running, timeout=0.2)
                    while not done_steps.empty():
                        progress.update(bar, advance=1, now=done_steps.get())
                    for future in done:
                        future.result()
            progress.update(bar, completed=steps, now="")


@contextmanager
def _closing(pool: ProcessPoolExecutor) -> Iterator[ProcessPoolExecutor]:
    """Terminate the workers on an error or Ctrl-C in the block; their files are written completely or not at all."""
    try:
        yield pool
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def noting_interrupts() -> Iterator[list[int]]:
    """Yield a list to which Ctrl-C appends; at the end of the block, raise KeyboardInterrupt if it has.

    An exception that came while `wait` holds the locks of futures would leave them locked.
    """
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
    if noted:
        raise KeyboardInterrupt


def _columns() -> tuple[Any, ...]:
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps,"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )


def prepare_process(done_steps: Queue[str]) -> None:
    """Set up a worker. It leaves Ctrl-C to its parent, and ends when the parent ends, for whatever reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    done_steps.cancel_join_thread()  # the parent may no longer be reading
    quiet()
    _done_steps.append(done_steps)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_done_steps: list[Queue[str]] = []  # of this worker: a single one


def _step_of(seed: int) -> Callable[[str], None]:
    return lambda what: _done_steps[0].put(f"seed {seed}: {what}")


def quiet() -> None:
    """Use one thread, so that results do not depend on the machine's core count, and silence routine messages."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("drift_kernels").setLevel(logging.WARNING)  # hides what each prior is bound to
    warnings.simplefilter("ignore", FutureWarning)  # from PEFT's calls to transformers


def _make_models(seed: int, worlds: list[World], settings: Settings, root: Path) -> None:
    for world in worlds:
        made = Checkpoints(seed, settings, world, root, _step_of(seed))
        made.reader()
        made.expert_score()


def _make_run(run: Run, settings: Settings, root: Path, made_by: Mapping[str, Any]) -> None:
    started = time.monotonic()
    record = Runner(run, settings, root, _step_of(run.seed)).record()
    Cells(root, settings).put(run, {**record, "seconds": round(time.monotonic() - started, 2), "made_by": made_by})


def _there(cell: Cell | None) -> Cell:
    assert cell is not None
    return cell


def _ignore(what: str) -> None:
    pass

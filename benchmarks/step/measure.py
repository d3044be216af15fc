"""Timing: every contender once in each repetition, in an order drawn anew, in one process."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from .contender import Contender

# An upper bound of a GPU's clock, and of the time that a step may have for its launches.
CYCLES_PER_MS = 2_500_000
MAX_WAIT_MS = 20.0


class Timing(NamedTuple):
    """One step, in milliseconds: its work on the device, and until `step()` returned."""

    ms: float
    host_ms: float


class Spread(NamedTuple):
    """The median and the quartiles of repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def time_step(contender: Contender, device: torch.device, cache: Tensor | None) -> Timing:
    """Times one step by the clock; on a GPU two steps, one by events and one by the clock of the host.

    `cache` is written before the step that events time, so that no contender finds its tensors in the L2.
    """
    if cache is None:
        ms = _host_ms(contender)
        return Timing(ms, ms)
    host_ms = _host_ms(contender, device)
    contender.prepare()
    # The device waits while the host launches, as it does behind a backward: what is timed is not the launching.
    torch.cuda._sleep(int(CYCLES_PER_MS * min(2 * host_ms, MAX_WAIT_MS)))
    cache.zero_()
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    contender.step()
    after.record()
    after.synchronize()
    return Timing(before.elapsed_time(after), host_ms)


def _host_ms(contender: Contender, device: torch.device | None = None) -> float:
    """Until `step()` returned; on a GPU with nothing queued before it."""
    contender.prepare()
    if device is not None:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    contender.step()
    return (time.perf_counter() - start) * 1e3


def flush_bytes(device: torch.device) -> int:
    """Enough to push everything else out of a GPU's L2; 0 for a CPU, whose caches the default sizes exceed."""
    return 2 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def measure(
    contenders: list[Contender], device: torch.device, reps: int, warmup: int = 2, seed: int = 0
) -> list[list[Timing]]:
    """`reps` timings of each contender, after `warmup` repetitions that are not counted."""
    timings: list[list[Timing]] = [[] for _ in contenders]
    order = list(range(len(contenders)))
    shuffle = random.Random(seed).shuffle
    size = flush_bytes(device)
    cache = torch.empty(size, dtype=torch.uint8, device=device) if size else None
    with _no_garbage_collection():
        for rep in track(range(warmup + reps), "measuring", console=Console(stderr=True), transient=True):
            shuffle(order)
            for i in order:
                timing = time_step(contenders[i], device, cache)
                if rep >= warmup:
                    timings[i].append(timing)
    return timings


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

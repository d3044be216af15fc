"""Timing: every contender takes one step per repetition, in a new random order, in one process."""

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

# Upper bounds of a GPU's clock, and of the wait that covers a step's launches.
CYCLES_PER_MS = 2_500_000
MAX_WAIT_MS = 20.0


class Timing(NamedTuple):
    """The times of one step, in milliseconds: its work on the device, and the time until `step()` returns."""

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
    """Time one step by the clock; on a GPU two steps, one by CUDA events and one by the host's clock.

    `cache` is written before the step timed by events, so that no contender finds its tensors in L2.
    """
    if cache is None:
        ms = _host_ms(contender)
        return Timing(ms, ms)
    host_ms = _host_ms(contender, device)
    contender.prepare()
    # The device waits while the host launches, as after a backward pass, so that launching is not timed.
    torch.cuda._sleep(int(CYCLES_PER_MS * min(2 * host_ms, MAX_WAIT_MS)))
    cache.zero_()
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    contender.step()
    after.record()
    after.synchronize()
    return Timing(before.elapsed_time(after), host_ms)


def _host_ms(contender: Contender, device: torch.device | None = None) -> float:
    """The time until `step()` returns; on a GPU, with nothing queued before it."""
    contender.prepare()
    if device is not None:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    contender.step()
    return (time.perf_counter() - start) * 1e3


def flush_bytes(device: torch.device) -> int:
    """The bytes that evict everything else from a GPU's L2; 0 for a CPU, whose caches the default sizes exceed."""
    return 2 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def measure(
    contenders: list[Contender], device: torch.device, reps: int, warmup: int = 2, seed: int = 0
) -> list[list[Timing]]:
    """Return `reps` timings of each contender, after `warmup` uncounted repetitions."""
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

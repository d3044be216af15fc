"""Timing: every contender once in each repetition, in an order drawn anew, in one process."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from .contender import Contender


class Timing(NamedTuple):
    """One step, in milliseconds: until the device had done it, and until `step()` returned."""

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


def time_step(step: Callable[[], object], device: torch.device) -> Timing:
    """Times one call, by events on a GPU and by the clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        ms = (time.perf_counter() - start) * 1e3
        return Timing(ms, ms)
    torch.cuda.synchronize(device)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    start = time.perf_counter()
    step()
    host_ms = (time.perf_counter() - start) * 1e3
    after.record()
    after.synchronize()
    return Timing(before.elapsed_time(after), host_ms)


def measure(
    contenders: list[Contender], device: torch.device, reps: int, warmup: int = 2, seed: int = 0
) -> list[list[Timing]]:
    """`reps` timings of each contender, after `warmup` repetitions that are not counted."""
    timings: list[list[Timing]] = [[] for _ in contenders]
    order = list(range(len(contenders)))
    shuffle = random.Random(seed).shuffle
    with _no_garbage_collection():
        for rep in track(range(warmup + reps), "measuring", console=Console(stderr=True), transient=True):
            shuffle(order)
            for i in order:
                contenders[i].prepare()
                timing = time_step(contenders[i].step, device)
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

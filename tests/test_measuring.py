"""The timing of steps: in what order, around what, and in which unit."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.step import contender, measure

CPU = torch.device("cpu")


def made(
    name: str, step: Callable[[], object], prepare: Callable[[], object] = contender.nothing
) -> contender.Contender:
    return contender.Contender(name, name, None, None, 0, step=step, prepare=prepare)


def test_every_contender_runs_once_in_each_repetition_in_a_new_order() -> None:
    calls: list[str] = []
    contenders = [
        made(name, lambda name=name: calls.append(name), lambda: calls.append("prepare"))  # type: ignore[misc]
        for name in "abc"
    ]
    timings = measure.measure(contenders, CPU, reps=9, warmup=1, seed=3)
    assert calls[::2] == ["prepare"] * 30
    orders = {"".join(calls[1::2][i : i + 3]) for i in range(0, 30, 3)}
    assert {"".join(sorted(order)) for order in orders} == {"abc"}
    assert len(orders) > 2
    assert [len(times) for times in timings] == [9, 9, 9]


def test_garbage_is_not_collected_in_between() -> None:
    enabled: list[bool] = []
    measure.measure([made("a", lambda: enabled.append(gc.isenabled()))], CPU, reps=2)
    assert enabled == [False] * 4
    assert gc.isenabled()

    def fail() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure.measure([made("a", fail)], CPU, reps=2)
    assert gc.isenabled(), "after an error too"


def test_times_are_in_milliseconds_and_of_the_step_alone() -> None:
    slow = made("a", lambda: time.sleep(0.05), prepare=lambda: time.sleep(0.1))
    start = time.perf_counter()
    timing = measure.time_step(slow, CPU, None)
    whole = (time.perf_counter() - start) * 1e3
    assert 50 <= timing.ms == timing.host_ms <= whole - 100  # however long a busy machine takes


def test_a_gpu_step_is_timed_behind_a_flush_and_apart_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 7.0

    class Cache:
        def zero_(self) -> None:
            calls.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("sleep"), raising=False)
    one = made("a", lambda: calls.append("step"), lambda: calls.append("prepare"))
    start = time.perf_counter()
    timing = measure.time_step(one, torch.device("cuda"), Cache())
    whole = (time.perf_counter() - start) * 1e3
    host = ["prepare", "synchronize", "step"]
    assert calls == [*host, "prepare", "sleep", "flush", "record", "step", "record", "wait"]
    assert timing.ms == 7
    assert 0 < timing.host_ms < whole

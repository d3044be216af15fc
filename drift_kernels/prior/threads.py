"""Parallel work on a few threads, each of which runs torch operations on a single thread."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = min(4, os.cpu_count() or 1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch operations on one thread each. On a busy machine, the barriers of many short parallel operations would
    cost several times the work itself. It also makes results independent of the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[tuple[Item, Result], None, None]:
    """Yield the items with their results, in the items' order, taking at most WORKERS + 1 items ahead."""
    with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        in_work: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            if len(in_work) > WORKERS:
                first, future = in_work.popleft()
                yield first, future.result()
            in_work.append((item, pool.submit(work, item)))
        while in_work:
            first, future = in_work.popleft()
            yield first, future.result()

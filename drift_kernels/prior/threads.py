"""Work side by side on a few threads, each with torch's operations on itself alone."""

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
    """One thread for each of torch's operations: where several run side by side, the barriers of many short parallel
    operations would cost several times the work itself on a busy machine. Nor do results then depend on how many
    threads there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[tuple[Item, Result], None, None]:
    """The items with their results, in the items' order; no more than WORKERS + 1 are taken ahead."""
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

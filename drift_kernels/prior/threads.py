"""Work on pieces, a few side by side."""

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


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[tuple[Item, Result], None, None]:
    """The items with their results, in the items' order; no more than WORKERS + 1 are taken ahead."""
    with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        in_work: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            if len(in_work) > WORKERS:
                first, future = in_work.popleft()
                yield first, future.result()
            in_work.append((item, pool.submit(work, item)))
        for first, future in in_work:
            yield first, future.result()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for each of torch's operations: several pieces are in work side by side, and the barriers of many
    short parallel operations would cost several times the work itself on a busy machine. Nor do results then depend on
    how many threads there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

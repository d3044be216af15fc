"""Work side by side on a few threads, each with torch's operations on itself alone."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

WORKERS = min(4, os.cpu_count() or 1)

Given = TypeVar("Given")
Result = TypeVar("Result")


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


def side_by_side(function: Callable[[Given], Result], given: Iterable[Given]) -> Generator[Result, None, None]:
    """function(x) for each x, in order; no more of them are taken ahead than there are threads."""
    with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        in_work: deque[Future[Result]] = deque()
        for x in given:
            if len(in_work) > WORKERS:
                yield in_work.popleft().result()
            in_work.append(pool.submit(function, x))
        while in_work:
            yield in_work.popleft().result()

"""Signals that stop a command: Ctrl-C, SIGTERM, SIGHUP."""

from __future__ import annotations

import concurrent.futures
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ..prior.folders import NewFolder

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_RETRY = 0.005  # seconds

# An exception inside of these could leave a lock taken.
_SHIELDED_FILES = (threading.__file__, queue.__file__, str(Path(concurrent.futures.__file__).parent))
# These must not be left half done.
_SHIELDED_FUNCTIONS = (NewFolder.clear.__code__,)
_WAIT, _START = threading.Condition.wait.__code__, threading.Thread.start.__code__


class Stopped(BaseException):
    """Raised when a signal asks the command to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number  # as shells report a program that a signal has ended

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.args[0]).name}"


@contextmanager
def stoppable(*, to_the_end: bool) -> Iterator[None]:
    """Raise Stopped on the first of SIGINT, SIGTERM and SIGHUP, a few milliseconds later if the program is at a place
    that must not be interrupted. Further signals are ignored, so that they do not disturb the cleanup and the exit of
    the process. Signals that were ignored before (nohup) stay ignored.

    With `to_the_end`, the process is expected to exit after the block: a signal then ends it, without a traceback from
    Python's cleanup.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    heard = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    first: int | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if first is None:
            first = number
            for each in heard:
                signal.signal(each, signal.SIG_IGN)
            signal.signal(signal.SIGALRM, stop)
        if _is_shielded(frame):
            signal.setitimer(signal.ITIMER_REAL, _RETRY)
        else:
            raise Stopped(first)

    def try_again_if_lost(what: Any) -> None:
        if isinstance(what.exc_value, Stopped):  # raised in a callback or a destructor
            signal.setitimer(signal.ITIMER_REAL, _RETRY)
        else:
            hook(what)

    hook, sys.unraisablehook = sys.unraisablehook, try_again_if_lost
    alarm, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if first is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
            signal.setitimer(signal.ITIMER_REAL, *timer)
        for number in heard if first is None else ():
            signal.signal(number, signal.SIG_DFL if to_the_end else before[number])


def _is_shielded(frame: FrameType | None) -> bool:
    """Whether an exception must not be raised in this frame. While a thread waits for a condition, it may be."""
    waits = frame is not None and frame.f_code is _WAIT and frame.f_locals.get("gotit") is False
    while frame is not None:
        code, frame = frame.f_code, frame.f_back
        if code in _SHIELDED_FUNCTIONS or code is _START:
            return True
        if not waits and code.co_filename.startswith(_SHIELDED_FILES):
            return True
    return False

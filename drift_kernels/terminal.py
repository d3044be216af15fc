"""Output of the command to a terminal or a pipe, and signals that stop it."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

_WIDE = 1000  # columns of a pipe or file: its reader can wrap lines, but cannot restore what was cut off
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """Raised when a signal asks the command to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number  # as shells report a program that a signal has ended

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.args[0]).name}"


@contextmanager
def stoppable(*, to_the_end: bool) -> Iterator[None]:
    """Raise Stopped on the first of SIGINT, SIGTERM and SIGHUP. Further ones are ignored, so that they do not disturb
    the cleanup and the exit of the process. Signals that were ignored before (nohup) stay ignored.

    With `to_the_end`, the process is expected to exit after the block: a signal then ends it, without a traceback from
    Python's cleanup.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    heard = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]

    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        for each in heard:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in () if stopped else heard:
            signal.signal(number, signal.SIG_DFL if to_the_end else before[number])


def console(*, stderr: bool = False) -> Console:
    """Return a console as wide as the terminal; without a terminal, lines are not wrapped."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=_WIDE)


class LogLines(logging.Handler):
    """Prints each log record as a line of a console."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        say(self._console, f"{record.levelname.lower()}: {self.format(record)}")


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line without markup or wrapping."""
    console.print(f"drift-prior: {text}", style=style, markup=False, highlight=False, soft_wrap=True)

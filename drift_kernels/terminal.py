"""How the command talks to a terminal or a pipe, and how it is stopped."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

_WIDE = 1000  # columns of what is no terminal: its reader can break lines, and cannot bring back what is cut
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number  # what shells report of a program that a signal ended

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.args[0]).name}"


@contextmanager
def stoppable(*, to_the_end: bool) -> Iterator[None]:
    """The first of SIGINT, SIGTERM and SIGHUP raises Stopped here; from then on they are ignored, so that nothing
    disturbs the clearing up and the end of the process. What was ignored before (nohup) stays ignored.

    With `to_the_end` the process has nothing else to do afterwards: a signal then ends it, without a traceback from
    Python's own clearing up.
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
    """As wide as the terminal; where there is none, nothing is wrapped."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=_WIDE)


class LogLines(logging.Handler):
    """Log records as lines of a console, one for each."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        say(self._console, f"{record.levelname.lower()}: {self.format(record)}")


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is."""
    console.print(f"drift-prior: {text}", style=style, markup=False, highlight=False, soft_wrap=True)

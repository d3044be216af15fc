"""Output of the command to a terminal or a pipe."""

from __future__ import annotations

import logging

from rich.console import Console

_WIDE = 1000  # columns of a pipe or file: its reader can wrap lines, but cannot restore what was cut off


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

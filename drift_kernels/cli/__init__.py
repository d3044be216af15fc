"""Build, inspect, check, combine and apply priors; initialise LoRA adapters from them; estimate memory."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from ..errors import CheckpointError, PriorError
from ..terminal import LogLines, console, say
from . import applying, building, checking, combining, initialising, inspecting, sizing
from .about import PrintVersions
from .arguments import EXIT_STATUS
from .stopping import Stopped, stoppable

# Each has `add`, which declares its arguments.
_COMMANDS = (building, inspecting, checking, combining, applying, initialising, sizing)


def command_line() -> argparse.ArgumentParser:
    """The parser of drift-prior's arguments."""
    parser = argparse.ArgumentParser(prog="drift-prior", description=__doc__, epilog=EXIT_STATUS)
    parser.add_argument("--version", action=PrintVersions, nargs=0, help="print versions and backends, and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status (listed by `--help`). Usage errors exit with 2.

    Without `argv`, the arguments are those of the process, which is expected to end afterwards; so it is after a signal
    has stopped the command.
    """
    arguments = command_line().parse_args(argv)
    errors = console(stderr=True)
    handler = LogLines(errors)
    logging.getLogger("drift_kernels").addHandler(handler)
    try:
        with stoppable(to_the_end=argv is None):
            status: int = arguments.run(arguments, errors)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output (`| head`) has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CheckpointError, PriorError, OSError, ImportError) as error:
        say(errors, str(error), style="red")
        return 1
    except Stopped as stopped:
        say(errors, str(stopped))
        return stopped.status
    finally:
        logging.getLogger("drift_kernels").removeHandler(handler)
    return status

"""Slow products, made by separate processes while other tests run, once for all workers of pytest-xdist.

python tests/background.py FILE COMMAND...      runs such a process
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NICE = ["nice"] if shutil.which("nice") else []
OUT = "{out}"  # in a command, the output file; without it, the output is what the command prints


@cache
def folder() -> Path:
    """The folder of this pytest run, shared by its workers. The last worker removes it and ends its processes."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    made = Path(tempfile.gettempdir(), f"drift_kernels-tests-{run}")
    made.mkdir(exist_ok=True)
    users = os.open(made / "users", os.O_CREAT)
    fcntl.flock(users, fcntl.LOCK_SH)

    def leave() -> None:
        with suppress(BlockingIOError):
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for begun in made.glob("*.begun"):
                with suppress(ProcessLookupError, ValueError):
                    os.killpg(int(begun.read_text()), signal.SIGKILL)
            shutil.rmtree(made, ignore_errors=True)

    atexit.register(leave)
    return made


@dataclass(frozen=True)
class Product:
    """A file that a command makes."""

    name: str
    command: Sequence[str | Path]
    environment: Mapping[str, str] | None = None

    def begin(self) -> None:
        """Start making it, unless another worker has."""
        with suppress(FileExistsError), (folder() / f"{self.name}.begun").open("x") as begun:
            runner = [*NICE, sys.executable, __file__, str(folder() / self.name), *map(str, self.command)]
            process = subprocess.Popen(runner, env=self.environment, start_new_session=True)
            begun.write(str(process.pid))

    def path(self) -> Path:
        """Wait for the file and return it. Raises AssertionError with the command's output if it failed."""
        self.begin()
        made, failed = folder() / self.name, folder() / f"{self.name}.failed"
        while not made.exists():
            assert not failed.exists(), failed.read_text()
            time.sleep(0.02)
        return made


def _make(made: Path, command: list[str]) -> None:
    """Make the file, which appears complete or not at all."""
    part = made.with_name(f"{made.name}.part")
    arguments = [argument.replace(OUT, str(part)) for argument in command]
    done = subprocess.run(arguments, capture_output=True)
    if done.returncode:
        failed = made.with_name(f"{made.name}.failed")
        part.write_text(f"{arguments} ended with {done.returncode}:\n{done.stderr.decode(errors='replace')}")
        part.rename(failed)
        return
    if arguments == command:
        part.write_bytes(done.stdout)
    part.rename(made)


if __name__ == "__main__":
    _make(Path(sys.argv[1]), sys.argv[2:])

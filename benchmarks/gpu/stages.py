"""Runs commands one after another, each with a time limit and all within a budget, and reports their Outcomes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

OK, FAILED, NOT_RUN = "ok", "failed", "not run"
MAX_OUTPUT_BYTES = 1_000_000  # of one stage in the log


@dataclass(frozen=True)
class Stage:
    """A command.

    Attributes:
        seconds: time limit, after which it is killed with every process that it started.
        env: added to the environment of this process.
        needs: stages that must have succeeded before it runs.
        missing: why the machine cannot run it, if that is known in advance.
        refusals: texts in its output by which the machine refuses it; it then counts as not run, not as failed.
    """

    name: str
    command: list[str]
    seconds: float
    env: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    missing: str | None = None
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a stage ended, with the reason if it did not succeed."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str | None = None

    def __str__(self) -> str:
        reason = "" if self.reason is None else f": {self.reason}"
        return f"{self.name:<12} {self.status:<8} {self.seconds:6.1f} s{reason}"


def run_stages(
    stages: list[Stage],
    budget: float,
    log: Path,
    cwd: Path,
    ended: Callable[[list[Outcome]], object] = lambda outcomes: None,
) -> list[Outcome]:
    """Run the stages in order, with their output in `log`; call `ended` after each with the outcomes so far.

    A stage may take at most what is left of `budget` (seconds); it fails if nothing is left.
    """
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + budget
    for stage in stages:
        succeeded = {outcome.name for outcome in outcomes if outcome.status == OK}
        unmet = [name for name in stage.needs if name not in succeeded]
        left = deadline - time.monotonic()
        if stage.missing is not None:
            outcome = Outcome(stage.name, NOT_RUN, reason=stage.missing)
        elif unmet:
            outcome = Outcome(stage.name, NOT_RUN, reason=f"needs {' and '.join(unmet)}")
        elif left <= 0:
            outcome = Outcome(stage.name, FAILED, reason=f"the {budget:g} s for all stages are used up")
        else:
            outcome = _run(stage, min(stage.seconds, left), log, cwd)
        outcomes.append(outcome)
        ended(outcomes)
    return outcomes


def _run(stage: Stage, seconds: float, log: Path, cwd: Path) -> Outcome:
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(stage.command)}    [{stage.name}]\n".encode())
        file.flush()
        begin = file.tell()
        start = time.monotonic()
        reason = _wait(stage, seconds, file.fileno(), cwd)
        elapsed = time.monotonic() - start
    output = _shorten_output(log, begin)
    if reason is None:
        return Outcome(stage.name, OK, elapsed)
    refusal = next((line for line in output.splitlines() if any(text in line for text in stage.refusals)), None)
    if refusal is not None:
        return Outcome(stage.name, NOT_RUN, elapsed, refusal.strip("= \t"))
    return Outcome(stage.name, FAILED, elapsed, reason)


def _wait(stage: Stage, seconds: float, output: int, cwd: Path) -> str | None:
    """Run the command in its own process group and kill the group at the end; return why it failed, or None."""
    try:
        process = subprocess.Popen(
            stage.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **stage.env},
            cwd=cwd,
            start_new_session=True,
        )
    except OSError as error:
        return str(error)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None if status == 0 else f"exit status {status}"


def _shorten_output(log: Path, begin: int) -> str:
    """Cut the middle out of a stage's output in the log, from `begin` on, if it is too long; return the output."""
    output = log.read_bytes()[begin:]
    if len(output) > MAX_OUTPUT_BYTES:
        half = MAX_OUTPUT_BYTES // 2
        left_out = f"\n[{len(output) - 2 * half} bytes left out]\n".encode()
        output = output[:half] + left_out + output[-half:]
        with log.open("r+b") as file:
            file.seek(begin)
            file.write(output)
            file.truncate()
    return output.decode(errors="replace")

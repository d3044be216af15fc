"""Commands run one after another, each within its time and all within a budget; how each ended is an Outcome."""

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
        seconds: after which it is stopped, with every process that it started.
        env: beside the environment of this process.
        needs: stages without whose success it is not run.
        missing: why the machine cannot run it, where that is known before.
        refusals: what its output says where the machine refuses it: then it has failed at nothing, and was not run.
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
    """How a stage ended, and why if it did not end well."""

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
    """Runs the stages in their order, with their output in `log`; `ended` is called after each with those so far.

    A stage may take what is left of `budget` (seconds), but no more; one that comes when nothing is left has failed.
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
            outcome = Outcome(stage.name, FAILED, reason=f"nothing is left of the {budget:g} s for all stages")
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
    """Runs the command as a process group of its own; returns why it failed. No process of the group outlives it."""
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
    """What a stage has written to the log from `begin` on, after leaving its middle out if it is too long."""
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

"""Ctrl-C, SIGTERM and SIGHUP: one line, an exit status, and nothing left behind. Real processes, real signals."""

from __future__ import annotations

import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoints import text_weights, tuned, write_checkpoint

from drift_kernels import Prior, apply_prior, build_prior
from drift_kernels.cli.stopping import Stopped, stoppable

ROOT = Path(__file__).parents[1]
STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}

COMMAND = """
import concurrent.futures, linecache, os, pathlib, shutil, signal, sys, threading
for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # whatever the tests run under
    signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
from drift_kernels import cli
from drift_kernels.cli import building
from drift_kernels.prior import build, shards, writing
folder, moment, words = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:]

def pausing(function, when=lambda: True):
    def paused(*arguments, **options):
        if when():
            if threading.current_thread() is threading.main_thread():
                os.write(1, b"now\\n")
            os.read(0, 1)  # until `Running.end` closes it: the signals have been sent by then
        return function(*arguments, **options)
    return paused

def at_line(number, function):  # of the lines that the main thread runs, Python's own ones included
    # Python looks for signals at the beginning of functions, after calls and in loops, but not before these.
    never = "self.clear(", "self._acquire_restore(", "try:"
    left = [number]
    def trace(frame, event, _):
        name = frame.f_code.co_filename
        if event == "line" and name != "<string>":
            left[0] -= not linecache.getline(name, frame.f_lineno).strip().startswith(never)
            if left[0] == 0:
                left[0] = -1
                handler = signal.getsignal(signal.SIGINT)
                if handler is signal.SIG_DFL:
                    os.kill(os.getpid(), signal.SIGINT)
                else:
                    handler(signal.SIGINT, frame)
        return trace
    def traced(*arguments, **options):
        sys.settrace(trace)
        return function(*arguments, **options)
    return traced

renames = []
if moment == "in a piece":
    shards.TensorFileWriter.append = pausing(shards.TensorFileWriter.append)
elif moment == "in a write":
    writing.FileWriter.write = pausing(writing.FileWriter.write)
elif moment == "before the record":
    build.write_json = pausing(build.write_json)
elif moment == "between the renames":
    rename = pathlib.Path.rename
    pathlib.Path.rename = pausing(rename, lambda: renames.append(1) or len(renames) == 2)
elif moment == "in a thread":
    build.DeltaStream._work = pausing(build.DeltaStream._work)
elif moment == "at a line":
    building.build_prior = at_line(int(words[0]), building.build_prior)
if moment in ("in a thread", "in a write"):  # of a thread that the main thread waits for
    result = concurrent.futures.Future.result
    concurrent.futures.Future.result = pausing(result, lambda: any(folder.glob("prior.*")))
if "twice" in words or moment == "in a removal":
    shutil.rmtree = pausing(shutil.rmtree)
if "nohup" in words:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
commands = {
    "build": ["--expert", folder / "expert", "--base", folder / "base"],
    "combine": [folder / "one", folder / "one", "--weights", 1, 2, "--method", "dare_ties", "--density", 0.5],
    "apply": [folder / "one", "--base", folder / "base"],
}
which = next((word for word in words if word in commands), "build")
options = [*commands[which], "--out", folder / "prior", "--overwrite"]
sys.argv = ["drift-prior", which, *map(str, options)]
status = cli.main()
sys.settrace(None)
sys.exit(status)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights = text_weights()
    write_checkpoint(tmp_path / "base", weights)
    write_checkpoint(tmp_path / "expert", tuned(weights))
    return tmp_path


class Running:
    """A command (`build`, or one given in the words) that reports when it has reached a moment."""

    def __init__(self, folder: Path, moment: str, *words: str) -> None:
        command = [sys.executable, "-c", COMMAND, str(folder), moment, *words]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(command, **pipes, text=True, cwd=ROOT)
        if moment != "at a line":
            self.wait_for_it()

    def wait_for_it(self) -> None:
        assert self.process.stdout.readline() == "now\n", self.process.stderr.read()

    def send(self, name: str) -> None:
        self.process.send_signal(getattr(signal, name))

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=300)
        return self.process.returncode, errors


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("prior*"))


@pytest.mark.parametrize(
    ("moment", "name"),
    [
        ("in a piece", "SIGINT"),
        ("in a piece", "SIGTERM"),
        ("before the record", "SIGINT"),
        ("before the record", "SIGHUP"),
        ("in a thread", "SIGTERM"),
    ],
)
def test_one_line_a_status_and_nothing_left(folder: Path, moment: str, name: str) -> None:
    build = Running(folder, moment)
    assert leftovers(folder) != []
    build.send(name)
    assert build.end() == (STATUS[name], f"drift-prior: stopped by {name}\n")
    assert leftovers(folder) == []


@pytest.mark.parametrize("moment", ["in a piece", "between the renames"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_prior_that_was_to_be_replaced_stays(folder: Path, moment: str, name: str) -> None:
    old = build_prior(folder / "expert", folder / "base", folder / "prior", modules=("attn",))
    build = Running(folder, moment)
    build.send(name)
    assert build.end() == (STATUS[name], f"drift-prior: stopped by {name}\n")
    assert leftovers(folder) == ["prior"]
    assert Prior.open(folder / "prior").fingerprint == old.fingerprint
    assert Prior.open(folder / "prior").verify().intact


@pytest.mark.parametrize("moment", ["in a write", "between the renames"])
@pytest.mark.parametrize("command", ["combine", "apply"])
def test_combine_and_apply(folder: Path, command: str, moment: str) -> None:
    """A stopped command leaves nothing behind, and keeps what it was to replace."""
    one = build_prior(folder / "expert", folder / "base", folder / "one")
    if moment == "between the renames":
        if command == "combine":
            shutil.copytree(folder / "one", folder / "prior")
        else:
            apply_prior(one, folder / "base", folder / "prior", scale=-1)
    before = {path.name: path.read_bytes() for path in (folder / "prior").glob("*")}
    running = Running(folder, moment, command)
    assert len(leftovers(folder)) > 0
    running.send("SIGTERM")
    assert running.end()[0] == STATUS["SIGTERM"]
    assert leftovers(folder) == (["prior"] if before else [])
    assert {path.name: path.read_bytes() for path in (folder / "prior").glob("*")} == before


@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
def test_a_second_signal_does_not_disturb_the_clearing_up(folder: Path, second: str) -> None:
    build = Running(folder, "in a piece", "twice")
    build.send("SIGINT")
    build.wait_for_it()  # it is about to remove the unfinished folder
    build.send(second)
    build.send(second)
    assert build.end() == (130, "drift-prior: stopped by SIGINT\n")
    assert leftovers(folder) == []


def test_the_prior_that_was_replaced_is_removed_whole(folder: Path) -> None:
    """The first signal comes while it is removed: the command may be at its end before it is stopped."""
    old = build_prior(folder / "expert", folder / "base", folder / "prior", modules=("attn",))
    build = Running(folder, "in a removal")
    build.send("SIGINT")
    assert build.end() in ((0, ""), (130, "drift-prior: stopped by SIGINT\n"))
    assert leftovers(folder) == ["prior"]
    assert Prior.open(folder / "prior").fingerprint != old.fingerprint


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, whatever the tests run under. The user's alarm, of 900 s, is kept."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    alarm, timer = signal.signal(signal.SIGALRM, lambda *_: None), signal.setitimer(signal.ITIMER_REAL, 900)
    mine = signal.getsignal(signal.SIGALRM)
    yield
    assert signal.getsignal(signal.SIGALRM) is mine
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, *timer)


def stopped_soon_after(interrupted: Callable[[], object]) -> None:
    with stoppable(to_the_end=False):
        interrupted()
        time.sleep(300)


@pytest.mark.usefixtures("interrupts")
def test_a_signal_in_a_destructor_is_not_lost() -> None:
    class Last:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    hook = sys.unraisablehook
    with pytest.raises(Stopped):
        stopped_soon_after(Last)  # Python drops the exception that the handler raises
    assert sys.unraisablehook is hook


@pytest.mark.usefixtures("interrupts")
def test_a_lock_of_pythons_own_code_does_not_stay_taken() -> None:
    """A queue calls `_put` while it holds its lock."""

    class Interrupted(queue.Queue):
        def _put(self, item: int) -> None:
            signal.raise_signal(signal.SIGINT)
            super()._put(item)

    one = Interrupted()
    with pytest.raises(Stopped):
        stopped_soon_after(lambda: one.put(1))
    assert one.get_nowait() == 1


@pytest.mark.usefixtures("interrupts")
def test_who_waits_is_stopped_at_once() -> None:
    release, main, ended = threading.Event(), threading.main_thread().ident, []

    def endless() -> None:
        signal.pthread_kill(main, signal.SIGINT)
        release.wait(300)
        ended.append(True)

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(Stopped), stoppable(to_the_end=False):
            pool.submit(endless).result()
        assert not ended
        release.set()


def test_what_was_ignored_stays_ignored(folder: Path) -> None:
    """As with nohup."""
    build = Running(folder, "in a piece", "nohup")
    build.send("SIGHUP")
    time.sleep(0.2)
    assert build.process.poll() is None
    build.send("SIGINT")
    assert build.end()[0] == 130


@pytest.mark.parametrize("to_the_end", [False, True])
def test_what_a_signal_does_afterwards(to_the_end: bool) -> None:
    """At its end a process leaves signals to the system: Python would print a traceback from its own clearing up."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        with stoppable(to_the_end=to_the_end):
            assert not {*map(signal.getsignal, numbers)} & {*handlers, signal.SIG_DFL}
        assert list(map(signal.getsignal, numbers)) == (3 * [signal.SIG_DFL] if to_the_end else handlers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_at_any_moment(folder: Path) -> None:
    """At any of about 29,000 lines: the prior is complete, or there is none. No lock stays taken, no signal is lost."""
    builds = []
    for number in range(4):
        for role in ("expert", "base"):
            shutil.copytree(folder / role, folder / str(number) / role)
        line = int(torch.randint(1, 30_000, ()))
        builds.append(Running(folder / str(number), "at a line", str(line)))
    for number, build in enumerate(builds):
        status, errors = build.end()
        # -SIGINT: the build was done, and the process on its way out.
        assert (status, errors) in ((0, ""), (130, "drift-prior: stopped by SIGINT\n"), (-signal.SIGINT, ""))
        assert leftovers(folder / str(number)) in ([], ["prior"])
        if leftovers(folder / str(number)):
            assert Prior.open(folder / str(number) / "prior").verify().intact
        else:
            assert status == 130

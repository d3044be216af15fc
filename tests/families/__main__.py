"""`python -m tests.families [NAME ...]`: the table of families, each checked in its own process with a time limit."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import re
import resource
import tempfile
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers as hf

from .catalogue import Family, families
from .check import Row, check
from .page import counts, save, write_page

_SECONDS, _BYTES = 30, 6 << 30


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("names", nargs="*", help="model types (default: all, and write the page)")
    parser.add_argument("--traceback", action="store_true", help="run in this process and raise errors")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [family for family in families() if not arguments.names or family.name in arguments.names]
    rows = []
    for family in chosen:
        if arguments.traceback:
            with tempfile.TemporaryDirectory() as folder:
                row = check(family, Path(folder))
        else:
            row = in_a_process(family)
        rows.append(row)
        faults = [f"{kind} {names[:3]}" for kind in ("silent", "wrong", "tower") if (names := getattr(row, kind))]
        print(row.verdict, row.family, f"{row.bound}/{row.shared}", row.rest, row.cure, *faults, flush=True)
        if row.verdict != "full" and (arguments.names or row.verdict == "not tried"):
            print("   ", row.told[: 2000 if arguments.names else 200])
    print(counts(rows))
    if not arguments.names:
        save(rows)
        write_page()


def in_a_process(family: Family) -> Row:
    """The row of a family; it is "not tried" if its process dies or exceeds the time limit."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(family, there))
    process.start()
    there.close()
    row = Row(family.name, family.model, family.multimodal, told=f"took more than {_SECONDS} s")
    start = time.monotonic()
    try:
        if here.poll(_SECONDS):
            row = here.recv()
    except EOFError:
        row.told = "its process died"
    process.join(max(0.0, min(5.0, _SECONDS - time.monotonic() + start)))
    process.kill()
    process.join()
    return row


def _work(family: Family, results: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    hf.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            results.send(check(family, Path(folder)))
    except Exception as error:  # any error is the reason in the table
        told = " ".join(f"{type(error).__name__}: {error}".split())
        told = re.sub(r"/tmp/\w+/|/\S*/(?=\w+/modeling|site-packages)", "", told)
        results.send(Row(family.name, family.model, family.multimodal, told=told[:300]))


if __name__ == "__main__":
    main()

"""drift-prior --version."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..kernels import backends
from ..version import __version__


class PrintVersions(argparse.Action):
    """Prints the versions, and what "auto" can choose on the devices of this machine; then ends the process."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        print("\n".join(_lines()))
        parser.exit()


def _lines() -> Iterator[str]:
    yield f"drift_kernels {__version__}"
    yield f"torch {torch.__version__}"
    yield f"Python {platform.python_version()}"
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        reasons = backends.unavailable(torch.device(device))
        yield f"backends on {device}: {', '.join(name for name, reason in reasons.items() if reason is None)}"
        yield from (f"  without {name}: {reason}" for name, reason in reasons.items() if reason is not None)

"""Metadata of every benchmark row: device, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def row_metadata(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Return device, versions, commit and load of this measurement, ready for JSON.

    `commit` is None outside a git checkout and before its first commit, unless DRIFT_KERNELS_COMMIT names the commit
    that the files were copied from; `dirty` tells whether tracked or new files differ from it. `load` is the machine's
    one-minute load average at the time of the call.
    """
    commit = _git("rev-parse", "--verify", "HEAD")
    dirty = commit is None or bool(_git("status", "--porcelain"))
    return {
        "device": device_name(torch.device(device)),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit or os.environ.get("DRIFT_KERNELS_COMMIT"),
        "dirty": dirty,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """The output of a git command in this checkout; None if there is no git, no checkout, or it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None

"""Compares the measurements of `make gpu` with the predictions for the kernels that a step launches."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...captions import Row
from ...step.modes import label_of
from .entries import Sheet, by_kernel
from .kinds import launched
from .machines import MACHINES, Machine


def machine_of(device: str) -> Machine | None:
    """The machine with the driver's name "NVIDIA H100 80GB HBM3"; not "NVIDIA H100 PCIe", whose memory is slower."""
    words = re.findall(r"\w+", device)
    return next((machine for machine in MACHINES if machine.name in words and "PCIe" not in words), None)


def compare(sheet: Sheet, folder: Path) -> list[dict[str, Any]]:
    """For each step of ours in the folder's gpu.json that has a copy to compare with: its share of the copy's
    bandwidth, and the prediction.

    Raises ValueError if the folder has no such step.
    """
    rows = json.loads((folder / "gpu.json").read_text())["rows"]
    found = list(_compared(sheet, rows))
    if not found:
        devices = ", ".join(sorted({row["device"] for row in rows})) or "no device"
        raise ValueError(f"{folder / 'gpu.json'} has no step of ours with a prediction ({devices})")
    return found


def _compared(sheet: Sheet, rows: list[Row]) -> Iterator[dict[str, Any]]:
    entries = by_kernel(sheet)
    for row in rows:
        machine, names = machine_of(row["device"]), launched(row)
        if machine is None or names is None or row["percent_of_copy"] is None:
            continue
        kernels = [entries.get((machine.arch, name)) for name in names]
        made = [kernel for kernel in kernels if kernel is not None]
        if len(made) < len(names):
            continue
        predicted = {}
        for ns in made[0]["machines"][machine.name]["share"]:
            # In units of the copy's time per byte. Bytes that a step reads beyond what it must count only here.
            time = sum(one["bytes_per_element"] / one["machines"][machine.name]["share"][ns] for one in made)
            predicted[ns] = round(100 * row["bytes_per_param"] / time, 1)
        yield {
            "run": row.get("run"),
            "machine": machine.name,
            "backend": row["contender"],
            "mode": label_of(row),
            "scaling": row["scaling"],
            "clip": row["clip"],
            "kernels": names,
            "predicted_percent": predicted,
            "measured_percent": round(row["percent_of_copy"], 1),
        }

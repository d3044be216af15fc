"""The sheet: an entry per kernel and architecture, made from a compiled extension and stored as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...rows import row_metadata
from .. import disassembly
from . import machines
from .kinds import of_triton, traffic
from .machines import MACHINES
from .model import Kernel, predict
from .opcodes import parse
from .paths import wide_path

Entry = dict[str, Any]
Sheet = dict[str, Any]

WHAT = "predicted from machine code, without a GPU"


def kernels(extension: Path, arch: str) -> list[Kernel]:
    """The kernels that stream tensors, by name."""
    options = ("-arch", arch)
    listings = disassembly.listings(extension, *options)
    usages, threads = disassembly.usages(extension, *options), disassembly.threads(extension, *options)
    names = dict(zip(disassembly.demangled(list(listings)), listings, strict=True))
    found = [
        _kernel(name, arch, listings[mangled], usages[mangled], threads[mangled])
        for name, mangled in sorted(names.items())
        if traffic(name) is not None
    ]
    return [kernel for kernel in found if kernel is not None]


def triton_kernels(folder: Path, arch: str) -> list[Kernel]:
    """The same for a folder of cubins written by tests/sass.py."""
    found = []
    for path in sorted(folder.glob(f"*.{arch}.cubin")):
        name = of_triton(path.name.removesuffix(f".{arch}.cubin"))
        if name is not None:
            (listing,) = disassembly.listings(path).values()
            (usage,) = disassembly.usages(path).values()
            (threads,) = disassembly.threads(path).values()
            found.append(_kernel(name, arch, listing, usage, threads))
    return [kernel for kernel in found if kernel is not None]


def _kernel(name: str, arch: str, listing: str, usage: dict[str, int], threads: int) -> Kernel | None:
    moved, path = traffic(name), wide_path(parse(listing))
    if moved is None or path is None:
        return None
    return Kernel(name, arch, moved, path, usage["REG"], usage["SHARED"], threads)


def make(extension: Path, archs: list[str], cubins: Path | None = None) -> Sheet:
    """Make the sheet. `cubins`: a folder with Triton's kernels."""
    found = [kernel for arch in archs for kernel in kernels(extension, arch)]
    if cubins is not None:
        found += [kernel for arch in archs for kernel in triton_kernels(cubins, arch)]
    metadata = row_metadata()
    return {
        "what": WHAT,
        **{key: metadata[key] for key in ("commit", "dirty", "date")},
        "triton": metadata["triton"] if cubins is not None else None,
        "compiler": disassembly.compiler(extension, archs[0]),
        "constants": machines.constants(),
        "kernels": [entry(kernel) for kernel in found],
    }


def entry(kernel: Kernel) -> Entry:
    """Predict a kernel's speed on every machine of its architecture.

    `share` is by latency, in ns; `ceilings`, `bound` and `us_per_million` (microseconds per million elements) are for
    the longest latency.
    """
    per_machine = {}
    for machine in MACHINES:
        if machine.arch == kernel.arch:
            by_latency = {str(ns): predict(kernel, machine, ns) for ns in machines.LATENCIES}
            slowest = by_latency[str(machines.LATENCIES[-1])]
            ceilings = sorted(slowest.ceilings.items(), key=lambda one: one[1])
            per_machine[machine.name] = {
                "share": {ns: round(prediction.share, 3) for ns, prediction in by_latency.items()},
                "bound": slowest.bound,
                "ceilings": {part: round(share, 3) for part, share in ceilings},
                "us_per_million": round(kernel.traffic.all / (machine.of_a_copy * slowest.share), 2),
                "kb_in_flight": round(slowest.in_flight / 1024, 1),
            }
    elements = kernel.elements
    return {
        "kernel": kernel.name,
        "arch": kernel.arch,
        "bytes_per_element": round(kernel.traffic.all, 3),
        "instructions_per_element": round(len(kernel.path.steps) / elements, 2),
        "pipes": {pipe: round(count / elements, 2) for pipe, count in kernel.path.pipes().most_common()},
        "elements_per_turn": elements,
        "registers": kernel.registers,
        "shared_bytes": kernel.shared,
        "threads": kernel.threads,
        "blocks": kernel.blocks,
        "remarks": kernel.remarks(),
        "machines": per_machine,
    }


def write(sheet: Sheet, path: Path) -> None:
    """Write one entry per line."""
    entries = ",\n".join(f"  {json.dumps(one)}" for one in sheet["kernels"])
    rest = json.dumps({**sheet, "kernels": []}, indent=1)
    path.write_text(rest.replace('"kernels": []', f'"kernels": [\n{entries}\n ]') + "\n")


def read(path: Path) -> Sheet:
    return json.loads(path.read_text())


def by_kernel(sheet: Sheet) -> dict[tuple[str, str], Entry]:
    """The entries by architecture and kernel."""
    return {(one["arch"], one["kernel"]): one for one in sheet["kernels"]}

"""Reads compiled kernels with cuobjdump: their machine code, registers, memory, threads.

python benchmarks/gpu/disassembly.py EXTENSION ARCH      prints JSON: one object per kernel
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

# An instruction of a listing: address, predicate, opcode.
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def cuobjdump() -> str | None:
    """The path of cuobjdump: from PATH, or the one in Triton's package; None if there is none."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    inside = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    return str(inside) if inside.exists() else None


def built() -> Path | None:
    """The extension of the cuda backend."""
    spec = importlib.util.find_spec("drift_kernels._cuda")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def missing() -> str | None:
    """Why machine code cannot be read; None if it can."""
    if cuobjdump() is None or shutil.which("c++filt") is None:
        return "there is no cuobjdump or no c++filt"
    return None


def run(*arguments: object) -> str:
    command = [str(cuobjdump()), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def architectures(path: Path) -> list[str]:
    """The architectures for which an extension has machine code: ["sm_90", ...]."""
    return sorted(set(re.findall(r"\.(sm_\w+)\.cubin", run("-lelf", path))))


def by_kernel(text: str, heading: str) -> dict[str, str]:
    """Split the text at headings that name kernels; return the text under each, by kernel."""
    parts = re.split(heading, text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def listings(path: Path, *options: str) -> dict[str, str]:
    """The machine code of each kernel in a cubin or an extension."""
    return by_kernel(run("-sass", *options, path), r"^\s+Function : (\S+)$")


def usages(path: Path, *options: str) -> dict[str, dict[str, int]]:
    """The resources of each kernel: {"REG": 80, "STACK": 0, "LOCAL": 0, "SHARED": 0}."""
    found = re.findall(r"Function (\S+):\n(.*)", run("-res-usage", *options, path))
    return {
        name: {key: int(count) for key, count in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)}
        for name, line in found
    }


def threads(path: Path, *options: str) -> dict[str, int]:
    """The threads per block of each kernel that has launch bounds."""
    sections = by_kernel(run("-elf", *options, path), r"^\.nv\.info\.(\S+)$")
    bounds = r"EIATTR_(?:MAX_THREADS|REQNTID)\n\s*Format:.*\n\s*Value:\s*0x([0-9a-f]+)\s+0x([0-9a-f]+)\s+0x([0-9a-f]+)"
    found = {name: re.search(bounds, section) for name, section in sections.items()}
    return {
        name: int(sizes[1], 16) * int(sizes[2], 16) * int(sizes[3], 16)
        for name, sizes in found.items()
        if sizes is not None
    }


def compiler(path: Path, arch: str) -> str | None:
    """The compiler of the machine code: "Cuda compilation tools, release 13.0, V13.0.88"."""
    found = re.search(r"Tool Name:\s*ptxas\s*Tool Version:\s*(.*)", run("-elf", "-arch", arch, path))
    return None if found is None else found[1].strip()


def kernels(path: Path, *options: str) -> dict[str, dict[str, Any]]:
    """For each kernel in a cubin or an extension: the count of each opcode ("sass"), and its resources."""
    usage = usages(path, *options)
    return {
        name: {"sass": Counter(INSTRUCTION.findall(body)), "usage": usage[name]}
        for name, body in listings(path, *options).items()
    }


def demangled(names: list[str]) -> list[str]:
    """Demangle the names of kernels: "update<bfloat16, bfloat16, float, Nothing>"."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"^void |drift::|\(anonymous namespace\)::|\(.*\)$", "", name) for name in done.stdout.splitlines()]


if __name__ == "__main__":
    json.dump(kernels(Path(sys.argv[1]), "-arch", sys.argv[2]), sys.stdout)

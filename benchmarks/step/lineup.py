"""The contenders that were requested and can run here, and the memory that they need together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from drift_kernels.kernels import backends, scalings

from . import libraries, peers
from .contender import BACKENDS, Contender, copy_bytes, drift, is_ours
from .measure import flush_bytes
from .modes import Mode, Storage, coded_bytes
from .problem import Problem
from .shapes import NamedShape, covered, numel

SCALINGS = ("none", *scalings.SCALINGS)

# These run only on request: the reference is slow, and so is a C++ compiler with hundreds of tensors.
ASKED_FOR = {"cpu": ("reference", "compiled"), "cuda": ("reference",)}


@dataclass(frozen=True)
class Entry:
    """A contender to be made.

    Attributes:
        storage: of its states and its delta.
        make: makes the contender, with its parameters and states.
        mode: the mode, for ours.
    """

    name: str
    scaling: str | None
    clip: bool
    storage: Storage = field(repr=False)
    make: Callable[[Problem], Contender] = field(repr=False)
    mode: Mode | None = None

    @property
    def overwrites(self) -> bool:
        """Whether it steps on the scratch gradients."""
        return self.name == "foreach_bias" or (self.clip and self.name != "compiled" and not is_ours(self.name))


def chosen_backends(wanted: list[str] | None, device: torch.device) -> list[str]:
    """Return our backends among `wanted`; by default those that the device can run, except the slow reference.

    A requested backend that cannot run raises BackendUnavailableError later, with the reason.
    """
    known = BACKENDS[device.type]
    if wanted is not None:
        return [name for name in known if name in wanted]
    usual = [name for name in known if name not in ASKED_FOR[device.type]]
    return [name for name in usual if _said(f"backend {name!r}", backends.load(name).unavailable(device))]


def chosen_libraries(wanted: list[str] | None, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the libraries among `wanted` that can step on the device; by default all of them, on a GPU."""
    if wanted is None and device.type != "cuda":
        return []
    names = [name for name in libraries.LIBRARIES if wanted is None or name in wanted]
    return [
        name for name in names if _said(libraries.LIBRARIES[name].label, libraries.unavailable(name, device, dtype))
    ]


def _said(what: str, reason: str | None) -> bool:
    """Print the reason to leave something out, if there is one; return whether there is none."""
    if reason is not None:
        print(f"Left out: {what}: {reason}", file=sys.stderr)
    return reason is None


def entries(
    wanted: list[str] | None,
    our_backends: list[str],
    our_libraries: list[str],
    scalings: list[str],
    clips: list[bool],
    dtype: torch.dtype,
    modes: list[Mode],
    device: torch.device,
) -> list[Entry]:
    """Return the entries by scaling, rivals first. torch's fused AdamW is always included: it is the baseline."""

    def asked(name: str) -> bool:
        return name not in ASKED_FOR[device.type] if wanted is None else name in wanted

    as_torch = Storage.plain(2 * dtype.itemsize, dtype.itemsize)
    found = []
    for clip in clips:
        for name, make in peers.WITHOUT_PRIOR.items():
            if name == "fused" or asked(name):
                found.append(Entry(name, None, clip, as_torch, partial(make, clip=clip)))
        for name in our_libraries:
            storage = Storage.plain(libraries.LIBRARIES[name].state_bytes(dtype), 0)
            found.append(Entry(name, None, clip, storage, partial(libraries.make, name, clip=clip)))
    for scaling in sorted(set(scalings), key=SCALINGS.index):
        prior = None if scaling == "none" else scaling
        distinct = (
            modes
            if prior is not None
            else list(dict.fromkeys(replace(mode, prior=None, prior_on_host=False) for mode in modes))
        )
        for clip in clips:
            for name, make_biased in peers.WITH_PRIOR.items():
                if scaling in peers.SCALINGS[name] and asked(name):
                    biased = partial(make_biased, scaling=scaling, clip=clip)
                    found.append(Entry(name, prior, clip, as_torch, biased))
            for name in our_backends:
                for mode in distinct:
                    ours = partial(drift, backend=name, scaling=prior, mode=mode, clip=clip)
                    found.append(Entry(name, prior, clip, mode.storage(dtype), ours, mode))
    return sorted(found, key=lambda entry: (SCALINGS.index(entry.scaling or "none"), entry.clip))


def kept_bytes(
    shapes: list[NamedShape], modules: list[str], dtype: torch.dtype, lineup: list[Entry], with_copy: bool
) -> int:
    """The bytes that all of them keep on the device between steps, computed from the dtypes."""
    sizes = [numel([named]) for named in shapes]
    biased_sizes = [numel([(name, shape)]) for name, shape in shapes if covered(name, modules)]
    elements, biased = sum(sizes), sum(biased_sizes)
    total = dtype.itemsize * (2 * elements + biased)
    total += dtype.itemsize * elements if any(entry.overwrites for entry in lineup) else 0
    total += copy_bytes(elements, dtype) if with_copy else 0
    priors = {entry.mode.prior for entry in lineup if entry.mode is not None and entry.scaling is not None}
    total += sum(map(coded_bytes, biased_sizes)) * len(priors - {None})
    if dtype == torch.float16 and None in priors:
        total += 4 * biased  # a prior is never float16
    for entry in lineup:
        total += dtype.itemsize * elements + sum(map(entry.storage.states, sizes))
        if entry.name == "hook":  # the gradients that it returns
            total += dtype.itemsize * biased
    return total


def passing_bytes(shapes: list[NamedShape], dtype: torch.dtype, lineup: list[Entry], device: torch.device) -> int:
    """Roughly the most memory that one of their steps allocates temporarily, plus the buffer that flushes the cache."""
    elements = numel(shapes)
    largest = max(numel([named]) for named in shapes)
    needs = {
        "foreach": dtype.itemsize * elements,  # the root of exp_avg_sq
        "compiled": 4 * elements,  # the biased gradients, if norms come first
        "hook": 4 * dtype.itemsize * largest,
        "reference": 16 * 4 * largest if any(map(_stochastic, lineup)) else 8 * 4 * largest,
    }
    binding = 8 * largest if any(entry.scaling and is_ours(entry.name) for entry in lineup) else 0  # norms in float64
    return max(binding, *(needs.get(entry.name, 0) for entry in lineup)) + flush_bytes(device)


def _stochastic(entry: Entry) -> bool:
    return entry.mode is not None and entry.mode.rounding == "stochastic"


def needed_bytes(
    shapes: list[NamedShape],
    modules: list[str],
    dtype: torch.dtype,
    lineup: list[Entry],
    with_copy: bool,
    device: torch.device,
) -> int:
    """The device memory that a run takes, in bytes."""
    return kept_bytes(shapes, modules, dtype, lineup, with_copy) + passing_bytes(shapes, dtype, lineup, device)


def free_bytes(device: torch.device) -> int | None:
    """The free bytes of the device (for the CPU, of the machine); None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key == "MemAvailable":
                return 1024 * int(value.split()[0])
    return None

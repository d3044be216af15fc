"""The simulated device of a test run: built once, while other tests run."""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch

from . import build
from .device import Device, backend_of

# The architecture for which all kernels are built; without it, a few are built for sm_90.
EVERY = os.environ.get("DRIFT_KERNELS_SIMULATE")
MISSING = "there is a GPU" if torch.cuda.is_available() else build.missing()


@cache
def begin() -> build.Build | None:
    return None if MISSING else build.Build(EVERY or "90", "every" if EVERY else "few")


@cache
def simulated() -> tuple[Device, ModuleType]:
    begun = begin()
    assert begun is not None
    return backend_of(begun)


def fresh_device() -> Device:
    """The device with its default options."""
    device = simulated()[0]
    device.options()
    device.driver(13000)
    return device

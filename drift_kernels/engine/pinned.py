"""Pinned host memory that kernels read, and that must not be used for anything else before they have.

torch's allocator of such memory knows of its own copies alone. A tensor that is freed while a kernel still reads it
would be the next one's memory at once.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_kept: list[torch.UntypedStorage] = []  # what was freed during a capture, in which nothing can be said to the allocator


class Readers:
    """The streams on which kernels have read some pinned tensors. When one of these goes, the allocator is told of the
    streams, and waits for what they were doing before it gives the memory away."""

    def __init__(self) -> None:
        self.streams: set[torch.cuda.Stream] = set()

    def guard(self, tensor: Tensor) -> None:
        """From now on, for as long as the tensor lives: it is one of those that are read."""
        weakref.finalize(tensor, _free, tensor.untyped_storage(), self.streams).atexit = False

    def add(self, device: torch.device) -> None:
        """What is launched now on a device reads them."""
        self.streams.add(torch.cuda.current_stream(device))


def _free(storage: torch.UntypedStorage, streams: set[torch.cuda.Stream]) -> None:
    if streams and torch.cuda.is_current_stream_capturing():
        _kept.append(storage)
        return
    for stream in streams:
        _record(storage, stream)


def _record(storage: torch.UntypedStorage, stream: torch.cuda.Stream) -> None:
    """As a copy does: torch has no other way to say that a stream uses pinned memory."""
    if storage.nbytes():
        with torch.cuda.stream(stream):
            byte = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, 0, (1,), (1,))
            byte.to(stream.device, non_blocking=True)

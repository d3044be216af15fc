"""Pinned host memory that kernels read, protected from reuse until they have finished.

torch's allocator of pinned memory tracks only copies made by torch. If a tensor were freed while a kernel still reads
it, the allocator could reuse its memory at once.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_kept: list[torch.UntypedStorage] = []  # freed during a capture, when the allocator cannot be notified


class Readers:
    """The streams on which kernels have read a set of pinned tensors. When one of the tensors is freed, the allocator
    is notified of the streams, and waits for them before it reuses the memory."""

    def __init__(self) -> None:
        self.streams: set[torch.cuda.Stream] = set()

    def guard(self, tensor: Tensor) -> None:
        """Add a tensor to the set, for as long as it lives."""
        weakref.finalize(tensor, _free, tensor.untyped_storage(), self.streams).atexit = False

    def add(self, device: torch.device) -> None:
        """Record that kernels on the device's current stream read the tensors."""
        self.streams.add(torch.cuda.current_stream(device))


def _free(storage: torch.UntypedStorage, streams: set[torch.cuda.Stream]) -> None:
    if streams and torch.cuda.is_current_stream_capturing():
        _kept.append(storage)
        return
    for stream in streams:
        _record(storage, stream)


def _record(storage: torch.UntypedStorage, stream: torch.cuda.Stream) -> None:
    """Record a use of pinned memory on a stream by a copy of one byte: torch has no other way."""
    if storage.nbytes():
        with torch.cuda.stream(stream):
            byte = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, 0, (1,), (1,))
            byte.to(stream.device, non_blocking=True)

"""Fingerprints of deltas in memory. The fingerprint of a folder is computed from its record (record.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from .deltas import Delta, tensors_of
from .files import byte_view

_SAMPLED_ABOVE = 1 << 20  # elements; a larger delta in memory is fingerprinted by a sample
_SAMPLE_BLOCKS, _SAMPLE_BLOCK = 16, 1 << 14


def fingerprint_of_deltas(deltas: Mapping[str, Delta]) -> str:
    digest = hashlib.sha256()
    for name in sorted(deltas):
        delta = deltas[name]
        digest.update(f"{name} {delta.dtype} {list(delta.shape)}\n".encode())
        for tensor in tensors_of(delta):
            flat = tensor.reshape(-1)
            if flat.numel() > _SAMPLED_ABOVE:
                last = flat.numel() - _SAMPLE_BLOCK
                starts = torch.linspace(0, last, _SAMPLE_BLOCKS, dtype=torch.float64, device="cpu").long()
                flat = torch.cat([flat[start : start + _SAMPLE_BLOCK] for start in starts.tolist()])
            digest.update(byte_view(flat.cpu().contiguous()))
    return digest.hexdigest()

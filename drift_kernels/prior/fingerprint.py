"""Fingerprints: what tells whether two priors are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import PriorFormatError
from .deltas import RECORD_NAME
from .files import byte_view
from .quantized import QuantizedDelta

_SAMPLED_ABOVE = 1 << 20  # elements; a larger delta in memory is fingerprinted by a sample
_SAMPLE_BLOCKS, _SAMPLE_BLOCK = 16, 1 << 14


def fingerprint_of_record(record: Mapping[str, Any]) -> str:
    """Names, shapes, dtype and the content hashes of the sources: what determines every byte of the deltas.

    The norms follow from these, and are left out because their last digits depend on the machine.
    """
    try:
        content = {
            "tensors": {name: row["shape"] for name, row in record["tensors"].items()},
            "dtype": record["dtype"],
            "sources": {role: source["sha256"] for role, source in record["sources"].items()},
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise PriorFormatError(f"{RECORD_NAME}: lacks or garbles {error}") from error
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint_of_deltas(deltas: Mapping[str, Tensor | QuantizedDelta]) -> str:
    """Names, dtypes, shapes and values; of large deltas a sample of these."""
    digest = hashlib.sha256()
    for name in sorted(deltas):
        delta = deltas[name]
        digest.update(f"{name} {delta.dtype} {list(delta.shape)}\n".encode())
        for tensor in (delta.codes, delta.scales) if isinstance(delta, QuantizedDelta) else (delta,):
            flat = tensor.reshape(-1)
            if flat.numel() > _SAMPLED_ABOVE:
                starts = torch.linspace(0, flat.numel() - _SAMPLE_BLOCK, _SAMPLE_BLOCKS, dtype=torch.float64).long()
                flat = torch.cat([flat[start : start + _SAMPLE_BLOCK] for start in starts.tolist()])
            digest.update(byte_view(flat.cpu().contiguous()))
    return digest.hexdigest()

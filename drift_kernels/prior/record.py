"""drift_prior.json, a prior's record: what is known about each delta without reading it, and where it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import PriorFormatError
from ..formats.blocks import DELTA_LIMITS
from .quantized import scales_name

RECORD_NAME = "drift_prior.json"
PRIOR_INDEX_NAME = "prior.safetensors.index.json"
FORMAT, VERSION = "drift_prior", 2  # version 1 knew float32 and bfloat16 alone, and no stored_cosine
UNFINISHED_MARK = ".unfinished-"  # in the name of a folder that a build is still writing

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, *DELTA_LIMITS)}

# Fields of a row that came later: readers of version 1 and 2 pass over them.
_CHECKSUM, _SCALES_CHECKSUM = "crc32", "scales_crc32"


@dataclass(frozen=True)
class DeltaInfo:
    """What a prior knows about one delta without reading it.

    `dtype` is that of the delta as stored: float32, bfloat16, that of its codes, int8 or float8_e4m3fn, or that of its
    factors, of which `rank` is the inner dimension (None for deltas that have none). `delta_norm`
    is the norm of the delta as stored, `param_norm` the norm of the base's weight, and `cosine` the cosine of the
    expert's weight and the base's; `stored_cosine` is the cosine of the delta as stored and the exact one. None stands
    for a cosine with a vector of zeros. For deltas that were given in memory the last three are None, and
    `stored_cosine` also for deltas stored in float32 or bfloat16.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    delta_norm: float
    param_norm: float | None = None
    cosine: float | None = None
    stored_cosine: float | None = None
    rank: int | None = None


def read_infos(folder: Path, record: Mapping[str, Any]) -> dict[str, DeltaInfo]:
    """The deltas by name. Raises PriorFormatError for another format, a newer version, and fields that are missing."""
    path, version = folder / RECORD_NAME, record.get("version")
    if record.get("format") != FORMAT or not isinstance(version, int) or version < 1:
        found = f"format {record.get('format')!r}, version {version!r}"
        raise PriorFormatError(f"{path}: expected format {FORMAT!r}, version 1 to {VERSION}; found {found}")
    if version > VERSION:
        newer = f"version {version} is of a newer drift_kernels, and this one reads 1 to {VERSION}"
        raise PriorFormatError(f"{path}: {newer}: upgrade drift_kernels, or build the prior again")
    try:
        dtype = DTYPES[record["dtype"]]
        return {
            name: DeltaInfo(
                shape=tuple(row["shape"]),
                dtype=dtype,
                delta_norm=row["delta_norm"],
                param_norm=row["param_norm"],
                cosine=row["cosine"],
                stored_cosine=row.get("stored_cosine"),
            )
            for name, row in record["tensors"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise PriorFormatError(f"{path}: lacks or garbles {error}") from error


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


def checksum_fields(name: str, checksums: Mapping[str, int]) -> dict[str, str]:
    """For the row of a delta: the CRC-32 of its values' bytes or of its codes' and its scales', by stored name."""
    fields = {_CHECKSUM: name, _SCALES_CHECKSUM: scales_name(name)}
    return {field: f"{checksums[stored]:08x}" for field, stored in fields.items() if stored in checksums}


def recorded_checksums(record: Mapping[str, Any], name: str) -> list[str] | None:
    """What `checksum_fields` recorded, in its order; None for priors that were built before there were checksums."""
    row = record["tensors"][name]
    return [row[field] for field in (_CHECKSUM, _SCALES_CHECKSUM) if field in row] or None

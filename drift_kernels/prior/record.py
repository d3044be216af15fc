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
from .low_rank import factor_names
from .quantized import scales_name

RECORD_NAME = "drift_prior.json"
PRIOR_INDEX_NAME = "prior.safetensors.index.json"
# Version 1 knew float32 and bfloat16 alone, and no stored_cosine; version 3 is for priors with deltas of low rank.
FORMAT, VERSION = "drift_prior", 3
UNFINISHED_MARK = ".unfinished-"  # in the name of a folder that a build is still writing

_OF_LOW_RANK = "rank", "kept_energy", "exact_norm"

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, *DELTA_LIMITS)}

# CRC-32s in a row: of values or codes, of scales, of factors. Readers older than the first two pass over them.
_CHECKSUM, _SCALES_CHECKSUM, _FACTOR_CHECKSUMS = "crc32", "scales_crc32", ("left_crc32", "right_crc32")


@dataclass(frozen=True)
class DeltaInfo:
    """What a prior knows about one delta without reading it.

    `dtype` is that of the delta as stored: float32, bfloat16, that of its codes, int8 or float8_e4m3fn, or that of its
    factors, of which `rank` is the inner dimension (None for deltas that have none). `delta_norm`
    is the norm of the delta as stored, `param_norm` the norm of the base's weight, and `cosine` the cosine of the
    expert's weight and the base's; `stored_cosine` is the cosine of the delta as stored and the exact one. None stands
    for a cosine with a vector of zeros. For deltas that were given in memory the last three are None, and
    `stored_cosine` also for deltas stored in float32 or bfloat16.

    A low-rank delta that was built from checkpoints knows the norm of the exact delta, and `kept_energy`, which is
    1 - norm(exact - stored)^2/exact_norm^2, None for a delta of zeros.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    delta_norm: float
    param_norm: float | None = None
    cosine: float | None = None
    stored_cosine: float | None = None
    rank: int | None = None
    kept_energy: float | None = None
    exact_norm: float | None = None


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
                dtype=torch.bfloat16 if _has_rank(row) else dtype,
                delta_norm=row["delta_norm"],
                param_norm=row["param_norm"],
                cosine=row["cosine"],
                **{field: row.get(field) for field in ("stored_cosine", *_OF_LOW_RANK)},
            )
            for name, row in record["tensors"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise PriorFormatError(f"{path}: lacks or garbles {error}") from error


def _has_rank(row: Mapping[str, Any]) -> bool:
    if "rank" not in row:
        return False
    if not isinstance(row["rank"], int) or row["rank"] < 1 or len(row["shape"]) != 2:
        raise TypeError(f"rank {row['rank']!r} of a delta of shape {row['shape']}")
    return True


def version_of(rows: Mapping[str, Mapping[str, Any]]) -> int:
    """The oldest version that knows all that is in these rows of a record."""
    return VERSION if any("rank" in row for row in rows.values()) else 2


def fingerprint_of_record(record: Mapping[str, Any]) -> str:
    """Names, shapes, dtype and the content hashes of the sources: what determines every byte of the deltas.

    The norms follow from these, and are left out because their last digits depend on the machine; so do those of
    factors of low rank.
    """
    try:
        content: dict[str, Any] = {
            "tensors": {name: row["shape"] for name, row in record["tensors"].items()},
            "dtype": record["dtype"],
            "sources": {role: source["sha256"] for role, source in record["sources"].items()},
        }
        if ranks := {name: row["rank"] for name, row in record["tensors"].items() if "rank" in row}:
            content["ranks"] = ranks
    except (KeyError, TypeError, AttributeError) as error:
        raise PriorFormatError(f"{RECORD_NAME}: lacks or garbles {error}") from error
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checksum_fields(name: str, checksums: Mapping[str, int]) -> dict[str, str]:
    """For the row of a delta: the CRC-32 of its values' bytes, of its codes' and its scales', or of its factors', by
    stored name."""
    fields = {_CHECKSUM: name, _SCALES_CHECKSUM: scales_name(name)}
    fields |= dict(zip(_FACTOR_CHECKSUMS, factor_names(name), strict=True))
    return {field: f"{checksums[stored]:08x}" for field, stored in fields.items() if stored in checksums}


def recorded_checksums(record: Mapping[str, Any], name: str) -> list[str] | None:
    """What `checksum_fields` recorded, in its order; None for priors that were built before there were checksums."""
    row = record["tensors"][name]
    return [row[field] for field in (_CHECKSUM, _SCALES_CHECKSUM, *_FACTOR_CHECKSUMS) if field in row] or None

"""drift_prior.json, the record of a prior: metadata of each delta, and where the prior came from."""

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
# Version 1 has only float32 and bfloat16 and no stored_cosine; version 3 is for priors with low-rank deltas.
FORMAT, VERSION = "drift_prior", 3
UNFINISHED_MARK = ".unfinished-"  # in the name of a folder that a build is still writing

_OF_LOW_RANK = "rank", "kept_energy", "exact_norm"

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, *DELTA_LIMITS)}

# The CRC-32 fields of a row: of values or codes, of scales, of factors. Readers from before these fields ignore them.
_CHECKSUM, _SCALES_CHECKSUM, _FACTOR_CHECKSUMS = "crc32", "scales_crc32", ("left_crc32", "right_crc32")


@dataclass(frozen=True)
class DeltaInfo:
    """The metadata of one delta, known without reading it.

    Attributes:
        shape: shape of the delta.
        dtype: dtype as stored: float32 or bfloat16; for codes int8 or float8_e4m3fn; or the dtype of the factors.
        delta_norm: norm of the stored delta.
        param_norm: norm of the base's weight; None for deltas given in memory.
        cosine: cosine between the weights of expert and base; None for deltas given in memory.
        stored_cosine: cosine between the stored delta and the exact one; None for deltas given in memory, or stored in
            float32 or bfloat16.
        rank: inner dimension of the factors; None for deltas without factors.
        kept_energy: 1 - norm(exact - stored)^2/exact_norm^2, for low-rank deltas built from checkpoints; None for a
            delta of zeros.
        exact_norm: norm of the exact delta, for low-rank deltas built from checkpoints.

    A cosine with a zero vector is None.
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
    """Read the deltas by name. Raises PriorFormatError for another format, a newer version, or missing fields."""
    path, version = folder / RECORD_NAME, record.get("version")
    if record.get("format") != FORMAT or not isinstance(version, int) or version < 1:
        found = f"format {record.get('format')!r}, version {version!r}"
        raise PriorFormatError(f"{path}: expected format {FORMAT!r}, version 1 to {VERSION}; found {found}")
    if version > VERSION:
        newer = f"version {version} was written by a newer drift_kernels, but this one supports versions 1 to {VERSION}"
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
        raise PriorFormatError(f"{path}: missing or invalid: {error}") from error


def _has_rank(row: Mapping[str, Any]) -> bool:
    if "rank" not in row:
        return False
    if not isinstance(row["rank"], int) or row["rank"] < 1 or len(row["shape"]) != 2:
        raise TypeError(f"rank {row['rank']!r} for a delta of shape {row['shape']}")
    return True


def version_of(rows: Mapping[str, Mapping[str, Any]]) -> int:
    """The oldest version of the format that supports these rows of a record."""
    return VERSION if any("rank" in row for row in rows.values()) else 2


def fingerprint_of_record(record: Mapping[str, Any]) -> str:
    """The hash of names, shapes, dtype and the content hashes of the sources, which determine every byte of the deltas.

    Norms follow from these. They are left out because their last digits depend on the machine, as do those of low-rank
    factors.
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
        raise PriorFormatError(f"{RECORD_NAME}: missing or invalid: {error}") from error
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checksum_fields(name: str, checksums: Mapping[str, int]) -> dict[str, str]:
    """The checksum fields for the row of a delta: the CRC-32 of its values, of its codes and scales, or of its factors,
    given `checksums` by stored name."""
    fields = {_CHECKSUM: name, _SCALES_CHECKSUM: scales_name(name)}
    fields |= dict(zip(_FACTOR_CHECKSUMS, factor_names(name), strict=True))
    return {field: f"{checksums[stored]:08x}" for field, stored in fields.items() if stored in checksums}


def recorded_checksums(record: Mapping[str, Any], name: str) -> list[str] | None:
    """The checksums recorded by `checksum_fields`, in its order; None for priors from before there were checksums."""
    row = record["tensors"][name]
    return [row[field] for field in (_CHECKSUM, _SCALES_CHECKSUM, *_FACTOR_CHECKSUMS) if field in row] or None

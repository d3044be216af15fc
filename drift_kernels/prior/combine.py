"""Combining priors: several are read side by side, row by row, and one is written."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PriorError
from ..formats.blocks import DELTA_LIMITS
from .arithmetic import dot
from .folders import NewFolder
from .forms import Form, Shapes
from .fusion import find_sources
from .hub import public_name
from .merging import Recipe, smallest_kept
from .names import natural_key, some
from .norms import norm
from .plausible import all_zero, check_values
from .prior import Prior, PriorLike
from .quantized import quantize, scales_name
from .record import DTYPES, FORMAT, RECORD_NAME, DeltaInfo, checksum_fields, version_of
from .runs import Rows, read_rows, rows_of
from .shards import Progress, check_names, write_deltas
from .threads import in_order, one_thread
from .writing import write_json

logger = logging.getLogger("drift_kernels")

_SAME_NORM = 1e-6  # relative difference of one weight's norm between machines


def combine_priors(
    priors: Sequence[PriorLike],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float],
    method: str = "linear",
    density: float | Sequence[float] | None = None,
    normalize: bool | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    max_shard_bytes: int = 1 << 30,
    progress: Progress | None = None,
) -> Prior:
    """Combine several priors into one, and write it to the folder `out`.

    The combination is computed in float32, in constant memory. A delta that only some priors have is zero in the
    others, which is recorded as a warning. The folder appears under its name when it is complete.

    Example::

        combine_priors(["prior-math", "prior-code"], "prior-both", weights=[1.0, 0.5], method="ties", density=0.2)

    Args:
        priors: folders, Hub ids, open priors or mappings, in any form of storage.
        out: the folder to write.
        weights: one number per prior.
        method: "linear", "ties" (arXiv 2306.01708), "dare" (arXiv 2311.03099) or "dare_ties" (`docs/priors.md`).
        density: for all methods but "linear": the share of each delta's elements that is kept, one number or one per
            prior.
        normalize: divide by the sum of the weights; None: only for "ties".
        seed: decides which elements "dare" drops.
        dtype: how deltas are stored, as in `build_prior`.
        overwrite: replace a prior that is in `out`.
        max_shard_bytes: size of the files.
        progress: called with the number of elements done so far and in total.

    Returns:
        The opened prior.

    Raises:
        TypeError: `priors` is not a list.
        ValueError: a number is out of range.
        PriorError: deltas differ in shape or form, the result is zero everywhere or not finite, or something else is in
            `out`.
        PriorFormatError: a prior is damaged.
        OSError: `out` cannot be written.
    """
    if isinstance(priors, (str, os.PathLike, Mapping, Prior)):
        raise TypeError("priors must be a list of priors")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype}")
    recipe = Recipe.of(len(priors), method, weights, density, normalize, seed)
    new = NewFolder(Path(out).expanduser().resolve(), RECORD_NAME, "prior", overwrite)
    new.check()
    opened = [Prior.of(prior) for prior in priors]
    names = [public_name(p) if isinstance(p, (str, os.PathLike)) else "an open prior" for p in priors]
    shapes, selections = _shapes(opened), _selections(opened)
    form = Form(dtype)
    check_names(shapes, form)
    _check_forms(opened)
    base = _Base.of(opened, shapes)
    warnings = _warnings(opened, shapes.keys()) + base.warnings
    for warning in warnings:
        logger.warning("%s", warning)
    with new.that_appears_complete() as folder:
        stream = _Combination(opened, recipe, dtype, shapes)
        with one_thread():
            checksums = write_deltas(folder, shapes, form, max_shard_bytes, stream.pieces, progress)
        infos = {name: stream.info(name, base.norms.get(name)) for name in shapes}
        if all_zero(infos):
            raise PriorError("the priors cancel out: all deltas of their combination are zero")
        found = check_values(infos)
        for warning in found:
            logger.warning("%s", warning)
        rows = {
            name: {
                "shape": list(info.shape),
                "delta_norm": info.delta_norm,
                "param_norm": info.param_norm,
                "cosine": info.cosine,
                "stored_cosine": info.stored_cosine,
                **checksum_fields(name, checksums),
            }
            for name, info in infos.items()
        }
        record = {
            "format": FORMAT,
            "version": version_of(rows),
            "delta": _formula(recipe),
            "dtype": str(dtype).removeprefix("torch."),
            **selections,
            "warnings": _warnings_of_their_own(opened) + warnings + found,
            "combined": asdict(recipe),
            "sources": _sources(opened, names, recipe) | base.source,
            "tensors": rows,
        }
        write_json(folder / RECORD_NAME, record)
    return Prior.open(new.target)


@dataclass(frozen=True)
class _Piece:
    name: str
    rows: Rows
    bounds: Sequence[float]


@dataclass(frozen=True)
class _Result:
    stored: dict[str, Tensor]
    squares: tuple[float, ...]  # <stored, stored>, <stored, exact>, <exact, exact>


class _Combination:
    """Reads the priors' deltas, combines and measures them."""

    def __init__(self, priors: Sequence[Prior], recipe: Recipe, dtype: torch.dtype, shapes: Shapes) -> None:
        self._priors = priors
        self._names = [frozenset(prior.names) for prior in priors]
        self._recipe = recipe
        self._dtype = dtype
        self._shapes = shapes
        self._squares: dict[str, tuple[float, ...]] = dict.fromkeys(shapes, (0.0, 0.0, 0.0))

    def pieces(self, names: Sequence[str]) -> Generator[tuple[int, dict[str, Tensor]], None, None]:
        """What to append to which tensors of the prior's files. Raises PriorError if it is not finite."""
        with closing(in_order(self._combine, (piece for name in names for piece in self._cut(name)))) as results:
            for piece, result in results:
                if not all(map(math.isfinite, result.squares)):
                    raise PriorError(f"{piece.name} overflows, or contains NaN or Inf in a prior")
                squares = self._squares[piece.name]
                self._squares[piece.name] = tuple(a + b for a, b in zip(squares, result.squares, strict=True))
                yield piece.rows.count, result.stored

    def info(self, name: str, param_norm: float | None) -> DeltaInfo:
        """What is recorded of a combined delta: without an expert there is no cosine to the base."""
        stored, product, exact = self._squares[name]
        scale = math.sqrt(stored * exact)
        cosine = product / scale if scale and self._dtype in DELTA_LIMITS else None
        return DeltaInfo(self._shapes[name], self._dtype, math.sqrt(stored), param_norm, None, cosine)

    def _cut(self, name: str) -> Iterator[_Piece]:
        """The pieces of a delta. Raises PriorFormatError if it is damaged in one of the priors."""
        for prior, names in zip(self._priors, self._names, strict=True):
            if name in names:
                prior.check(name)
        rows = list(rows_of(self._shapes[name]))
        bounds = [self._bound(name, rows, position) for position in range(len(self._priors))]
        return (_Piece(name, part, bounds) for part in rows)

    def _bound(self, name: str, rows: Sequence[Rows], position: int) -> float:
        prior, density = self._priors[position], self._recipe.densities[position]
        if not rows or not self._recipe.trims or density == 1 or name not in self._names[position]:
            return 0.0
        return smallest_kept(lambda part: read_rows(prior, name, part), rows, math.prod(self._shapes[name]), density)

    def _combine(self, piece: _Piece) -> _Result:
        name = piece.name
        deltas = [
            read_rows(prior, name, piece.rows) if name in names else None
            for prior, names in zip(self._priors, self._names, strict=True)
        ]
        exact = self._recipe.combine(name, piece.rows, deltas, piece.bounds)
        if self._dtype not in DELTA_LIMITS:
            stored = exact.to(self._dtype)
            square = norm(stored) ** 2
            return _Result({name: stored}, (square, square, square))
        quantized = quantize(exact, self._dtype)
        expanded = quantized.expand()
        squares = dot(expanded, expanded), dot(expanded, exact), dot(exact, exact)
        return _Result({name: quantized.codes, scales_name(name): quantized.scales}, squares)


@dataclass(frozen=True)
class _Base:
    """What the priors agree on about the base: the norms of its weights, and its name and digest."""

    norms: dict[str, float]
    source: dict[str, Any]
    warnings: list[str]

    @classmethod
    def of(cls, priors: Sequence[Prior], names: Iterable[str]) -> _Base:
        norms, differing, compared = {}, [], 0
        held = [(prior, frozenset(prior.names)) for prior in priors]
        for name in names:
            found = [prior.info(name).param_norm for prior, has in held if name in has]
            known = [each for each in found if each is not None]
            compared += len(known) > 1
            if any(not math.isclose(known[0], each, rel_tol=_SAME_NORM) for each in known[1:]):
                differing.append(name)
            elif len(known) == len(found):
                norms[name] = known[0]
        if differing:
            said = (
                f"the priors are of different bases: of {compared} weights of the base that they share, "
                f"{len(differing)} have other norms ({some(differing)})"
            )
            return cls({}, {}, [said])
        bases = [prior.record.get("sources", {}).get("base") for prior in priors]
        same = all(base is not None and base == bases[0] for base in bases)
        return cls(norms, {"base": bases[0]} if same else {}, [])


def _shapes(priors: Sequence[Prior]) -> dict[str, tuple[int, ...]]:
    """The shapes of the deltas of all priors, in natural order."""
    shapes: dict[str, tuple[int, ...]] = {}
    owner: dict[str, int] = {}
    for number, prior in enumerate(priors, 1):
        for name in prior.names:
            shape = prior.info(name).shape
            if shapes.setdefault(name, shape) != shape:
                raise PriorError(
                    f"the priors do not fit: {name} has shape {list(shapes[name])} in prior {owner[name]}, "
                    f"{list(shape)} in prior {number}"
                )
            owner.setdefault(name, number)
    return {name: shapes[name] for name in sorted(shapes, key=natural_key)}


def _check_forms(priors: Sequence[Prior]) -> None:
    """Raises PriorError if the same weights are one delta in one prior and several in another (fused or single
    experts).
    """
    for (i, one), (j, other) in permutations(enumerate(priors, 1), 2):
        here, there = frozenset(one.names), frozenset(other.names)
        alone = [(name, name, one.info(name).shape) for name in here - there]
        rest = {name: other.info(name).shape for name in there - here}
        if sources := find_sources(alone, rest):
            name, source = next(iter(sources.items()))
            raise PriorError(
                f"the priors do not fit: {name} in prior {i} and {source.parts[0].name} in prior {j} are deltas of the "
                "same weights in different forms; build both priors from checkpoints of the same form"
            )


def _warnings_of_their_own(priors: Sequence[Prior]) -> list[str]:
    told: dict[str, list[str]] = {}
    for number, prior in enumerate(priors, 1):
        for warning in prior.record.get("warnings", ()):
            told.setdefault(warning, []).append(f"prior {number}")
    return [f"{', '.join(numbers)}: {warning}" for warning, numbers in told.items()]


def _warnings(priors: Sequence[Prior], names: Set[str]) -> list[str]:
    """What is unusual about the priors together."""
    found = []
    for (i, one), (j, other) in combinations(enumerate(priors, 1), 2):
        if one.fingerprint == other.fingerprint:
            found.append(f"prior {i} and prior {j} are the same")
    for number, prior in enumerate(priors, 1):
        if lacking := sorted(names - set(prior.names), key=natural_key):
            found.append(
                f"{len(lacking)} of {len(names)} deltas are not in prior {number}, and count as zero: {some(lacking)}"
            )
    return found


def _formula(recipe: Recipe) -> str:
    terms = " + ".join(f"{weight:g} * prior {number}" for number, weight in enumerate(recipe.weights, 1))
    return f"{terms} ({recipe.method})"


def _selections(priors: Sequence[Prior]) -> dict[str, Any]:
    """What all priors together were built to hold, and the name rules that any of them needs."""
    records = [prior.record for prior in priors]
    rules: dict[str, str] = {}
    for record in records:
        for prefix, canonical in (record.get("name_map") or {}).items():
            if rules.setdefault(prefix, canonical) != canonical:
                raise PriorError(
                    f"the name maps of the priors disagree: {prefix} is mapped to {rules[prefix]!r} and {canonical!r}"
                )
    layers = [record.get("layers") for record in records]
    return {
        "modules": list(dict.fromkeys(module for record in records for module in record.get("modules", ()))),
        "layers": None if None in layers else sorted(set().union(*layers)),  # type: ignore[arg-type]
        "name_map": rules,
        "include_bias": any(record.get("include_bias", True) for record in records),
        "pulled_to_zero": sorted({name for record in records for name in record.get("pulled_to_zero", ())}),
    }


def _sources(priors: Sequence[Prior], names: Sequence[str], recipe: Recipe) -> dict[str, Any]:
    """The sources by role. Each digest covers everything that decides what a prior contributed, so the new fingerprint
    follows from it.
    """
    rest = {"method": recipe.method, "normalize": recipe.normalize, "seed": recipe.seed if recipe.drops else None}
    found = {}
    for number, (prior, name) in enumerate(zip(priors, names, strict=True), 1):
        used = {"fingerprint": prior.fingerprint, "weight": recipe.weights[number - 1]}
        used |= {"density": recipe.densities[number - 1], **rest}
        digest = hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()
        found[f"prior {number}"] = {"name": name, "fingerprint": prior.fingerprint, "sha256": digest}
    return found

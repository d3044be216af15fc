"""Prior: a set of deltas, found by canonical name, and what is known about each of them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, PriorError, PriorFormatError, PriorMismatchError
from .alignment import align_live
from .assembly import assemble, assembled_info
from .coverage import Coverage
from .deltas import Delta, expanded, norm_of
from .files import inspect_shards
from .fingerprint import fingerprint_of_deltas
from .fusion import Source
from .hub import local_folder
from .low_rank import LowRankDelta
from .names import canonical_name, natural_key
from .plausible import check_values
from .quantized import Box, QuantizedDelta
from .reading import exists, read_json
from .record import (
    PRIOR_INDEX_NAME,
    RECORD_NAME,
    UNFINISHED_MARK,
    DeltaInfo,
    fingerprint_of_record,
    read_infos,
    recorded_checksums,
)
from .stored import StoredDelta, find_delta, layout_of, norm_fault
from .verification import Verification

logger = logging.getLogger("drift_kernels")


class Prior:
    """A set of deltas. Made by `build_prior`, `Prior.open` or `Prior.from_mapping`, not by its constructor."""

    def __init__(
        self,
        infos: Mapping[str, DeltaInfo],
        deltas: Mapping[str, StoredDelta | Delta],
        fingerprint: str,
        record: Mapping[str, Any],
    ) -> None:
        self.names = tuple(sorted(infos, key=natural_key))
        self.fingerprint = fingerprint
        self.record = record  # the contents of drift_prior.json; empty for deltas in memory
        self._infos = infos
        self._deltas = deltas

    @classmethod
    def of(cls, prior: PriorLike) -> Prior:
        """A prior itself, the prior of a folder or a Hub id (`open`), or of a mapping (`from_mapping`); TypeError for
        anything else."""
        if isinstance(prior, Mapping):
            return cls.from_mapping(prior)
        if isinstance(prior, (str, os.PathLike)):
            return cls.open(prior)
        if not isinstance(prior, Prior):
            found = type(prior).__name__
            raise TypeError(f"prior must be a Prior, a path, or a mapping from names to deltas, got {found}")
        return prior

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Prior:
        """Open a prior's folder, or a Hub id; reads metadata only. What is opened is the folder as it is found now,
        whatever becomes of the working directory, or of a link to it.

        Raises PriorFormatError when it is not a prior, is incomplete, damaged or unreadable, or comes from a newer
        version.
        """
        try:
            folder = local_folder(path, (RECORD_NAME, PRIOR_INDEX_NAME), PRIOR_INDEX_NAME).resolve()
            if UNFINISHED_MARK in folder.name or not exists(folder / RECORD_NAME):
                raise PriorFormatError(f"{folder}: not a prior: it has no {RECORD_NAME}, or its build was not finished")
            record = read_json(folder / RECORD_NAME)
            stored = inspect_shards(folder, PRIOR_INDEX_NAME)
        except CheckpointError as error:
            raise PriorFormatError(str(error)) from error
        infos = read_infos(folder, record)
        deltas = {name: find_delta(folder, name, info, stored) for name, info in infos.items()}
        known = {part for name, i in infos.items() for part in layout_of(name, i.shape, i.dtype, i.rank)}
        for name in stored.keys() - known:
            raise PriorFormatError(f"{folder}: {RECORD_NAME} and {PRIOR_INDEX_NAME} disagree about {name}")
        return cls(infos, deltas, fingerprint_of_record(record), record)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Delta]) -> Prior:
        """A prior of deltas in memory, keyed by canonical or by live parameter names.

        float32, bfloat16, quantised and low-rank deltas are kept as they are and not copied, so they must not be
        written to; tensors of other floating dtypes become float32.
        Raises PriorError for an empty mapping, two keys of one canonical name, a delta that is not a floating tensor, a
        QuantizedDelta or a LowRankDelta, or not finite, and deltas that are all zero; if some are, a warning is logged.
        """
        keys: dict[str, str] = {}
        for key in mapping:
            name = canonical_name(key)
            if name in keys:
                raise PriorError(f"two deltas have the canonical name {name}: {keys[name]} and {key}")
            keys[name] = key
        if not keys:
            raise PriorError("a prior needs at least one delta, got an empty mapping")
        deltas = {name: _checked_delta(key, mapping[key]) for name, key in keys.items()}
        infos = {}
        for name, delta in deltas.items():
            rank = delta.rank if isinstance(delta, LowRankDelta) else None
            infos[name] = DeltaInfo(tuple(delta.shape), delta.dtype, norm_of(delta), rank=rank)
            if not math.isfinite(infos[name].delta_norm):
                raise PriorError(f"the delta of {keys[name]} contains NaN or Inf")
        for warning in check_values(infos):
            logger.warning("%s", warning)
        return cls(infos, deltas, fingerprint_of_deltas(deltas), {})

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Prior({len(self)} deltas, {self.numel:,} elements, fingerprint {self.fingerprint[:12]})"

    @property
    def numel(self) -> int:
        """Elements of all deltas together."""
        return sum(math.prod(info.shape) for info in self._infos.values())

    def info(self, name: str | Source) -> DeltaInfo:
        """What is known about the delta of a canonical name, or of one that is made of several (`coverage`). Raises
        KeyError when there is none."""
        if isinstance(name, Source):
            return assembled_info(name, self._infos, lambda part: norm_of(self.load_stored(part.name, box=part.of)))
        return self._infos[name]

    def load(self, name: str, device: torch.device | str | None = None, *, copy: bool = True) -> Tensor:
        """The delta of a canonical name: float32 or bfloat16 (a quantised or low-rank one expanded to float32),
        contiguous, in memory of its own.

        Without `copy`, a delta that was given in memory as a tensor, contiguous and on the device already, is returned
        itself.

        Raises KeyError for an unknown name, and PriorFormatError when the stored bytes cannot be read, do not have the
        recorded norm, or hold a scale that is negative or not finite.
        """
        return expanded(self.load_stored(name, device, copy=copy))

    def load_stored(
        self, name: str | Source, device: torch.device | str | None = None, *, copy: bool = True, box: Box | None = None
    ) -> Delta:
        """The delta of a canonical name as it is stored: as `load`, with quantised ones left in codes and scales, and
        low-rank ones in factors. Of a source, the delta of its parameter: float32 where its parts are quantised and
        their blocks do not fit together, or low-rank.

        With a box (a slice of each dimension), the part in it, of which no more is read than its rows; float32 where it
        cuts through blocks of codes. Its norm is not checked, since only that of the whole is recorded.
        """
        if isinstance(name, Source):
            if name.single is None:
                ndims = {part.name: len(self._infos[part.name].shape) for part in name.parts}
                return assemble(name, ndims, lambda part, of: self.load_stored(part, box=of, copy=False), box, device)
            name = name.single.name
        delta = self._deltas[name]
        if isinstance(delta, Tensor):
            part = delta if box is None else delta[box]
            return part.to(device or delta.device, copy=copy).contiguous()
        if isinstance(delta, (QuantizedDelta, LowRankDelta)):
            return (delta if box is None else delta.part(box)).to(device or delta.device, copy=copy)
        try:
            loaded = delta.read(box)
            if isinstance(loaded, QuantizedDelta):
                loaded.check_scales()
        except CheckpointError as error:
            raise PriorFormatError(f"{name} of the prior: {error}") from error
        except PriorError as error:
            raise PriorFormatError(f"{delta.path}: {name} is damaged: {error}") from error
        if box is None:
            self._check_norm(name, delta.path, norm_of(loaded))
        return loaded if device is None else loaded.to(device)

    def check_norm_of_parts(self, name: str | Source, found: float) -> None:
        """Raises PriorFormatError when the parts of a delta do not have the recorded norm together."""
        delta = self._deltas[name.parts[0].name if isinstance(name, Source) else name]
        if isinstance(delta, StoredDelta):
            self._check_norm(name, delta.path, found)

    def _check_norm(self, name: str | Source, path: Path, found: float) -> None:
        if fault := norm_fault(found, self.info(name).delta_norm):
            raise PriorFormatError(f"{path}: {name.name if isinstance(name, Source) else name} is {fault}")

    def verify(self, progress: Callable[[int, int], None] | None = None) -> Verification:
        """Read every byte of the prior, in flat memory, and compare it with what was recorded when it was built.

        A changed bit shows, wherever in the deltas it is; in priors that were built before there were checksums, only
        what changes a norm. Never raises for what it finds: ask `intact`. Deltas in memory have nothing to compare.
        `progress` is called with the elements done so far and the elements in all.
        """
        done, checked, faults = 0, {True: 0, False: 0}, {}
        for name, delta in self._deltas.items():
            if isinstance(delta, StoredDelta):
                checksums = recorded_checksums(self.record, name)
                checked[checksums is not None] += 1
                if fault := delta.fault(self._infos[name], checksums):
                    faults[name] = fault
            done += math.prod(self._infos[name].shape)
            if progress is not None:
                progress(done, self.numel)
        return Verification(by_checksum=checked[True], by_norm=checked[False], faults=faults)

    def _live(self, named_parameters: Iterable[tuple[str, Tensor]]) -> list[tuple[str, str, tuple[int, ...]]]:
        """Live name, canonical name and shape. Names that are not known are aligned by shape, which is logged."""
        rules = self.record.get("name_map") or {}
        live = [(name, canonical_name(name, rules), tuple(param.shape)) for name, param in named_parameters]
        found, note = align_live({name: shape for _, name, shape in live}, self._shapes())
        if note is not None:
            logger.info("%s", note)
            live = [(param, found.get(name, name), shape) for param, name, shape in live]
        return live

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self._infos.items()}

    def coverage(self, named_parameters: Iterable[tuple[str, Tensor]]) -> Coverage:
        """How live parameters and deltas match by canonical name and shape; values are not looked at.

        A parameter's delta is the one of its name; or, where the model holds in memory other tensors than its
        checkpoint (transformers 5 fuses experts), it is made of the deltas of what the parameter is made of.

        Raises PriorMismatchError when two parameters claim one delta.
        """
        return Coverage.of(self._live(named_parameters), self._shapes())

    def match(self, named_parameters: Iterable[tuple[str, Tensor]], strict: bool = False) -> Coverage:
        """The coverage, for use: a partial one is logged as a warning.

        Raises PriorMismatchError when nothing matches, when two parameters claim one delta and, if `strict`, when any
        delta finds no parameter of its shape. Parameters without a delta (a vision tower's) are never an error.
        """
        coverage = self.coverage(named_parameters)
        if not coverage.matched:
            raise PriorMismatchError(f"no parameter matches the prior: {coverage.summary()}")
        if strict and not coverage.complete:
            raise PriorMismatchError(f"the prior matches only partially: {coverage.summary()}")
        if not coverage.complete:
            logger.warning("%s", coverage.summary())
        return coverage


PriorLike = Prior | str | os.PathLike[str] | Mapping[str, Delta]


def _checked_delta(key: str, delta: Delta) -> Delta:
    if isinstance(delta, QuantizedDelta):
        try:
            delta.check_scales()
        except PriorError as error:
            raise PriorError(f"the delta of {key}: {error}") from error
        return delta
    if isinstance(delta, LowRankDelta):
        return LowRankDelta(delta.left.detach(), delta.right.detach())
    if not isinstance(delta, Tensor) or not delta.is_floating_point() or delta.layout != torch.strided:
        kind = f"{delta.dtype} {delta.layout}" if isinstance(delta, Tensor) else type(delta).__name__
        raise PriorError(f"the delta of {key} must be a dense floating-point tensor, got {kind}")
    delta = delta.detach()
    return delta if delta.dtype in (torch.float32, torch.bfloat16) else delta.float()

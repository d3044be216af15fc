"""Prior: a set of deltas, found by canonical name, and what is recorded about each of them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
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
from .record import PRIOR_INDEX_NAME, RECORD_NAME, UNFINISHED_MARK, DeltaInfo, fingerprint_of_record, read_infos
from .stored import StoredDelta, find_deltas, norm_fault
from .verification import Verification

logger = logging.getLogger("drift_kernels")


class Prior:
    """A set of deltas, expert - base, one for each parameter that it covers.

    `build_prior`, `Prior.open` and `Prior.from_mapping` make one; do not call the constructor. `len(prior)` is the
    number of deltas.

    Attributes:
        names: the canonical names of the deltas, in natural order.
        fingerprint: a SHA-256 that identifies the deltas, in hexadecimal.
        record: the contents of drift_prior.json; empty for deltas in memory.
    """

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
        self._intact: set[str] = set()  # deltas that `check` has read

    @classmethod
    def of(cls, prior: PriorLike) -> Prior:
        """Return the prior itself, or open a folder or Hub id (`Prior.open`), or wrap a mapping (`Prior.from_mapping`).

        Args:
            prior: a `Prior`, a path or Hub id, or a mapping from names to deltas.

        Raises:
            TypeError: `prior` is something else.
        """
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
        """Open a prior's folder or Hub id. Only metadata is read.

        The opened prior refers to the folder as it is now, even if the working directory or a link to it changes later.

        Args:
            path: the folder that `build_prior` wrote, or a Hub id: `org/name` or `org/name@revision`.

        Returns:
            The `Prior`.

        Raises:
            PriorFormatError: the folder is not a prior, is incomplete, damaged or unreadable, or of a newer version.
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
        deltas = find_deltas(folder, record, infos, stored)
        return cls(infos, deltas, fingerprint_of_record(record), record)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Delta]) -> Prior:
        """Return a prior of deltas in memory.

        float32, bfloat16, quantised and low-rank deltas are kept as they are and not copied, so do not write to them;
        other floating dtypes become float32. If some deltas are all zero, a warning is logged.

        Args:
            mapping: canonical or live parameter names to deltas.

        Raises:
            PriorError: the mapping is empty; two keys have the same canonical name; a delta is not a floating tensor, a
                `QuantizedDelta` or a `LowRankDelta`, or is not finite; all deltas are zero.
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
        """Number of elements of all deltas together."""
        return sum(math.prod(info.shape) for info in self._infos.values())

    def info(self, name: str | Source) -> DeltaInfo:
        """Return what is recorded about a delta: its shape, dtype, norms and cosines.

        Args:
            name: a canonical name, or a source of `coverage`, whose delta may be made of several.

        Raises:
            KeyError: there is no such delta.
        """
        if isinstance(name, Source):
            return assembled_info(name, self._infos, lambda part: norm_of(self.load_stored(part.name, box=part.of)))
        return self._infos[name]

    def load(self, name: str, device: torch.device | str | None = None, *, copy: bool = True) -> Tensor:
        """Load a delta as a tensor.

        Args:
            name: its canonical name.
            device: where to put it; None: where it is, or the CPU for a stored one.
            copy: False may return a delta itself that was given in memory as a tensor, contiguous and on the device
                already.

        Returns:
            float32 or bfloat16, contiguous; quantised and low-rank deltas are expanded to float32. Memory of its own,
            unless `copy` is False.

        Raises:
            KeyError: there is no such delta.
            PriorFormatError: the stored bytes cannot be read, do not have the recorded checksum or norm, or hold a
                scale that is negative or not finite.
        """
        return expanded(self.load_stored(name, device, copy=copy))

    def load_stored(
        self, name: str | Source, device: torch.device | str | None = None, *, copy: bool = True, box: Box | None = None
    ) -> Delta:
        """Load a delta as it is stored: like `load`, but quantised deltas stay codes and scales, and low-rank ones
        factors.

        Args:
            name: a canonical name, or a source of `coverage`. The delta of a source is float32 if its parts are
                low-rank, or quantised with blocks that do not fit together.
            device: as in `load`.
            copy: as in `load`.
            box: a slice of each dimension. Of the file only the rows of this part are read. It is float32 if it cuts
                through blocks of codes. Checksum and norm, which are those of the whole delta, are not checked.

        Returns:
            A tensor, a `QuantizedDelta` or a `LowRankDelta`.

        Raises:
            KeyError: there is no such delta.
            PriorFormatError: as in `load`.
        """
        if isinstance(name, Source):
            if name.single is None:
                for piece in name.parts if box is None else ():
                    if piece.of is not None:
                        self.check(piece.name)
                ndims = {part.name: len(self._infos[part.name].shape) for part in name.parts}
                return assemble(name, ndims, lambda part, of: self.load_stored(part, box=of, copy=False), box, device)
            name = name.single.name
        delta = self._deltas[name]
        if isinstance(delta, Tensor):
            part = delta if box is None else delta[box]
            return part.to(device or delta.device, copy=copy).contiguous()
        if isinstance(delta, (QuantizedDelta, LowRankDelta)):
            return (delta if box is None else delta.part(box)).to(device or delta.device, copy=copy)
        loaded = delta.load(box)
        return loaded if device is None else loaded.to(device)

    def check(self, name: str) -> None:
        """Read every byte of a stored delta, in constant memory, and compare its checksum; the norm, if the prior has
        no checksums. A delta that was found intact is not read again.

        Args:
            name: its canonical name.

        Raises:
            KeyError: there is no such delta.
            PriorFormatError: as in `load`.
        """
        delta = self._deltas[name]
        if isinstance(delta, StoredDelta) and name not in self._intact:
            delta.check()
            self._intact.add(name)

    def check_norm_of_parts(self, name: str | Source, found: float) -> None:
        """Compare the norm of a delta that was read in parts with the recorded one.

        Args:
            name: as in `load_stored`.
            found: the norm of all parts together.

        Raises:
            PriorFormatError: the norms differ.
        """
        first, shown = (name.parts[0].name, name.name) if isinstance(name, Source) else (name, name)
        delta = self._deltas[first]
        if isinstance(delta, StoredDelta) and (fault := norm_fault(found, self.info(name).delta_norm)):
            raise PriorFormatError(f"{delta.path}: {shown} is {fault}")

    def verify(self, progress: Callable[[int, int], None] | None = None) -> Verification:
        """Read every byte of the prior, in constant memory, and compare it with the checksums from when it was built.

        Any changed bit is found; in priors from before there were checksums, only changes that show in a norm. Deltas
        in memory have nothing to compare with.

        Args:
            progress: called with the number of elements done so far and in total.

        Returns:
            The outcome. Faults do not raise; `Verification.intact` is then False.
        """
        done, checked, faults = 0, {True: 0, False: 0}, {}
        for name, delta in self._deltas.items():
            if isinstance(delta, StoredDelta):
                checked[delta.checksums is not None] += 1
                if fault := delta.fault():
                    faults[name] = fault
            done += math.prod(self._infos[name].shape)
            if progress is not None:
                progress(done, self.numel)
        return Verification(by_checksum=checked[True], by_norm=checked[False], faults=faults)

    def _live(self, named_parameters: Iterable[tuple[str, Tensor]]) -> list[tuple[str, str, tuple[int, ...]]]:
        """Live name, canonical name and shape. Unknown names are aligned by shape, which is logged."""
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
        """Return how live parameters and deltas match by canonical name and shape. Values are not compared.

        A parameter's delta has its name; or it is made of the deltas of what the parameter is made of, if the model
        holds other tensors in memory than its checkpoint (transformers 5 fuses experts).

        Args:
            named_parameters: `model.named_parameters()`.

        Raises:
            PriorMismatchError: two parameters claim one delta.
        """
        return Coverage.of(self._live(named_parameters), self._shapes())

    def match(self, named_parameters: Iterable[tuple[str, Tensor]], strict: bool = False) -> Coverage:
        """Match live parameters and deltas for use, as `coverage` does; a partial match is logged as a warning.

        Args:
            named_parameters: `model.named_parameters()`. Parameters without a delta (a vision tower's) are never an
                error.
            strict: raise for a partial match.

        Returns:
            The `Coverage`.

        Raises:
            PriorMismatchError: nothing matches, two parameters claim one delta, or, if `strict`, a delta has no
                parameter of its shape.
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

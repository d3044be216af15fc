"""Task arithmetic: a prior is added to the weights of a checkpoint, which is written anew in the same files.

W' = W + scale * delta, in float32 (in float64 where W is), rounded once to the dtype of W. The files keep their headers
and sizes: tensors without a delta are copied, as is everything between those with one.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatch
from io import FileIO
from pathlib import Path

import torch

from ..errors import CheckpointError, PriorError, PriorMismatchError
from .checkpoint import Checkpoint
from .coverage import Coverage
from .encodings import check_encodings, marked_weights
from .files import FLOATING, INDEX_NAME, SINGLE_NAME, Source, StoredTensor, byte_view
from .folders import NewFolder
from .fusion import Source as Deltas
from .fusion import of_all_experts
from .hub import local_folder, public_name
from .names import canonical_name, some
from .prior import Prior, PriorLike
from .reading import open_file, read_exactly
from .runs import Rows, read_rows, rows_of
from .shards import Progress
from .threads import in_order, one_thread
from .unfusing import lie_transposed
from .writing import FileWriter, write_json

logger = logging.getLogger("drift_kernels")

APPLIED_NAME = "drift_applied.json"  # marks a folder that apply_prior wrote
_FORMAT, _VERSION = "drift_applied", 1

# Files that transformers loads beside the weights, and licenses. A model card would describe another model.
_BESIDE = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
_TEMPLATES = "additional_chat_templates"
_NOT_BESIDE = ("*.index.json", "adapter_config.json", "trainer_state.json", "drift_*.json")

_COPIED = 1 << 22  # bytes at a time


def apply_prior(
    prior: PriorLike,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    partial: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Coverage:
    """Write the checkpoint `base`, with `scale` times the prior's deltas added to its weights, to the folder `out`.

    W' = W + scale * delta (task arithmetic, arXiv 2212.04089), in float32 (float64 for float64 weights), rounded once
    to the dtype of W. The new checkpoint has the same shards, dtypes and names, and the base's config, tokenizer, code
    and license, so transformers loads it like the base. Deltas and weights match as in training: by canonical name,
    whether experts are fused or single; rows of a vocabulary beyond its delta do not change. Memory stays constant.

    The folder appears under its name when it is complete.

    Args:
        prior: a `Prior`, its folder or Hub id, or a mapping from names to deltas.
        base: a checkpoint's folder or Hub id; it does not change.
        out: the folder to write.
        scale: finite and not 0.
        partial: leave out deltas without a weight.
        overwrite: replace a folder that `apply_prior` wrote.
        progress: called with the number of bytes done so far and in total.

    Returns:
        What matched.

    Raises:
        PriorMismatchError: a delta has no weight, unless `partial`, or a weight of another shape.
        CheckpointError: the base cannot be read, is quantised or carries adapters.
        PriorError: a weight overflows, or something else is in `out`.
        ValueError: `scale` is 0 or not finite.
        OSError: `out` cannot be written.
    """
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    new = NewFolder(Path(out).expanduser().resolve(), APPLIED_NAME, "checkpoint that a prior was applied to", overwrite)
    folder = local_folder(base, (SINGLE_NAME, INDEX_NAME, *_BESIDE), INDEX_NAME).resolve()
    new.check_is_not_of(folder)
    if isinstance(prior, (str, os.PathLike)):
        new.check_is_not_of(Path(prior).expanduser().resolve())
    new.check()
    opened = Prior.of(prior)
    with Checkpoint(folder) as checkpoint:
        files = _files(checkpoint)
        coverage = _matched(opened, checkpoint, partial)
        addition = _Addition(opened, coverage.sources, scale)
        changed: dict[Path, dict[str, StoredTensor]] = {path: {} for path in files.values()}
        for name in coverage.matched:
            tensor = _plain(checkpoint, name)
            changed[tensor.path][name] = tensor
        with new.that_appears_complete() as unfinished, one_thread():
            total = sum(path.stat().st_size for path in files.values())
            done = 0
            for name, path in files.items():
                (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                for count in addition.write(path, unfinished / name, changed[path]):
                    done += count
                    if progress is not None:
                        progress(done, total)
            for name, path in _beside(folder, sharded=SINGLE_NAME not in files).items():
                (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                with FileWriter(unfinished / name) as writer:
                    writer.write(memoryview(path.read_bytes()), 0)
                    writer.finish()
            record = {
                "format": _FORMAT,
                "version": _VERSION,
                "base": public_name(base),
                "prior": {
                    "name": public_name(prior) if isinstance(prior, (str, os.PathLike)) else None,
                    "fingerprint": opened.fingerprint,
                    "delta": opened.record.get("delta"),
                },
                "scale": scale,
                "changed": sorted(coverage.matched),
            }
            write_json(unfinished / APPLIED_NAME, record)
    return coverage


def _files(checkpoint: Checkpoint) -> dict[str, Path]:
    """The files of the weights by their name in the folder. Raises CheckpointError for one outside it."""
    found = {}
    for path in sorted({place.path for tensor in checkpoint.tensors.values() for place in tensor.places()}):
        name = path.relative_to(checkpoint.folder)
        if ".." in name.parts:
            raise CheckpointError(f"{checkpoint.folder}: {INDEX_NAME} lists a file outside the folder, {name}")
        found[str(name)] = path
    return found


def _beside(folder: Path, sharded: bool) -> dict[str, Path]:
    """What is copied beside the weights, by its name in the folder; the index too, if it was read."""
    names = [path.name for path in sorted(folder.iterdir()) if any(fnmatch(path.name, wanted) for wanted in _BESIDE)]
    names = [name for name in names if not any(fnmatch(name, unwanted) for unwanted in _NOT_BESIDE)]
    names += [INDEX_NAME] if sharded else []
    if (folder / _TEMPLATES).is_dir():
        names += [f"{_TEMPLATES}/{path.name}" for path in sorted((folder / _TEMPLATES).glob("*.jinja"))]
    return {name: folder / name for name in names if (folder / name).is_file()}


def _matched(prior: Prior, checkpoint: Checkpoint, partial: bool) -> Coverage:
    """Which tensors of a checkpoint have which deltas. Raises the errors of `apply_prior`."""
    rules = prior.record.get("name_map")
    tensors = {canonical_name(name, rules): tensor for name, tensor in checkpoint.tensors.items()}
    asked = set(prior.names)
    check_encodings("base", checkpoint, tensors, asked, asked & marked_weights(tensors))
    coverage = prior.coverage(
        (name, torch.empty(tensor.shape, dtype=torch.float32, device="meta"))
        for name, tensor in checkpoint.tensors.items()
    )
    if coverage.shape_mismatches or not coverage.matched or not (coverage.complete or partial):
        advice = "" if coverage.shape_mismatches else "; pass partial=True (--partial) to skip those without a weight"
        raise PriorMismatchError(
            f"the prior does not fit {checkpoint.folder}: {coverage.summary()}{advice if coverage.matched else ''}"
        )
    if not coverage.complete:
        logger.warning("%s", coverage.summary())
    for name in coverage.matched:
        _plain(checkpoint, name)
    _check_orientation(checkpoint, tensors, coverage)
    return coverage


def _plain(checkpoint: Checkpoint, name: str) -> StoredTensor:
    """A weight that is stored in floating point. Raises CheckpointError for a quantised one."""
    tensor = checkpoint.tensors[name]
    if isinstance(tensor, StoredTensor) and tensor.dtype in FLOATING:
        return tensor
    stored = tensor.dtype if isinstance(tensor, StoredTensor) else "codes with scales"
    raise CheckpointError(
        f"{checkpoint.folder}: the base is quantised: {name} is stored as {stored}, but deltas can only be added to "
        "plain weights; dequantise the checkpoint first"
    )


def _check_orientation(checkpoint: Checkpoint, tensors: Mapping[str, Source], coverage: Coverage) -> None:
    """Raises PriorError for fused experts that are made of single ones and have square matrices, since these may be
    stored transposed or not.
    """
    stacks = {name: tensor.shape for name, tensor in tensors.items() if of_all_experts(name)}
    square = [
        name
        for name, source in coverage.sources.items()
        if source.name in stacks and len(source.parts) > 1 and source.shape[-1] == source.shape[-2]
    ]
    if square and lie_transposed(checkpoint.config, stacks) is not False:
        raise PriorError(
            f"{checkpoint.folder}: cannot tell whether the fused experts in {some(square)} are transposed, because "
            "their matrices are square, and the prior has the experts one by one"
        )


@dataclass(frozen=True)
class _Copy:
    begin: int
    end: int


@dataclass(frozen=True)
class _Change:
    name: str
    tensor: StoredTensor
    rows: Rows


class _Addition:
    """Writes files with deltas added."""

    def __init__(self, prior: Prior, sources: Mapping[str, Deltas], scale: float) -> None:
        self._prior = prior
        self._scale = scale
        self._sources = sources

    def write(self, path: Path, new: Path, changed: Mapping[str, StoredTensor]) -> Iterator[int]:
        """Write a file anew with these tensors changed, and yield the number of bytes written at a time. Raises
        PriorError, naming the tensor, if one is not finite, and PriorFormatError for a damaged delta.
        """
        with open_file(path) as file, FileWriter(new) as writer:

            def work(job: _Copy | _Change) -> int:
                return self._copy(file, writer, job) if isinstance(job, _Copy) else self._change(file, writer, job)

            with closing(in_order(work, self._jobs(os.fstat(file.fileno()).st_size, changed))) as results:
                for _, count in results:
                    yield count
            writer.finish()

    def _jobs(self, size: int, changed: Mapping[str, StoredTensor]) -> Iterator[_Copy | _Change]:
        done = 0
        for name, tensor in sorted(changed.items(), key=lambda item: item[1].offset):
            yield from _copies(done, tensor.offset)
            for part in self._sources[name].parts:
                self._prior.check(part.name)
            known = self._sources[name].shape  # fewer rows than the tensor's, if tokens have been added
            yield from (_Change(name, tensor, rows) for rows in rows_of(known))
            done = tensor.offset + math.prod(known) * (tensor.nbytes // max(tensor.numel, 1))
        yield from _copies(done, size)

    def _copy(self, file: FileIO, writer: FileWriter, job: _Copy) -> int:
        view = memoryview(bytearray(job.end - job.begin))
        read_exactly(file, view, job.begin)
        writer.write(view, job.begin)
        return len(view)

    def _change(self, file: FileIO, writer: FileWriter, job: _Change) -> int:
        assert isinstance(job.tensor.dtype, torch.dtype)
        weight = torch.empty(job.rows.count, dtype=job.tensor.dtype, device="cpu")
        read_exactly(file, byte_view(weight), job.tensor.offset + job.rows.start * weight.element_size())
        source = self._sources[job.name]
        delta = read_rows(self._prior, source, job.rows)
        added = delta.to(torch.promote_types(weight.dtype, torch.float32)) * self._scale
        changed = added.add_(weight).to(weight.dtype)
        if not bool(changed.isfinite().all()):
            raise PriorError(f"{job.name} contains NaN or Inf in the base, or overflows in {weight.dtype}")
        view = byte_view(changed)
        writer.write(view, job.tensor.offset + job.rows.start * weight.element_size())
        return len(view)


def _copies(begin: int, end: int) -> Sequence[_Copy]:
    return [_Copy(at, min(at + _COPIED, end)) for at in range(begin, end, _COPIED)]

"""Building a prior: checkpoints are streamed in pieces into a folder that appears when it is complete."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from .alignment import align_checkpoints
from .folders import NewFolder
from .formed import FormedDeltas
from .forms import Form
from .opening import name_for_the_record, open_checkpoint
from .pairing import Selection, pair_up
from .plausible import check_values
from .prior import Prior
from .record import DTYPES, FORMAT, RECORD_NAME, DeltaInfo, checksum_fields, version_of
from .shards import Progress, check_names, write_deltas
from .stream import DeltaStream
from .threads import one_thread
from .writing import write_json

logger = logging.getLogger("drift_kernels")


def build_prior(
    expert: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    modules: Sequence[str] = ("attn", "mlp"),
    layers: Iterable[int] | None = None,
    include_bias: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    rank: int | None = None,
    name_map: Mapping[str, str] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 1 << 30,
    progress: Progress | None = None,
) -> Prior:
    """Build the prior `expert - base` (or `expert - reference`) and write it to the folder `out`.

    Checkpoints are folders with safetensors files; Hub ids, `org/name` or `org/name@revision`, of which only the needed
    parts are fetched; or BASE+ADAPTER, two of these, where the second is a PEFT LoRA adapter that is merged in float32
    while it is read. FP8 codes with scales are read as float32. Tensors are paired by canonical name and deltas
    computed in float32. Memory stays constant whatever the size of the checkpoints.

    The folder appears under its name when it is complete.

    Example::

        prior = build_prior("DeepSeek-R1-Distill-Qwen-7B", "Qwen2.5-VL-7B-Instruct", "prior")

    Args:
        expert: the checkpoint to pull toward.
        base: the checkpoint that training starts from.
        out: the folder to write.
        reference: a checkpoint that is subtracted instead of the base.
        modules: presets ("attn", "mlp", "norm", "embed", "head", "full", ...; `docs/method.md`), or "re:REGEX" over
            canonical names.
        layers: the base's layer numbers; None: all.
        include_bias: include biases with their weights. A bias that the expert lacks is zero in it, and so is pulled to
            zero.
        dtype: how deltas are stored: float32, bfloat16, or int8 or float8_e4m3fn with a float32 scale for every 128
            elements.
        rank: store matrices as two bfloat16 factors of this rank if these are smaller. They come as near to the delta
            as the rank allows, by a randomised iteration that gives the same bits each time.
        name_map: prefix -> canonical prefix, for families that the name table lacks. For families in neither, the
            prefix is found by names and shapes. It is recorded in the prior.
        overwrite: replace a prior that is in `out`.
        max_shard_bytes: size of the files.
        progress: called with the number of elements done so far and in total.

    Returns:
        The opened prior.

    Raises:
        CheckpointError: a checkpoint is damaged, incomplete, foreign, unreadable or quantised in another way, or an
            adapter is not LoRA.
        PriorError: the checkpoints do not fit each other, do not differ, or hold NaN or Inf; or something else is in
            `out`.
        ValueError: unknown module or dtype, or a rank below 1.
        OSError: `out` cannot be written.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    form = Form(dtype, rank)
    target = Path(out).expanduser().resolve()  # follows links
    new = NewFolder(target, RECORD_NAME, "prior", overwrite)
    new.check()
    chosen = {"expert": expert, "base": base} | ({} if reference is None else {"reference": reference})
    layers = None if layers is None else sorted(set(layers))
    with ExitStack() as stack:
        checkpoints = {role: stack.enter_context(open_checkpoint(source)) for role, source in chosen.items()}
        name_map, notes = align_checkpoints(checkpoints, name_map)
        pairs, warnings = pair_up(checkpoints, Selection(modules, layers, include_bias), name_map)
        shapes = {pair.name: pair.shape for pair in pairs}
        warnings = notes + warnings + form.warnings(shapes)
        check_names(shapes, form)
        for warning in warnings:
            logger.warning("%s", warning)
        for role, checkpoint in checkpoints.items():
            checkpoint.fetch(pair.sources[role] for pair in pairs if role in pair.sources)
        with new.that_appears_complete() as folder:
            stream, by_name = DeltaStream(checkpoints, dtype), {pair.name: pair for pair in pairs}
            formed = FormedDeltas(stream, form)
            with one_thread():
                checksums = write_deltas(
                    folder,
                    shapes,
                    form,
                    max_shard_bytes,
                    lambda names: formed.deltas(by_name[name] for name in names),
                    progress,
                )
            rows = {pair.name: formed.measure(pair) for pair in pairs}
            found = check_values(
                {name: DeltaInfo(shape, form.dtype_of(shape), **rows[name]) for name, shape in shapes.items()}
            )
            for warning in found:
                logger.warning("%s", warning)
            record = {
                "format": FORMAT,
                "version": version_of(rows),
                "delta": f"expert - {'base' if reference is None else 'reference'}",
                "dtype": str(dtype).removeprefix("torch."),
                "modules": list(modules),
                "layers": layers,
                "name_map": name_map,
                "include_bias": include_bias,
                "pulled_to_zero": [pair.name for pair in pairs if pair.pulled_to_zero],
                "warnings": warnings + found,
                "sources": {
                    role: {"name": name_for_the_record(source), "sha256": stream.digests[role].hexdigest()}
                    for role, source in chosen.items()
                },
                "tensors": {
                    pair.name: {
                        "shape": list(pair.shape),
                        **rows[pair.name],
                        **checksum_fields(pair.name, checksums),
                    }
                    for pair in pairs
                },
            }
            write_json(folder / RECORD_NAME, record)
    return Prior.open(target)

"""Adapters that start where a prior points: A along the leading right singular vectors of delta, B zero."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PriorError, PriorMismatchError
from .deltas import norm_of
from .files import TensorType
from .folders import NewFolder
from .fusion import stored_names
from .in_memory import linear_weights
from .names import canonical_name, selector
from .prior import Prior, PriorLike
from .singular import top_right_singular_vectors
from .writing import TensorFileWriter, write_json

CONFIG_NAME, WEIGHTS_NAME, RECORD_NAME = "adapter_config.json", "adapter_model.safetensors", "drift_init_lora.json"

_PREFIX = "base_model.model."  # what PEFT puts before the names of the model's modules
_ROW_NORM = 1 / math.sqrt(3)  # what the rows of PEFT's own random A have on the average


@dataclass(frozen=True)
class ModuleFit:
    """What part of norm(delta)^2 of a module its A sees: norm(delta P)^2/norm(delta)^2, P the projection onto A's
    rows; and what a random A would see, rank/columns. `seen` is None for a delta of zeros."""

    seen: float | None
    random: float
    delta_norm: float


def init_lora(
    prior: PriorLike,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int = 16,
    alpha: float | None = None,
    rslora: bool = False,
    modules: Sequence[str] = ("attn", "mlp"),
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, ModuleFit]:
    """Write a LoRA adapter for PEFT to the folder `out`, and return what each module's A sees, by live module name.

    Args:
        base: a checkpoint's folder or a Hub id; only its config.json is read. transformers must know the model: the
            adapter has the names that it has in memory.
        alpha: PEFT's lora_alpha; by default `rank`, which makes the scaling 1 (sqrt(rank) with `rslora`).
        modules: as for `build_prior`; of these, the linear layers that the prior has a delta for.

    A's rows are orthogonal, along the leading right singular vectors of delta, and of norm 1/sqrt(3), as the rows of
    PEFT's random A are on the average: learning rates mean the same. B is zero, so that the model starts as the base.
    Nothing but adapters is in the folder, which appears when it is complete. Raises ValueError for a rank below 1,
    PriorMismatchError if the prior does not fit the model, PriorError if no module takes an adapter or one is smaller
    than the rank, CheckpointError without a config.json.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number from 1 on, got {rank!r}")
    new = NewFolder(Path(out).expanduser().resolve(), RECORD_NAME, "new adapter", overwrite)
    new.check()
    prior = Prior.of(prior)
    name, revision = _name_and_revision(base)
    weights = linear_weights(name, revision)
    chosen = {key: weight for key, weight in weights.items() if _selected(key, prior, modules)}
    coverage = prior.coverage(chosen.items())
    if coverage.shape_mismatches:
        weight, delta, shape, delta_shape = coverage.shape_mismatches[0]
        raise PriorMismatchError(f"{weight} has shape {list(shape)}, the prior's {delta} {list(delta_shape)}")
    if not coverage.matched:
        raise PriorError(f"no linear layer of {', '.join(modules)} has a delta: {coverage.summary()}")
    too_small = [weight for weight in coverage.matched if min(chosen[weight].shape) < rank]
    if too_small:
        raise PriorError(f"rank {rank} is beyond {too_small[0]}, whose shape is {list(chosen[too_small[0]].shape)}")
    fits: dict[str, ModuleFit] = {}
    with new.that_appears_complete() as folder:
        layout: dict[str, TensorType] = {}
        for weight in coverage.matched:
            rows, columns = chosen[weight].shape
            a, b = _tensor_names(weight)
            layout |= {a: (torch.float32, (rank, columns)), b: (torch.float32, (rows, rank))}
        with TensorFileWriter(folder / WEIGHTS_NAME, layout) as writer:
            for done, weight in enumerate(coverage.matched, 1):
                rows, columns = chosen[weight].shape
                vectors, fit = _start(prior, coverage.sources[weight], rank, columns)
                fits[weight.removesuffix(".weight")] = fit
                a, b = _tensor_names(weight)
                writer.append(a, vectors.mul_(_ROW_NORM).view(-1))
                writer.append(b, torch.zeros(rows * rank, dtype=torch.float32, device="cpu"))
                if progress is not None:
                    progress(done, len(coverage.matched))
            writer.finish()
        scale = float(rank) if alpha is None else alpha
        write_json(folder / CONFIG_NAME, _config((name, revision), list(fits), rank, scale, rslora))
        record = {
            "prior": prior.fingerprint,
            "rank": rank,
            "modules": {name: asdict(fit) for name, fit in fits.items()},
        }
        write_json(folder / RECORD_NAME, record)
    return fits


def _name_and_revision(base: str | os.PathLike[str]) -> tuple[str, str | None]:
    """A folder as it was given, or what stands before and behind the @ of a Hub id."""
    if Path(base).expanduser().is_dir():
        return str(Path(base).expanduser()), None
    name, _, revision = str(base).partition("@")
    return name, revision or None


def _selected(name: str, prior: Prior, modules: Sequence[str]) -> bool:
    canonical = canonical_name(name, prior.record.get("name_map") or {})
    return any(selector(module)(canonical) for module in modules)


def _start(prior: Prior, source: Any, rank: int, columns: int) -> tuple[Tensor, ModuleFit]:
    where = source.single.name if source.single else source
    delta = prior.load_stored(where, copy=False)
    vectors, seen = top_right_singular_vectors(delta, rank, "+".join(stored_names(source)))
    size = norm_of(delta)
    return vectors, ModuleFit(seen if size else None, rank / columns, size)


def _tensor_names(name: str) -> tuple[str, str]:
    module = _PREFIX + name.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _config(base: tuple[str, str | None], modules: list[str], rank: int, alpha: float, rslora: bool) -> dict[str, Any]:
    name, revision = base
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": name,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
    }


def seen_together(fits: Sequence[ModuleFit]) -> float | None:
    """What part of norm(delta)^2 is seen of several modules together."""
    total = sum(fit.delta_norm**2 for fit in fits)
    return sum((fit.seen or 0.0) * fit.delta_norm**2 for fit in fits) / total if total else None

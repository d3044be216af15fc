"""Adapters initialised from a prior: A along the leading right singular vectors of delta, B zero."""

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

_PREFIX = "base_model.model."  # PEFT's prefix for the names of the model's modules
_ROW_NORM = 1 / math.sqrt(3)  # the average norm of the rows of PEFT's random A


@dataclass(frozen=True)
class ModuleFit:
    """The fraction of a module's norm(delta)^2 that its A captures: norm(delta P)^2/norm(delta)^2, with P the
    projection onto A's rows (`seen`, None for a delta of zeros); and that of a random A, rank/columns."""

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
    """Write a PEFT LoRA adapter to the folder `out`, and return how much each module's A captures, by live module name.

    The rows of A are orthogonal, along the leading right singular vectors of delta, with norm 1/sqrt(3), the average
    norm of the rows of PEFT's random A, so that learning rates carry over. B is zero, so that the model starts as the
    base. The folder contains only adapters, and appears when it is complete.

    Args:
        base: a checkpoint folder or a Hub id; only its config.json is read. transformers must support the model,
            because the adapter uses the model's names in memory.
        alpha: PEFT's lora_alpha; by default `rank`, for a scaling of 1 (sqrt(rank) with `rslora`).
        modules: as for `build_prior`; the linear layers among these that the prior has a delta for get an adapter.

    Raises:
        ValueError: If the rank is below 1.
        PriorMismatchError: If the prior does not fit the model.
        PriorError: If no module gets an adapter, or one is smaller than the rank.
        CheckpointError: If there is no config.json of a supported model.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    new = NewFolder(Path(out).expanduser().resolve(), RECORD_NAME, "new adapter", overwrite)
    new.check()
    prior = Prior.of(prior)
    name, revision = _name_and_revision(base)
    weights = linear_weights(name, revision)
    chosen = {key: weight for key, weight in weights.items() if _selected(key, prior, modules)}
    coverage = prior.coverage(chosen.items())
    if coverage.shape_mismatches:
        weight, delta, shape, delta_shape = coverage.shape_mismatches[0]
        raise PriorMismatchError(
            f"{weight} has shape {list(shape)}, but the prior's delta {delta} has shape {list(delta_shape)}"
        )
    if not coverage.matched:
        raise PriorError(f"the prior has no delta for a linear layer of {', '.join(modules)}: {coverage.summary()}")
    too_small = [weight for weight in coverage.matched if min(chosen[weight].shape) < rank]
    if too_small:
        raise PriorError(f"rank {rank} is too large for {too_small[0]} of shape {list(chosen[too_small[0]].shape)}")
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
    """A folder unchanged, or the parts of a Hub id before and after the @."""
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
    """The fraction of norm(delta)^2 that is captured over several modules together."""
    total = sum(fit.delta_norm**2 for fit in fits)
    return sum((fit.seen or 0.0) * fit.delta_norm**2 for fit in fits) / total if total else None

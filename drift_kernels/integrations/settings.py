"""The DRIFT section of a trainer's configuration file."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..optimizer import FusedDriftAdamW

# Arguments of FusedDriftAdamW that the trainer's own arguments set, or that a file cannot hold.
_NOT_OURS = {"params", "lr", "betas", "eps", "weight_decay", "maximize", "capturable", "differentiable", "foreach"}
_NOT_OURS |= {"fused", "amsgrad", "self"}

# Additional arguments of `drift_optimizer` and `DriftCallback`.
_MORE = ("anneal", "refresh")

KEYS = (*(key for key in inspect.signature(FusedDriftAdamW.__init__).parameters if key not in _NOT_OURS), *_MORE)
"""The keys that may be set."""

_NUMBERS = {"alpha", "max_grad_norm", "anneal"}


def drift_settings(given: Any, where: str = "drift") -> dict[str, Any]:
    """Return the settings of a configuration file, checked, as keywords of `use_drift`.

    The keys are the arguments of `FusedDriftAdamW` for the prior and the precision, and `anneal` and `refresh`. `prior`
    is required. Numbers may be strings, since YAML reads `1e-3` as one.

    Args:
        given: the mapping under the file's key.
        where: that key, for messages.

    Raises:
        TypeError: `given` is not a mapping.
        ValueError: an unknown key, no `prior`, a string that should be a number, or an invalid `anneal`.
        FileNotFoundError: the prior's folder does not exist.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"{where} must be a mapping with the keys of FusedDriftAdamW, got {given!r}")
    settings = {str(key): value for key, value in given.items() if value is not None}
    if unknown := sorted(set(settings) - set(KEYS)):
        raise ValueError(f"{where} has unknown keys: {', '.join(unknown)}; expected keys among {', '.join(KEYS)}")
    prior = settings.get("prior")
    if not isinstance(prior, (str, os.PathLike)) or not str(prior):
        raise ValueError(f"{where} requires `prior`, the folder that `drift-prior build` wrote, got {prior!r}")
    if not Path(prior).expanduser().is_dir():
        raise FileNotFoundError(f"{where}.prior: no such folder: {str(prior)!r}; create it with `drift-prior build`")
    settings["prior"] = str(Path(prior).expanduser())
    for key in _NUMBERS & settings.keys():
        value = settings[key]
        if isinstance(value, Mapping):
            settings[key] = {pattern: _number(f"{where}.{key}.{pattern}", entry) for pattern, entry in value.items()}
        else:
            settings[key] = _number(f"{where}.{key}", value)
    check_anneal(settings.get("anneal"))
    return settings


def check_anneal(anneal: float | None, alpha_lambda: object = None) -> None:
    """Check a fraction of the training.

    Args:
        anneal: the fraction of the training's steps over which alpha falls to 0; None: constant.
        alpha_lambda: another schedule, or None.

    Raises:
        ValueError: `anneal` is not in (0, 1], or both are given.
    """
    if anneal is None:
        return
    if alpha_lambda is not None:
        raise ValueError("pass either anneal or alpha_lambda, not both: each is a schedule of alpha")
    if isinstance(anneal, bool) or not isinstance(anneal, (int, float)) or not 0 < anneal <= 1:
        raise ValueError(f"anneal must be a fraction of the training steps, in (0, 1], got {anneal!r}")


def _number(where: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{where} must be a number, got {value!r}") from None

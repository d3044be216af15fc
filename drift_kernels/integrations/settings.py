"""What a trainer's configuration file says of DRIFT."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..optimizer import FusedDriftAdamW

# Of FusedDriftAdamW's keywords those that are torch's, which a trainer's own arguments say, or that no file can.
_NOT_OURS = {"params", "lr", "betas", "eps", "weight_decay", "maximize", "capturable", "differentiable", "foreach"}
_NOT_OURS |= {"fused", "amsgrad", "self"}

# What `drift_optimizer` and `DriftCallback` take beside them.
_MORE = ("anneal", "refresh")

KEYS = (*(key for key in inspect.signature(FusedDriftAdamW.__init__).parameters if key not in _NOT_OURS), *_MORE)
"""What may be set."""

_NUMBERS = {"alpha", "max_grad_norm", "anneal"}


def drift_settings(given: Any, where: str = "drift") -> dict[str, Any]:
    """The settings of a configuration file, checked: `prior`, which must be there, and what else of `KEYS` was set.

    They are keywords of `use_drift`: those of FusedDriftAdamW that concern the prior and the precision, `anneal`
    (DriftCallback's) and `refresh` (`lora_prior`'s). Numbers may be strings, as YAML reads `1e-3`.

    Args:
        given: the mapping under the file's key.
        where: that key, for messages.

    Raises:
        TypeError: no mapping.
        ValueError: an unknown key, no `prior`, or a string that should be a number.
        FileNotFoundError: the prior's folder is not there.
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
    """Raises ValueError for a fraction of the training that is none, and beside another schedule."""
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

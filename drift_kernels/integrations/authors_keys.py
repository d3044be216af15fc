"""The keys of the authors' fork of LLaMA-Factory, `delta_prior_...`, as settings of this package."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import PriorError
from ..kernels.scalings import GRADIENT_SCALINGS
from ..prior import Prior, build_prior
from ..prior.hub import is_hub_id
from ..prior.names import PRESETS, layer_of, parse_layers, presets_in, selector
from ..prior.opening import name_for_the_record, open_checkpoint

logger = logging.getLogger("drift_kernels")

PREFIX = "delta_prior"
KEYS = (
    "delta_prior_path",  # not in the fork: a prior that exists already
    *("delta_prior1_ckpt", "delta_prior2_ckpt", "delta_prior_include_bias", "delta_prior_scale"),
    *("delta_prior_merge_patterns", "delta_prior_alpha", "delta_prior_only_layers", "delta_prior_skip_first_n"),
    "delta_prior_normalize_delta_to_param",
)

_MADE_OF = "made_of.json"  # in the folder of a prior that was built for a training run


@dataclass(frozen=True)
class AuthorsSettings:
    """The fork's keys, checked, with the fork's defaults.

    Attributes:
        path: the folder of a prior (`delta_prior_path`), or None.
        expert: the checkpoint of the expert; the prior is expert - base, or expert - reference.
        reference: the checkpoint that is subtracted, or None for the base.
        patterns: modules and the factor of alpha of each; None: the default ones.
        alpha: strength of the prior.
        scaling: "absolute", "gradnorm" or "adaptive_cosine".
        include_bias: whether biases are used.
        only_layers: the layers that are used; None: all.
        skip_first: number of first layers that are not used.
        normalize: whether deltas are rescaled to norm(W), with "absolute".
    """

    path: str | None
    expert: str | None
    reference: str | None
    patterns: dict[str, float] | None
    alpha: float
    scaling: str
    include_bias: bool
    only_layers: frozenset[int] | None
    skip_first: int
    normalize: bool

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> AuthorsSettings:
        """Return the settings of these keys.

        Args:
            given: the keys of a configuration file that begin with `delta_prior`.

        Raises:
            ValueError: an unknown key, an invalid value, no prior, or two.
            FileNotFoundError, CheckpointError: a folder does not exist, or is not a checkpoint.
        """
        if unknown := sorted(set(given) - set(KEYS)):
            raise ValueError(f"unknown keys: {', '.join(unknown)}; expected keys among {', '.join(KEYS)}")
        values = {key: value for key, value in given.items() if value is not None}
        path, first, second = (values.get(key) for key in ("delta_prior_path", *KEYS[1:3]))
        if (path is None) == (first is None):
            raise ValueError("set either delta_prior_path (the folder of a prior) or delta_prior1_ckpt (an expert)")
        if second is not None and first is None:
            raise ValueError(
                "delta_prior2_ckpt is for delta_prior2_ckpt - delta_prior1_ckpt: set delta_prior1_ckpt too"
            )
        # Report missing folders now, not after the model has been loaded.
        if path is not None and not Path(path).expanduser().is_dir():
            raise FileNotFoundError(
                f"delta_prior_path: no such folder: {str(path)!r}; create it with `drift-prior build`"
            )
        for checkpoint in filter(None, (first, second)):
            if not is_hub_id(str(checkpoint)):
                open_checkpoint(checkpoint)
        patterns, alpha = _patterns(values.get("delta_prior_merge_patterns")), values.get("delta_prior_alpha")
        if alpha is not None and patterns is not None and set(patterns.values()) != {1.0}:
            raise ValueError("alpha is set twice: by delta_prior_alpha and by delta_prior_merge_patterns")
        scaling = values.get("delta_prior_scale", "adaptive_cosine")
        if scaling not in GRADIENT_SCALINGS:
            raise ValueError(f"delta_prior_scale must be one of {', '.join(GRADIENT_SCALINGS)}, got {scaling!r}")
        return cls(
            path=path,
            expert=first if second is None else second,
            reference=None if second is None else first,
            patterns=patterns,
            alpha=1.0 if alpha is None else _number("delta_prior_alpha", alpha),
            scaling=scaling,
            include_bias=_flag(values, "delta_prior_include_bias"),
            only_layers=_layers(values.get("delta_prior_only_layers")),
            skip_first=int(_number("delta_prior_skip_first_n", values.get("delta_prior_skip_first_n", 0))),
            normalize=_flag(values, "delta_prior_normalize_delta_to_param"),
        )

    def prior(self, base: str, folder: Path, may_build: bool = True) -> Path:
        """Return the folder of the prior: that of `delta_prior_path`, or `folder`, where it is built unless it exists.

        Args:
            base: the checkpoint that is trained.
            folder: where to build the prior.
            may_build: False in processes that wait for another one to build it.

        Raises:
            PriorError: `folder` holds another prior than requested, or none while `may_build` is False. The errors of
                `build_prior` are raised too.
        """
        if self.path is not None:
            return Path(self.path).expanduser()
        made_of = self._made_of(base)
        if folder.exists():
            if not _same(folder / _MADE_OF, made_of):
                raise PriorError(
                    f"{folder} was built from other checkpoints or modules, or its build was not finished: remove it, "
                    "use another output_dir, or set delta_prior_path to the prior that you want"
                )
            logger.info("using the existing prior in %s", folder)
            return folder
        if not may_build:
            raise PriorError(f"the prior was not built in {folder}: see the error of the first process")
        assert self.expert is not None
        logger.info("building the prior in %s", folder)
        modules = ["default"] if self.patterns is None else list(self.patterns)
        build_prior(self.expert, base, folder, reference=self.reference, modules=modules, dtype=torch.bfloat16)
        (folder / _MADE_OF).write_text(json.dumps(made_of))
        return folder

    def options(self, prior: Prior) -> dict[str, Any]:
        """Return the arguments of `FusedDriftAdamW` for these settings.

        Args:
            prior: the opened prior.

        Raises:
            ValueError: the prior lacks a requested layer or pattern, or nothing is left of it.
        """
        entries = dict.fromkeys(self._left_out(prior.names), 0.0)
        entries |= {"re:": 1.0} if self.patterns is None else self.patterns
        fitting = {entry: any(map(selector(entry), prior.names)) for entry in entries}
        if unfit := [entry for entry, fits in fitting.items() if not fits]:
            raise ValueError(f"delta_prior_merge_patterns: no delta of the prior matches {', '.join(unfit)}")
        alpha = {entry: self.alpha * factor for entry, factor in entries.items()}
        return {
            "prior": prior,
            "alpha": self.alpha if list(entries) == ["re:"] else alpha,
            "prior_scaling": self.scaling,
            "normalize_to_param": self.normalize and self.scaling == "absolute",
        }

    def _left_out(self, names: Iterable[str]) -> list[str]:
        """Patterns of what was not requested. `only_layers` never leaves out the embedding and the head."""
        layers = {layer for name in names if (layer := layer_of(name)) is not None}
        wanted = layers if self.only_layers is None else self.only_layers
        if unknown := sorted(wanted - layers):
            raise ValueError(
                f"delta_prior_only_layers: the prior has no layer {', '.join(map(str, unknown))}; it has "
                f"{min(layers, default=0)} to {max(layers, default=0)}"
            )
        found = []
        if others := sorted(layer for layer in layers if layer not in wanted or layer < self.skip_first):
            found.append(rf"re:^layers\.(?:{'|'.join(map(str, others))})\.")
        if not self.include_bias and any(name.endswith(".bias") for name in names):
            found.append(r"re:\.bias$")
        return found

    def _made_of(self, base: str) -> dict[str, Any]:
        sources = {"expert": self.expert, "reference": self.reference, "base": base}
        modules = ["default"] if self.patterns is None else list(self.patterns)
        return {"modules": modules} | {role: _identity(source) for role, source in sources.items() if source}


def _identity(source: str) -> dict[str, Any]:
    """What distinguishes a checkpoint from another, without reading it."""
    folder = Path(source).expanduser()
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    stats = {path.name: [(stat := path.stat()).st_size, stat.st_mtime_ns] for path in files}
    return {"name": name_for_the_record(source), "files": stats}


def _same(file: Path, made_of: Mapping[str, Any]) -> bool:
    return file.is_file() and json.loads(file.read_text()) == made_of


def _patterns(given: Any) -> dict[str, float] | None:
    """Presets, `re:REGEX` or a bare REGEX; a list of them, or a mapping to their alphas, as YAML or JSON."""
    if given is None:
        return None
    if isinstance(given, str):
        text = given.strip()
        if text[:1] in ("{", "["):
            given = json.loads(text)
        else:  # a regex may contain commas
            parts = [part.strip() for part in text.split(",")]
            given = parts if all(map(presets_in, parts)) else [text]
    if isinstance(given, Mapping):
        alphas = {_entry(key): _number(f"delta_prior_merge_patterns.{key}", value) for key, value in given.items()}
    elif isinstance(given, (list, tuple)):
        alphas = {_entry(key): 1.0 for key in given}
    else:
        raise ValueError(f"delta_prior_merge_patterns must be patterns, or patterns with alphas, got {given!r}")
    for entry in alphas:
        selector(entry)  # raises ValueError if it is invalid
    if not any(alphas.values()):
        raise ValueError(f"delta_prior_merge_patterns selects nothing: {given!r}")
    return alphas


def _entry(given: Any) -> str:
    """As in the fork: anything but a preset is a regular expression, with `re:` or without."""
    text = str(given).strip()
    return text if text in PRESETS or text.startswith("re:") else f"re:{text}"


def _layers(given: Any) -> frozenset[int] | None:
    if given is None or given == "":
        return None
    return parse_layers(",".join(map(str, given)) if isinstance(given, (list, tuple)) else str(given))


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key, True)
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value


def _number(key: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key} must be a number, got {value!r}") from None


def is_ours(key: str) -> bool:
    """Return whether a key of a configuration file is one of these, or meant to be.

    Args:
        key: the key.
    """
    return os.fspath(key).startswith(PREFIX)

"""One family: its tiny checkpoints, their prior, one step, and what moved, compared with independent arithmetic."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

from drift_kernels import FusedDriftAdamW, Prior, build_prior
from drift_kernels.prior.names import canonical_name, is_overlooked, select_names

from .catalogue import Family
from .experts import NoExpertError, Shared, experts_for, shared_parameters
from .overrides import EMPTY_FILES, EXPERT_FIELDS, LAYERS, OVERRIDES
from .shrink import tiny

PROJECTIONS, ALL = ("attn", "mlp"), ("attn", "mlp", "norms", "embed", "head")
_MOST = 150_000_000  # parameters; a larger family is not tiny
_LR = 0.01


@dataclass
class Row:
    """The result for one family. `verdict`: full, partial, error, fault or not tried."""

    family: str
    model: str
    multimodal: bool
    verdict: str = "not tried"
    expert: str = ""
    stored: str = ""  # prefix of the language model in the base's checkpoint
    live: str = ""  # and in memory
    bound: int = 0
    shared: int = 0  # attention and MLP matrices that both models have
    rest: str = ""  # norms, embedding, head: bound of shared, when requested
    rest_missed: list[str] = field(default_factory=list)
    told: str = ""
    cure: str = ""
    silent: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    tower: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)  # other matrices of the layers, left alone

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Attempt:
    """A prior that was built and used for one step, or the error that prevented it."""

    error: str = ""
    prior: Prior | None = None
    warnings: list[str] = field(default_factory=list)
    summary: str = ""
    unbound: set[str] = field(default_factory=set)  # deltas without a parameter of their shape
    moves: dict[str, Tensor] = field(default_factory=dict)

    @property
    def told(self) -> str:
        return " ".join("; ".join([*self.warnings, self.error or self.summary]).split())


class Pair:
    """The two models of a family, saved in a folder and loaded again."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.folder = folder
        config = tiny(family.config_class, OVERRIDES.get(family.name))
        base = _random_model(getattr(hf, family.model), config)
        base.save_pretrained(folder / "base")
        if family.name in EMPTY_FILES:
            torch.save({}, folder / "base" / EMPTY_FILES[family.name])
        self.base = type(base).from_pretrained(folder / "base", dtype=torch.float32).float()
        self.expert, self.path, self.shared = self._find_expert(family, base)
        self.live, self.theirs = dict(self.base.named_parameters()), dict(self.expert.named_parameters())
        _check_reloaded(base, self.base, [pair.live for pair in self.shared])
        self.start = {name: param.detach().clone() for name, param in self.live.items()}
        self.stored = {name: _stored(folder / name) for name in ("base", "expert")}

    def _find_expert(self, family: Family, base: nn.Module) -> tuple[nn.Module, str, list[Shared]]:
        """The first possible expert that is found in the base, reloaded from its checkpoint."""
        failures = []
        for kind, config in experts_for(family, base):
            for name, value in EXPERT_FIELDS.get(family.name, {}).items():
                setattr(config, name, value)
            try:
                expert = _random_model(kind, config)
            except Exception as error:  # any error: it cannot be made from this config
                failures.append(f"{kind.__name__}: {error}")
                continue
            try:
                path, shared = shared_parameters(self.base, expert, LAYERS.get(family.name, {}))
            except NoExpertError as error:
                failures.append(str(error))
                continue
            expert.save_pretrained(self.folder / "expert")
            loaded = kind.from_pretrained(self.folder / "expert", dtype=torch.float32).float()
            _check_reloaded(expert, loaded, [pair.expert for pair in shared])
            return loaded, path, shared
        language_model = self.base.config.get_text_config(decoder=True).model_type
        raise NoExpertError("; ".join(failures) or f"no text-only class for the language model {language_model}")

    def truth(self, pair: Shared) -> Tensor:
        """The true delta: zero outside the rows that both have."""
        theirs, ours = self.theirs[pair.expert].detach(), self.start[pair.live]
        if theirs.shape == ours.shape:
            return theirs - ours
        delta, common = torch.zeros_like(ours), min(len(theirs), len(ours))
        delta[:common] = theirs[:common] - ours[:common]
        return delta

    def stored_name(self, role: str, param: Tensor) -> str:
        """The name of the stored tensor with a parameter's values, if it is stored as one tensor."""
        return next((name for name, tensor in self.stored[role].items() if _equal(tensor, param)), "")

    def attempt(self, modules: Sequence[str], name_map: dict[str, str] | None = None) -> Attempt:
        """Build the prior and take a step with zero gradients: each biased element moves by lr toward the expert."""
        with torch.no_grad():
            for name, param in self.live.items():
                param.copy_(self.start[name])
                param.requires_grad_()
                param.grad = torch.zeros_like(param)
        result = Attempt()
        try:
            folders = (self.folder / name for name in ("expert", "base", "prior"))
            options = {"modules": modules, "name_map": name_map, "overwrite": True}
            prior = result.prior = build_prior(*folders, dtype=torch.float32, **options)
            result.warnings = list(prior.record["warnings"])
            coverage = prior.coverage(self.base.named_parameters())
            result.unbound = {*coverage.prior_only, *(name for _, name, _, _ in coverage.shape_mismatches)}
            result.summary = coverage.summary()
            optimizer = FusedDriftAdamW(
                self.base.named_parameters(), lr=_LR, weight_decay=0.0, prior=prior, prior_scaling="absolute"
            )
            optimizer.step()
        except ValueError as error:
            result.error = f"{type(error).__name__}: {error}".replace(f"{self.folder}/", "")
        moves = {name: param.detach() - self.start[name] for name, param in self.live.items()}
        result.moves = {name: move for name, move in moves.items() if move.any()}
        return result


def check(family: Family, folder: Path) -> Row:
    """Check a family. Raises any error that prevents making it at tiny size."""
    row = Row(family.name, family.model, family.multimodal)
    pair = Pair(family, folder)
    row.expert, row.live = type(pair.expert).__name__, pair.path
    projections = [shared for shared in pair.shared if shared.part == "projection"]
    row.stored = _prefix(pair, projections)
    attempt = pair.attempt(PROJECTIONS)
    missed = [shared for shared in projections if shared.live not in attempt.moves]
    row.shared, row.bound = len(projections), len(projections) - len(missed)
    row.wrong, row.tower = _wrong(pair, attempt), _outside(pair, attempt)
    row.silent = [_as_stored(pair, shared) for shared in missed if not _is_told(pair, attempt, shared)]
    row.beside = [s.live for s in pair.shared if s.part == "beside" and s.live not in attempt.moves]
    row.told = attempt.told if missed else ""
    if missed:
        row.cure = _cure(pair, projections)
    headless = not any(shared.part == "head" for shared in pair.shared)
    with_rest = pair.attempt([module for module in ALL if module != "head" or not headless])
    rest = [s for s in pair.shared if s.part in ("norm", "embed", "head")]
    row.rest_missed = [s.live for s in rest if s.live not in with_rest.moves]
    row.rest = f"{len(rest) - len(row.rest_missed)}/{len(rest)}"
    row.wrong += [name for name in _wrong(pair, with_rest) if name not in row.wrong]
    row.tower += [name for name in _outside(pair, with_rest) if name not in row.tower]
    if not projections:
        raise NoExpertError(f"{row.expert} has no attention or MLP matrix in common with the base")
    faults = row.silent or row.wrong or row.tower
    row.verdict = "fault" if faults else "error" if attempt.error else "partial" if missed else "full"
    return row


def _random_model(kind: type[nn.Module], config: hf.PretrainedConfig) -> nn.Module:
    config.dtype = torch.float32
    model = kind(config).float()
    count = sum(param.numel() for param in model.parameters())
    if count > _MOST:
        raise NoExpertError(f"{kind.__name__} stays at {count:,} parameters")
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.5)
    return model


def _check_reloaded(saved: nn.Module, loaded: nn.Module, names: Sequence[str]) -> None:
    before, after = dict(saved.named_parameters()), dict(loaded.named_parameters())
    for name in names:
        if name in before and not _equal(before[name], after[name]):
            raise NoExpertError(f"transformers does not reload what it saved: {name}")


def _stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.detach().float(), other.detach().float())


def _wrong(pair: Pair, attempt: Attempt) -> list[str]:
    """The parameters that moved, but not by lr toward the expert in every element."""
    wrong = []
    for shared in pair.shared:
        move, delta = attempt.moves.get(shared.live), pair.truth(shared)
        clear = (delta.abs() > 1e-4) | (delta == 0)
        if move is not None and not torch.allclose(move[clear], _LR * delta.sign()[clear], rtol=0.05):
            wrong.append(shared.live)
    return wrong


def _outside(pair: Pair, attempt: Attempt) -> list[str]:
    """The parameters outside the language model that moved."""
    return sorted(attempt.moves.keys() - {shared.live for shared in pair.shared})


def _is_told(pair: Pair, attempt: Attempt, missed: Shared) -> bool:
    """Whether a miss is reported. An error reports everything. A warning or the coverage reports a requested tensor
    without a counterpart, a delta without a parameter, and a matrix that belongs to no module. A tensor stored in other
    pieces than in memory counts as reported if any part of its block is."""
    if attempt.error:
        return True
    name_map, warnings = attempt.prior.record["name_map"], " ".join(attempt.warnings)
    stored = {canonical_name(name, name_map): len(tensor.shape) for name, tensor in pair.stored["expert"].items()}
    left = {name for name in select_names(stored, PROJECTIONS) if name not in attempt.prior.names} | attempt.unbound
    if "belong to no module" in warnings:
        left |= {name for name, ndim in stored.items() if is_overlooked(name, ndim)}
    own = pair.stored_name("expert", pair.theirs[missed.expert])
    if own:
        return canonical_name(own, name_map) in left
    return any(_block(name) == _block(missed.live) or ("experts" in name and "experts" in missed.live) for name in left)


def _block(name: str) -> list[str]:
    """The layer number and block in a name, whatever attention is called."""
    return re.findall(r"(\d+)\.(?:self_)?(attn|\w+)\.", name.replace("attention", "attn"))[:1]


def _as_stored(pair: Pair, shared: Shared) -> str:
    stored = pair.stored_name("base", pair.start[shared.live])
    return shared.live if stored in ("", shared.live) else f"{shared.live} (stored: {stored})"


def _prefix(pair: Pair, projections: Sequence[Shared]) -> str:
    """The prefix of the layers in the base's checkpoint, from the first matrix that is stored unchanged."""
    for shared in projections:
        if stored := pair.stored_name("base", pair.start[shared.live]):
            return re.sub(r"\.?\w+\.\d+\..*", "", stored)
    return "?"


def _cure(pair: Pair, projections: Sequence[Shared]) -> str:
    """A tested name map or choice of modules with which all of them bind; or why there is none."""
    found = {}
    for shared in projections:
        names = [shared.live, pair.stored_name("base", pair.start[shared.live])]
        names.append(pair.stored_name("expert", pair.theirs[shared.expert]))
        for name in names:
            if name and canonical_name(name).startswith("layers.") is False:
                found[re.match(r"(.*?)\d+\.", name)[1]] = "layers."
    best, most = "", 0
    for modules in (PROJECTIONS, ("re:^layers",)):
        for name_map in ({}, found) if found else ({},):
            attempt = pair.attempt(modules, name_map)
            count = sum(shared.live in attempt.moves for shared in projections)
            if count > most and not _wrong(pair, attempt) and not _outside(pair, attempt):
                words = [f"--name-map {prefix}={to}" for prefix, to in name_map.items()]
                words += [f"--modules {','.join(modules)}"] if modules != PROJECTIONS else []
                best, most = " ".join(words), count
    best = best and f"`{best}`"
    if most == len(projections):
        return best
    return f"{best} binds {most} of {len(projections)}" if best else "none found"

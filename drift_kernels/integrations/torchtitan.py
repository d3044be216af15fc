"""For torchtitan: a job config that trains with FusedDriftAdamW, and a prior in torchtitan's names and layouts."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn
from torch.optim import Optimizer
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.config.override import derive
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from ..errors import PriorError
from ..optimizer import FusedDriftAdamW
from ..prior import Prior, PriorLike
from ..prior.converted import ConvertedPrior
from ..prior.names import canonical_name
from ..schedule import AlphaScheduler
from .in_use import check_in_use
from .settings import drift_settings
from .step_figures import step_figures
from .training_run import AlphaOverTime

OURS = "FusedDriftAdamW"  # optimizer_name of param groups
_EMBEDDING = "model.embed_tokens.weight"


def use_drift(config: Trainer.Config, **settings: Any) -> Trainer.Config:
    """Make a torchtitan job train with `FusedDriftAdamW`.

    Every param group of the config keeps its parameters, lr, betas, eps and weight decay. The optimizer clips the
    biased gradient to the config's `training.max_norm`, unless `max_grad_norm` is set here; the trainer then only
    measures the gradient. The trainer's log contains `step_figures`.

    Example, for a function of a config registry::

        def llama3_8b_drift() -> Trainer.Config:
            return use_drift(llama3_8b(), prior="prior", alpha=1.0)

    Args:
        config: the job config, with everything else set; it is changed.
        settings: `prior`, an existing folder of a prior that was built from Hugging Face checkpoints; other keys of
            `drift_settings`, except `refresh`.

    Returns:
        The config.

    Raises:
        ValueError, TypeError, FileNotFoundError: a setting is invalid, or a param group has another optimizer than
            AdamW.
        PriorError: the model has no conversion from Hugging Face checkpoints. When the job starts, it raises the errors
            of `FusedDriftAdamW`, TypeError if another optimizer has replaced it since, and ValueError for pipeline
            parallelism and `fused_opt_states_bf16`.
    """
    settings = drift_settings(settings, "use_drift")
    anneal = settings.pop("anneal", None)
    if "refresh" in settings:
        raise ValueError("use_drift: `refresh` is for LoRA, but priors do not support torchtitan's LoRA layers")
    spec = config.model_spec
    if spec is None or spec.state_dict_adapter is None:
        raise PriorError("the config's model_spec has no state_dict_adapter, which is required to convert the prior")
    if others := {group.optimizer_name for group in config.optimizer.param_groups} - {"AdamW"}:
        raise ValueError(f"use_drift replaces AdamW with FusedDriftAdamW, but the config has {', '.join(others)}")
    if settings.get("max_grad_norm") is None:
        settings["max_grad_norm"] = config.training.max_norm
    config.training.max_norm = math.inf
    config.optimizer = derive(
        config.optimizer,
        DriftOptimizers.Config,
        param_groups=[replace(group, optimizer_name=OURS) for group in config.optimizer.param_groups],
        drift=_Drift(spec, settings),
        anneal=anneal,
    )
    config.model_spec = replace(spec, post_optimizer_build_fn=_guarded(spec.post_optimizer_build_fn))
    if type(config.lr_scheduler) is LRSchedulersContainer.Config:
        config.lr_scheduler = derive(config.lr_scheduler, DriftSchedules.Config)
    if type(config.metrics) is MetricsProcessor.Config:
        config.metrics = derive(config.metrics, DriftMetrics.Config)
    return config


def _guarded(inner: Callable[..., None] | None) -> Callable[..., None]:
    """The hook that the trainer calls with the optimizers that it has made."""

    def check(optimizers: OptimizersContainer, model_parts: Sequence[nn.Module], parallel_dims: Any) -> None:
        for optimizer in optimizers:
            check_in_use(optimizer)
        if inner is not None:
            inner(optimizers, model_parts, parallel_dims)

    return check


class _Drift:
    """The arguments of FusedDriftAdamW beside the param groups, and the model that the prior is for. A config logs it
    as the settings.
    """

    def __init__(self, spec: ModelSpec, settings: dict[str, Any]) -> None:
        self.spec, self.settings = spec, settings

    def to_dict(self) -> dict[str, Any]:
        return self.settings


def _drift_adamw(groups: list[dict[str, Any]], *, drift: _Drift) -> FusedDriftAdamW:
    prior = titan_prior(drift.spec, drift.settings["prior"])
    return FusedDriftAdamW(groups, **{**drift.settings, "prior": prior})


class DriftOptimizers(OptimizersContainer):
    """torchtitan's container of optimizers, which makes a `FusedDriftAdamW` of the param groups that name it.

    Raises:
        ValueError: pipeline parallelism, or `fused_opt_states_bf16`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        drift: Annotated[_Drift | None, tyro.conf.Suppress] = None
        """Arguments of FusedDriftAdamW beside the param groups."""
        anneal: float | None = None
        """The fraction of the training's steps over which alpha falls to 0, or None for a constant alpha."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        if len(model_parts) > 1:
            raise ValueError(
                "use_drift does not support pipeline parallelism, where each model part has a separate optimizer"
            )
        if config.implementation == "fused_opt_states_bf16":
            raise ValueError(
                "implementation='fused_opt_states_bf16' is for torch's AdamW: pass state_dtype='bfloat16' to use_drift"
            )
        options = {**config.optimizer_factory_kwargs_by_name, OURS: {"drift": config.drift}}
        with_options: Any = replace(config, optimizer_factory_kwargs_by_name=options)  # type: ignore[call-arg]
        super().__init__(with_options, model_parts=model_parts)
        self._anneal = config.anneal
        self._alpha_schedules: list[AlphaScheduler] = []

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return _drift_adamw if name == OURS else OptimizersContainer._resolve_optimizer_factory(name)

    def schedule_alpha(self, training_steps: int) -> None:
        """Set alpha's schedule, once the length of the training is known.

        Args:
            training_steps: optimizer steps of the whole training.
        """
        alpha = AlphaOverTime(anneal=self._anneal)
        schedules = [alpha.scheduler(optimizer, 0, training_steps) for optimizer in self.optimizers]
        self._alpha_schedules = [schedule for schedule in schedules if schedule is not None]

    def step(self, closure: Any = None) -> None:
        """Step the optimizers, then alpha's schedule.

        Args:
            closure: as in torch.

        Raises:
            RuntimeError: `anneal` is set, but the config has lost the lr_scheduler that `use_drift` put in.
        """
        if self._anneal is not None and not self._alpha_schedules:
            raise RuntimeError("anneal requires the lr_scheduler set by use_drift, but the config has another one now")
        super().step(closure)
        for schedule in self._alpha_schedules:
            schedule.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizers' states, and continue alpha's schedule after the steps that they have taken.

        Args:
            state_dict: as in torchtitan.
        """
        super().load_state_dict(state_dict)
        for optimizer, schedule in zip(self.optimizers, self._alpha_schedules, strict=False):
            taken = max(int(state["step"]) for state in optimizer.state.values())
            schedule.load_state_dict({**schedule.state_dict(), "last_epoch": taken})


class DriftSchedules(LRSchedulersContainer):
    """torchtitan's learning rate schedules, which also tell the optimizers the length of the training, for alpha."""

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        def build(self, *, optimizers: OptimizersContainer, training_steps: int) -> LRSchedulersContainer:
            if isinstance(optimizers, DriftOptimizers):
                optimizers.schedule_alpha(training_steps if self.total_steps is None else self.total_steps)
            return LRSchedulersContainer.Config.build(self, optimizers=optimizers, training_steps=training_steps)


class DriftMetrics(MetricsProcessor):
    """torchtitan's metrics, with `step_figures` added."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def log(self, *args: Any, extra_metrics: dict[str, Any] | None = None, **others: Any) -> None:
        """Log the trainer's figures and those of the last step.

        Args:
            args, others: as in torchtitan.
            extra_metrics: further figures.
        """
        figures = {} if self.optimizers is None else step_figures(self.optimizers.optimizers[0])
        super().log(*args, extra_metrics={**(extra_metrics or {}), **figures}, **others)


def titan_prior(spec: ModelSpec, prior: PriorLike) -> ConvertedPrior:
    """Return a prior of Hugging Face checkpoints in torchtitan's names and layouts, for `FusedDriftAdamW` and
    `GradientBias`.

    The spec's state-dict adapter converts the deltas (it permutes the rows of Llama's queries and keys), and then the
    model's own loading (it joins `wqkv`). Each delta is read and converted when its parameter is first stepped.

    Args:
        spec: the model's spec.
        prior: a `Prior`, its folder or Hub id, or a mapping from names to deltas.
    """
    layout = _Layout(spec)
    return ConvertedPrior(Prior.of(prior), layout.shapes, layout.convert)


class _Layout:
    """How a torchtitan model holds what Hugging Face checkpoints store."""

    def __init__(self, spec: ModelSpec) -> None:
        assert spec.state_dict_adapter is not None
        with torch.device("meta"):
            model = spec.model.build()
        self._adapter = spec.state_dict_adapter(spec.model, None)
        self._stored = self._adapter.to_hf(model.state_dict())
        self._names = {canonical_name(name): name for name in self._stored}
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._modules = dict(model.named_modules())
        self._tied = getattr(spec.model, "enable_weight_tying", False)
        self.shapes = {canonical_name(name): tuple(tensor.shape) for name, tensor in self._stored.items()}

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From canonical names to live names."""
        given = {self._names[name]: tensor for name, tensor in tensors.items()}
        if self._tied:  # the state-dict adapters expect it
            given.setdefault(_EMBEDDING, self._stored[_EMBEDDING])
        made = {}
        merged: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in self._adapter.from_hf(given).items():
            if name in self._parameters:
                made[name] = tensor
            else:
                path = self._owner(name)
                merged[path][name.removeprefix(f"{path}.")] = tensor
        for path, parts in merged.items():
            module = copy.deepcopy(self._modules[path])
            before = dict(module.named_parameters())
            module.load_state_dict(parts, strict=False, assign=True)
            loaded = ((name, param) for name, param in module.named_parameters() if param is not before[name])
            made.update({f"{path}.{name}": param for name, param in loaded})
        return made

    def _owner(self, name: str) -> str:
        """The innermost module that loads a name that is not a parameter."""
        path = name.rpartition(".")[0]
        while path not in self._modules:
            path = path.rpartition(".")[0]
        return path

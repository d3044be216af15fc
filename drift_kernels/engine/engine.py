"""One step of one rule over the parameters of param groups: check, bind, group by dtype, plan, table, launch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import backends
from ..kernels.coefficients import UNSCALED, GradScale, Hyperparameters, clip_coefficient
from ..kernels.plan import addresses
from ..sharding import Shard, local, local_pairs, place_grads, place_of
from ..state.param_groups import SEED, check_names, named_params
from ..state.precision import MOMENTS, held
from .binding import BoundDelta, PriorBinding
from .hyperparameters import check_capture, check_grad, hyperparameters
from .launches import DeviceBatch, Member, Slot
from .rules import Rule
from .seen import Seen

ParamGroups = list[dict[str, Any]]
States = Mapping[Tensor, dict[str, Any]]


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class StepTensors(NamedTuple):
    """What a step works on, of all parameters.

    Attributes:
        whole: the parameters as their groups and states have them.
        params, grads: what this rank holds of them and of their gradients.
    """

    whole: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor | None]


class Engine:
    """Plans are kept from step to step for as long as they fit: nothing that they depend on has been replaced or moved.
    They keep neither parameters nor states alive. A copy or a pickled engine makes its own.

    Args:
        rule: what is done to each tensor.
        binding: of the prior; None without one.
        backend: "auto" or the name of one.
        max_grad_norm: to which the biased gradients of all parameters together are clipped.

    Attributes:
        batches: those of the last step.
        grad_norm: float64 [], of all biased gradients of the last step, before clipping; None where nothing is clipped.
    """

    def __init__(
        self, rule: Rule, binding: PriorBinding | None, backend: str, max_grad_norm: float | None = None
    ) -> None:
        self.rule = rule
        self.binding = binding
        self.backend = backend
        self.max_grad_norm = max_grad_norm
        self.reset()

    def reset(self) -> None:
        """Forgets the plans; the next step makes them anew."""
        self.batches: list[DeviceBatch] = []
        self.grad_norm: Tensor | None = None
        self._made_for: _MadeFor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("batches", "grad_norm", "_made_for")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.reset()

    def step(
        self, param_groups: ParamGroups, states: States | None = None, grad_scale: GradScale = UNSCALED
    ) -> list[DeviceBatch]:
        """A step of every parameter that has a gradient, called under `torch.no_grad()`. Everything is checked before
        anything changes.

        Args:
            param_groups: with their parameters, the names of these where there is a prior, and hyperparameters.
            states: parameter -> state, made where there is none; for a rule that has states.
            grad_scale: what a GradScaler says.

        Returns the batches that took part, whose figures are of this step: none where the prior does not act and
        nothing else is to be done.
        """
        groups = [hyperparameters(group, index) for index, group in enumerate(param_groups)]
        if self.rule.writes_grads and not any(group.acts for group in groups):
            return []
        if grad_scale.found_inf is not None and not self.rule.counts_on_device:
            self.rule.counts_on_device = True  # the host never reads whether a step was taken
            self.reset()
        tensors = self._tensors(param_groups)
        self.prepare(param_groups, tensors, {} if states is None else states)
        if capturing():
            for index, group in enumerate(param_groups):
                check_capture(group, index)
            for batch in self.batches:
                batch.check_capture()
        for batch in self.batches:
            batch.begin(groups, grad_scale)
        self._set_bias(groups)
        for batch in self.batches:
            batch.run_all(groups)
            # So that autograd sees it: a graph that holds a tensor as it was can no longer be run backward.
            for launch in batch.launches:
                written = tensors.grads if self.rule.writes_grads else tensors.params
                torch.autograd.graph.increment_version(launch.of(written))
            batch.release()
        return self.batches

    def _tensors(self, param_groups: ParamGroups) -> StepTensors:
        members: list[list[Tensor]] = [group["params"] for group in param_groups]
        whole = members[0] if len(members) == 1 else list(chain.from_iterable(members))
        if self.rule.writes_grads:
            place_grads(whole)
        return StepTensors(whole, *local_pairs(whole, list(map(attrgetter("grad"), whole))))

    def prepare(self, param_groups: ParamGroups, tensors: StepTensors, states: States) -> None:
        """Gives the plans their gradients, after making new ones if anything that they depend on has changed."""
        if self._made_for is None or not self._made_for.still(tensors, states, self.batches):
            if capturing():
                raise RuntimeError("the first step on new parameters, states or dtypes must run before it is captured")
            self.batches = self._make(param_groups, tensors.grads, states)
            self._made_for = _MadeFor(tensors, states, self.batches)
        try:
            for batch in self.batches:
                batch.set_grads(tensors.grads)
        except RuntimeError:  # a sparse gradient has no address
            self._check(named_params(param_groups), tensors.grads)
            raise
        for batch in self.batches:
            if batch.backend.READS_TENSORS:
                batch.lend(tensors.whole, states)

    def _check(self, named: list[tuple[str, Tensor]], grads: list[Tensor | None]) -> None:
        for (name, param), grad in zip(named, grads, strict=True):
            if grad is not None:
                self.rule.check(name, param)
                check_grad(name, local(param), grad)

    def _make(self, param_groups: ParamGroups, grads: list[Tensor | None], states: States) -> list[DeviceBatch]:
        """The batches of the parameters that have a gradient, after every check and before any change."""
        named = named_params(param_groups)
        self._check(named, grads)
        present = [(i, *named[i], grad) for i, grad in enumerate(grads) if grad is not None]
        resolved = {param.device: backends.resolve(self.backend, param.device) for _, _, param, _ in present}
        parts = [(name, local(param), Shard.of(param)) for _, name, param, _ in present]
        at_random = [self.rule.at_random(own) for _, own, _ in parts]
        places = [place_of(name, shard, drawn) for (name, _, shard), drawn in zip(parts, at_random, strict=True)]
        bounds: list[BoundDelta | None] = [None] * len(parts)
        if self.binding is not None:
            for index, group in enumerate(param_groups):
                check_names(group, index)
            self.binding.check(named)
            bounds = self.binding.bind(parts)

        group_of = [g for g, group in enumerate(param_groups) for _ in group["params"]]
        members: dict[tuple[torch.device, torch.device, int], list[Member]] = {}
        met: set[int] = set()
        for (i, name, param, grad), (_, own, shard), place, bound in zip(present, parts, places, bounds, strict=True):
            group = param_groups[group_of[i]]
            key = int(group[SEED]) + (i << 32) if self.rule.at_random(own) else None
            state = self.rule.state_of(states, param)
            kinds = own, grad, held("exp_avg", state), None if bound is None else bound.delta
            dtypes = tuple(str(None if kind is None else kind.dtype) for kind in kinds)
            slot = Slot(i, group_of[i], name, dtypes, bound, key, place, shard)
            # A parameter that is given twice steps twice, one after the other.
            where = param.device, self.rule.steps_device(param, group), i if id(param) in met else -1
            met.add(id(param))
            members.setdefault(where, []).append(Member(slot, param, grad.dtype, state))
        return [
            DeviceBatch(those, len(grads), steps_device, self.rule, resolved[device])
            for (device, steps_device, _), those in members.items()
        ]

    def _set_bias(self, groups: list[Hyperparameters]) -> None:
        """Gradient statistics, the prior's coefficients, and clipping, over all devices together."""
        clipping = self.max_grad_norm is not None
        biases = [(batch.coefficients, batch.bias(groups, all_stats=clipping)) for batch in self.batches]
        norm = clip = None
        if self.max_grad_norm is not None and biases:
            squares = [coefficients.biased_norm_squared(c).to(biases[0][1].device) for coefficients, c in biases]
            norm = torch.stack(squares).sum().clamp(min=0).sqrt()
            clip = clip_coefficient(norm, self.max_grad_norm)
        self.grad_norm = norm
        for coefficients, c in biases:
            coefficients.set_gradient_coefficients(c, None if clip is None else clip.to(c.device))


class _MadeFor:
    """What batches were made for: parameters where they were, gradients of their dtypes, states of the same tensors.

    All of it is looked at in every step, so it is mapped in C.
    """

    def __init__(self, tensors: StepTensors, states: States, batches: list[DeviceBatch]) -> None:
        # A parameter lives for as long as its state does, whose key it is.
        self._tensors = Seen(tensors.params, _contents([], states))
        self._key = _key(tensors)
        self._first_states = _first_states(tensors, states, batches)

    def still(self, tensors: StepTensors, states: States, batches: list[DeviceBatch]) -> bool:
        return (
            self._tensors.are(_contents(tensors.params, states))
            and _key(tensors) == self._key
            and _first_states(tensors, states, batches) == self._first_states
        )


_END = object()


def _contents(params: list[Tensor], states: States) -> Iterator[Any]:
    """The parameters, all that the states hold, one after another, and a mark behind the last, which shows where one is
    shorter."""
    return chain(params, chain.from_iterable(map(dict.values, states.values())), (_END,))


def _key(tensors: StepTensors) -> tuple[Any, ...]:
    """Where the parameters are, and of which dtype their gradients are, None for those that have none."""
    dtypes = [None if grad is None else grad.dtype for grad in tensors.grads]
    try:
        return addresses(tensors.params), dtypes
    except RuntimeError:  # a sparse parameter has no address; a frozen one needs none
        return addresses(compress(tensors.params, dtypes)), dtypes


def _first_states(tensors: StepTensors, states: States, batches: list[DeviceBatch]) -> list[int]:
    """Where each launch's first states are: whoever moves states in place (offloading) moves all."""
    firsts = [states[tensors.whole[i]] for batch in batches for i in batch.first_of_launches] if states else []
    return addresses([local(state[key]) for state in firsts for key in MOMENTS if key in state])

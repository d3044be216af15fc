"""A step over all param groups: check, bind deltas, group tensors by dtype, plan, fill the table, launch."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats.rounding import sqrt64
from ..kernels import backends
from ..kernels.coefficients import UNSCALED, GradScale, Hyperparameters, clip_coefficient
from ..kernels.describe import Description, describe, describe_values
from ..sharding import Shard, local, local_pairs, place_grads, place_of
from ..state.param_groups import SEED, TURN, check_names, named_params
from ..state.precision import held
from ..torch_private import makes_fake_tensors
from .binding import BoundDelta, PriorBinding
from .hyperparameters import check_capture, check_grad, check_memory, hyperparameters
from .launches import DeviceBatch, Member, Slot, capturing
from .rules import Rule

ParamGroups = list[dict[str, Any]]
States = dict[Tensor, dict[str, Any]]


class StepTensors(NamedTuple):
    """The tensors of a step, for all parameters.

    Attributes:
        whole: the parameters as in the param groups.
        params, grads: the local tensors of the parameters and of their gradients.
    """

    whole: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor | None]


class Engine:
    """Runs the steps of one update rule.

    Plans are reused from step to step until a tensor that they depend on is replaced or moved. They keep neither
    parameters nor states alive. A copied or unpickled engine makes new ones.

    Args:
        rule: the update rule.
        binding: the binding of the prior; None without one.
        backend: "auto" or the name of a backend.
        max_grad_norm: the norm that the biased gradients of all parameters together are clipped to.

    Attributes:
        batches: the batches of the last step.
        grad_norm: float64 [], the norm of all biased gradients of the last step, before clipping; None without
            clipping.
        turn: the number of steps, less than `refresh`, since the deltas of adapter parameters were renewed.
    """

    def __init__(
        self, rule: Rule, binding: PriorBinding | None, backend: str, max_grad_norm: float | None = None
    ) -> None:
        self.rule = rule
        self.binding = binding
        self.backend = backend
        self.max_grad_norm = max_grad_norm
        self.turn = 0
        self._acting: list[bool] = []  # for each group, whether the prior acted in the last step
        self.reset()

    def reset(self) -> None:
        """Discard the plans; the next step makes new ones."""
        self.batches: list[DeviceBatch] = []
        self.grad_norm: Tensor | None = None
        self._made_for: _Present | None = None  # what the plans were made for

    def keep_turn(self, param_groups: ParamGroups) -> None:
        """Store `turn` in the groups, for a state_dict."""
        if self.binding is not None and self.binding.adapted.refresh > 1:
            for group in param_groups:
                group[TURN] = self.turn

    def resume(self, param_groups: ParamGroups) -> None:
        """Resume from groups and states that have been loaded."""
        self.reset()
        if self.binding is not None:
            self.binding.adapted.forget()
            self.turn = param_groups[0].get(TURN, 0)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("batches", "grad_norm", "_made_for")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.reset()

    def step(
        self, param_groups: ParamGroups, states: States | None = None, grad_scale: GradScale = UNSCALED
    ) -> list[DeviceBatch]:
        """Step every parameter that has a gradient. Call under `torch.no_grad()`. All checks come before any change.

        Args:
            param_groups: parameters, their names if there is a prior, and hyperparameters.
            states: parameter -> state, created if missing; for a rule that has states.
            grad_scale: the values of a GradScaler.

        Returns:
            The batches that took part, with the statistics of this step; an empty list if the rule only biases
            gradients and the prior does not act.
        """
        groups = [hyperparameters(group, index) for index, group in enumerate(param_groups)]
        if self.rule.writes_grads and not any(group.acts for group in groups):
            return []
        if grad_scale.found_inf is not None and not self.rule.counts_on_device:
            self.rule.counts_on_device = True  # so that the host need not know whether a step was taken
            self.reset()
        tensors = self._tensors(param_groups)
        self.prepare(param_groups, tensors, {} if states is None else states)
        self.renew(groups, tensors.params)
        if capturing():
            for index, group in enumerate(param_groups):
                check_capture(group, index)
            for batch in self.batches:
                batch.check_capture()
        self._fill(groups, grad_scale)
        for batch in self.batches:
            for slot in batch.copied:
                slot.copy_in(tensors.whole[slot.index])
            batch.run_all(groups)
            for slot in batch.copied:
                slot.copy_out(tensors.whole[slot.index])
            # Tell autograd of the change: a graph that saved one of these tensors can no longer run backward.
            for launch in batch.launches:
                written = tensors.grads if self.rule.writes_grads else tensors.params
                torch.autograd.graph.increment_version(launch.of(written))
            batch.release()
        return self.batches

    def biased_names(self) -> list[str]:
        """The names of the parameters that the prior acted on in the last step."""
        slots = [batch.slots[row] for batch in self.batches for row in batch.biased]
        return [slot.name for slot in slots if self._acting[slot.group]]

    def _tensors(self, param_groups: ParamGroups) -> StepTensors:
        members: list[list[Tensor]] = [group["params"] for group in param_groups]
        whole = members[0] if len(members) == 1 else list(chain.from_iterable(members))
        if self.rule.writes_grads:
            place_grads(whole)
        return StepTensors(whole, *local_pairs(whole, list(map(attrgetter("grad"), whole))))

    def make_states(self, param_groups: ParamGroups, states: States) -> None:
        """Create the states of all parameters that have a gradient, with what the prior keeps in them."""
        if self.binding is not None and self.binding.keeps_in_states:
            self.prepare(param_groups, self._tensors(param_groups), states)
            for batch in self.batches:
                batch.release()
        for _, param in named_params(param_groups):
            if param.grad is not None:
                self.rule.state_of(states, param)

    def prepare(self, param_groups: ParamGroups, tensors: StepTensors, states: States) -> None:
        """Give the plans their gradients. Make new plans first, if anything that they depend on has changed."""
        present = _Present.of(tensors, states)
        if self._made_for is None or not present.fits(self._made_for):
            if capturing():
                raise RuntimeError("run a step before capturing one: its parameters, states or dtypes are new")
            self.batches = self._make(param_groups, tensors.grads, states)
            self._made_for = present = _Present.of(tensors, states)
        for batch in self.batches:
            batch.set_grads(tensors.grads, present.grads)
            if batch.backend.READS_TENSORS:
                batch.lend(tensors.whole, states)

    def renew(self, groups: list[Hyperparameters], params: list[Tensor]) -> None:
        """Renew the deltas that depend on the parameters, in groups where the prior acts; those of adapters in every
        `refresh`-th such step. `params`: the local tensors of all parameters."""
        self._acting = [group.acts for group in groups]
        slots = [batch.slots[row] for batch in self.batches for row in batch.renewed]
        acting = {
            slot.name: (params[slot.index], groups[slot.group].moves_params)
            for slot in slots
            if groups[slot.group].acts
        }
        if self.binding is None or not acting:
            return
        adapted = self.binding.adapted
        if capturing() and adapted.refresh > 1:
            raise RuntimeError(
                f"a CUDA graph can renew deltas only in every replay: refresh must be 1, got {adapted.refresh}"
            )
        with_norms = self.max_grad_norm is not None or any(group.needs_stats for group in groups)
        self.binding.renew(acting, due=self.turn == 0, with_norms=with_norms)
        self.turn = (self.turn + 1) % adapted.refresh
        for batch in self.batches:
            batch.take_norms(groups)

    def _check(self, named: list[tuple[str, Tensor]], grads: list[Tensor | None]) -> None:
        for (name, param), grad in zip(named, grads, strict=True):
            if grad is not None:
                self.rule.check(name, param)
                check_memory(f"parameter {name}", local(param))
                check_grad(name, local(param), grad)

    @torch.inference_mode(False)
    def _make(self, param_groups: ParamGroups, grads: list[Tensor | None], states: States) -> list[DeviceBatch]:
        """Make the batches of the parameters that have a gradient, after all checks and before any change."""
        if makes_fake_tensors():
            raise RuntimeError("step() does not run under FakeTensorMode: states would have no memory")
        named = named_params(param_groups)
        self._check(named, grads)
        present = [(i, *named[i], grad) for i, grad in enumerate(grads) if grad is not None]
        for _, name, param, _ in present:
            self.rule.check_state(name, states, param)
        resolved = {param.device: backends.resolve(self.backend, param.device) for _, _, param, _ in present}
        parts = [(name, local(param), Shard.of(param)) for _, name, param, _ in present]
        at_random = [self.rule.at_random(own) for _, own, _ in parts]
        places = [place_of(name, shard, drawn) for (name, _, shard), drawn in zip(parts, at_random, strict=True)]
        bounds: list[BoundDelta | None] = [None] * len(parts)
        if self.binding is not None:
            for index, group in enumerate(param_groups):
                check_names(group, index)
            self.binding.check(named)
            self.binding.adapted.check_params((name, param) for _, name, param, _ in present)
            bounds = self.binding.bind(parts)

        group_of = [g for g, group in enumerate(param_groups) for _ in group["params"]]
        members: dict[tuple[torch.device, torch.device, int], list[Member]] = {}
        met: set[int] = set()
        for (i, name, param, grad), (_, own, shard), drawn, place, bound in zip(
            present, parts, at_random, places, bounds, strict=True
        ):
            group = param_groups[group_of[i]]
            key = int(group[SEED]) + (i << 32) if drawn else None
            state = self.rule.state_of(states, param)
            if self.binding is not None and bound is not None and self.rule.advances:
                bound = self.binding.keep(name, param, state)
            kinds = own, grad, held("exp_avg", state), None if bound is None else bound.delta
            dtypes = tuple(str(None if kind is None else kind.dtype) for kind in kinds)
            copy = None if self.rule.writes_grads or own.is_contiguous() else own.detach().contiguous()
            slot = Slot(i, group_of[i], name, dtypes, bound, key, place, shard, copy)
            # A parameter that is passed twice steps twice, one after the other.
            where = param.device, self.rule.steps_device(param, group), i if id(param) in met else -1
            met.add(id(param))
            members.setdefault(where, []).append(Member(slot, param, grad.dtype, state))
        return [
            DeviceBatch(those, len(grads), steps_device, self.rule, resolved[device])
            for (device, steps_device, _), those in members.items()
        ]

    def _fill(self, groups: list[Hyperparameters], grad_scale: GradScale) -> None:
        """Count the step and fill its coefficients: by the backend if possible, otherwise with coefficients.py. One
        launch of the backend cannot compute a norm over several batches."""
        together = self.max_grad_norm is not None and len(self.batches) > 1
        if not together and all(batch.can_fill(groups) for batch in self.batches):
            norms = [batch.fill(groups, grad_scale, self.max_grad_norm) for batch in self.batches]
            self.grad_norm = norms[0] if norms else None
            return
        for batch in self.batches:
            batch.begin(groups, grad_scale)
        self._set_bias(groups)

    def _set_bias(self, groups: list[Hyperparameters]) -> None:
        """Compute gradient statistics, the prior's coefficients and clipping, over all devices together."""
        clipping = self.max_grad_norm is not None
        biases = [(batch.coefficients, batch.bias(groups, all_stats=clipping)) for batch in self.batches]
        norm = clip = None
        if self.max_grad_norm is not None and biases:
            squares = [coefficients.biased_norm_squared(c).to(biases[0][1].device) for coefficients, c in biases]
            norm = sqrt64((squares[0] if len(squares) == 1 else torch.stack(squares).sum()).clamp(min=0))
            clip = clip_coefficient(norm, self.max_grad_norm)
        self.grad_norm = norm
        for coefficients, c in biases:
            coefficients.set_gradient_coefficients(c, None if clip is None else clip.to(c.device))


class _Present(NamedTuple):
    """The tensors of a step, described anew in every step, so that no kernel gets memory that was freed or reused."""

    params: Description
    states: Description
    grads: Description

    @classmethod
    def of(cls, tensors: StepTensors, states: States) -> _Present:
        return cls(describe(tensors.params, exact=True), describe_values(states), describe(tensors.grads))

    def fits(self, before: _Present) -> bool:
        """Whether plans made for `before` are still valid. Gradients may have other addresses and strides."""
        return self[:2] == before[:2] and self.grads.facts == before.grads.facts

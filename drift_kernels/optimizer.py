"""FusedDriftAdamW: torch.optim.AdamW with a prior, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from .engine.backward import StepInBackward
from .engine.binding import BoundDelta, PriorBinding, PriorLike
from .engine.eager import not_compiled
from .engine.figures import Inspection
from .engine.hyperparameters import (
    FINGERPRINT,
    SEED,
    check_capture,
    check_grad,
    check_param,
    check_seed,
    hyperparameters,
)
from .engine.launches import BatchCache, DeviceBatch, Slot
from .errors import PriorError
from .kernels import backends
from .kernels.coefficients import GradScale, Hyperparameters, clip_coefficient
from .prior import Prior
from .sharding import Shard, local, local_pairs, place_of
from .state.masters import Masters
from .state.precision import Precision, float32_state
from .state.state_dict import check_state_dict, only_asks_for_states, restore_states


def _capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class FusedDriftAdamW(Inspection, Masters, StepInBackward, Optimizer):
    """AdamW with decoupled weight decay whose gradient is biased by a prior; without a prior, a fast drop-in for
    `torch.optim.AdamW`.

    One pass over memory reads param, grad, delta and the states and writes param and states; scalings that need the
    gradient's norm, and clipping, add one read-only pass. Formulas: `coefficients.py` and `reference.py`; bits:
    docs/numerics.md.

    Args:
        params: parameters, or groups of them, as `torch.optim.AdamW` takes; named ones (`model.named_parameters()`)
            with a prior. Each contiguous, float32, bfloat16 or float16, its gradient of its own dtype or float32;
            DTensors too (docs/distributed.md).
        lr: learning rate, a number or a tensor of one element.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; acts in float32, before the one rounding of the parameter.
        prior: a `Prior`, the folder of one, or a mapping from parameter names to deltas; bound by name.
        alpha: strength of the prior; positive pulls toward the expert. A schedule may change it (`AlphaScheduler`);
            at 0 the step is plain AdamW.
        prior_scaling: "absolute", "gradnorm", "adaptive_cosine" or "decoupled" (docs/method.md).
        normalize_to_param: with "absolute", rescale each delta to norm(W): of the base checkpoint, or, for a mapping,
            of the parameter when it is first stepped.
        prior_device: "cpu" leaves the deltas of CUDA parameters in pinned host memory, where the kernels read them in
            every step; None moves each to its parameter's device.
        max_grad_norm: clip the biased gradient of all parameters together to this norm, inside the step; `math.inf`
            only measures it. Leave None when the trainer clips.
        state_dtype: of exp_avg and exp_avg_sq, float32, bfloat16, or int8: codes of one byte with a scale for each 128
            elements (formats/blocks.py), for parameters of 4096 elements or more.
        rounding: "nearest", or "stochastic" for bfloat16 parameters (without masters) and states.
        seed: of the stochastic rounding, in [0, 2^32); the state_dict carries it.
        master_weights: a bfloat16 parameter and 16 bits more (the state `param_residual`) are a float32 that is updated
            exactly as a float32 parameter would be; the parameter is its nearest bfloat16.
        maximize: ascend the objective. The prior still pulls toward the expert.
        capturable: a CUDA graph may hold the step. Step counts are kept on the parameters' device, and an lr or alpha
            that is a tensor there is read in every replay (schedulers fill it in place); one that is a number stays
            what it was at the capture. The first step must run before the capture.
        backend: "auto" or the name of one.

    lr, betas, eps, weight_decay, alpha, prior_scaling, normalize_to_param and maximize are per param group and may
    change between steps.

    A NaN or Inf in a gradient behaves as in `torch.optim.AdamW`: it reaches that element's states and parameter. A
    tensor whose gradient norm is not finite takes no bias that depends on the norm in that step; with
    `max_grad_norm`, a NaN norm makes every element NaN, as `torch.nn.utils.clip_grad_norm_` does.

    A `torch.amp.GradScaler` may hold the step: `scaler.step(optimizer)` unscales inside the pass (gradients keep their
    scale; `max_grad_norm` and `grad_norm` are of the unscaled ones), and where a gradient is not finite the device
    leaves parameters, states and step counts as they are. From then on step counts are on the parameters' device.

    Raises:
        TypeError, ValueError: a hyperparameter or a parameter of a wrong type, value, dtype or layout; named in the
            message.
        PriorError: a prior without names to bind by; a damaged prior (PriorFormatError); one that matches no parameter,
            or matches by name but not by shape (PriorMismatchError).
        BackendUnavailableError: a backend asked for by name cannot run here.
    """

    _step_supports_amp_scaling = True  # GradScaler.step then leaves `grad_scale` and `found_inf` on the optimizer
    _counts_on_device = False  # whether a GradScaler, whose found_inf the host never reads, has been met

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        prior: PriorLike | None = None,
        alpha: float = 1.0,
        prior_scaling: str = "adaptive_cosine",
        normalize_to_param: bool = False,
        prior_device: str | torch.device | None = None,
        max_grad_norm: float | None = None,
        state_dtype: torch.dtype | str = torch.float32,
        rounding: str = "nearest",
        seed: int = 0,
        master_weights: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        backend: str = "auto",
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")
        backends.check_name(backend)
        self.precision = Precision.of(state_dtype, rounding, master_weights)
        self.max_grad_norm = max_grad_norm
        self.backend = backend
        self._binding = None if prior is None else PriorBinding.of(prior, prior_device)
        self._reset()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "prior_scaling": prior_scaling,
            "normalize_to_param": normalize_to_param,
            "maximize": maximize,
            "capturable": capturable,
            SEED: seed,
            FINGERPRINT: self.prior_fingerprint,
        }
        super().__init__(params, defaults)
        backends.check_devices(backend, self._params())
        if self._binding is not None:
            self._binding.check(self._named_params())

    # What the optimizer is made of

    @property
    def prior(self) -> Prior | None:
        return None if self._binding is None else self._binding.prior

    @property
    def prior_fingerprint(self) -> str | None:
        return None if self.prior is None else self.prior.fingerprint

    def _params(self) -> list[Tensor]:
        return list(chain.from_iterable([group["params"] for group in self.param_groups]))

    def _named_params(self) -> list[tuple[str, Tensor]]:
        """Every parameter with its name, or with its position where the groups have no names."""
        return [
            (names[i] if names else f"{i} of group {g}", p)
            for g, group in enumerate(self.param_groups)
            for names in [group.get("param_names")]
            for i, p in enumerate(group["params"])
        ]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `torch.optim.Optimizer`; the group is checked and left out if it is wrong."""
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        try:
            hyperparameters(group, index)
            check_seed(group, index)
            names = group.get("param_names")
            if self._binding is not None and names is None:
                raise PriorError(
                    "a prior is bound by parameter names, and these parameters have none: "
                    f"pass model.named_parameters() (group {index})"
                )
            for i, param in enumerate(group["params"]):
                name = names[i] if names else f"{i} of group {index}"
                check_param(name, local(param))
                self.precision.check_param(name, param)
        except Exception:
            del self.param_groups[index]
            raise
        self._reset()

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Everything is checked before anything changes. Returns the closure's loss, if there is one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @not_compiled
    def _step(self) -> None:
        grad_scale = GradScale(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        if self._in_backward is not None:
            self._in_backward.finish(grad_scale)
            return
        if grad_scale.found_inf is not None and not self._counts_on_device:
            self._counts_on_device = True
            self._cache.clear()
        params = self._params()
        local_params, grads = local_pairs(params, list(map(attrgetter("grad"), params)))
        if not self.state and not _capturing() and only_asks_for_states(self.param_groups, grads):
            for param, grad in zip(params, grads, strict=True):
                if grad is not None:
                    self._state_of(param)
            return
        groups = [hyperparameters(group, index) for index, group in enumerate(self.param_groups)]
        self._set_grads(local_params, grads)
        if _capturing():
            for index, group in enumerate(self.param_groups):
                check_capture(group, index)
            for batch in self._batches:
                batch.check_capture()
        for batch in self._batches:
            batch.advance(groups, grad_scale)
        self._set_bias(groups)
        for batch in self._batches:
            batch.update(groups)
            batch.release_grads()

    def _set_bias(self, groups: list[Hyperparameters]) -> None:
        """Gradient statistics, the prior's coefficients, and clipping, over all devices together."""
        clipping = self.max_grad_norm is not None
        biases = [(batch.coefficients, batch.bias(groups, all_stats=clipping)) for batch in self._batches]
        norm = clip = None
        if self.max_grad_norm is not None and biases:
            squares = [coefficients.biased_norm_squared(c).to(biases[0][1].device) for coefficients, c in biases]
            norm = torch.stack(squares).sum().clamp(min=0).sqrt()
            clip = clip_coefficient(norm, self.max_grad_norm)
        self._grad_norm = norm
        for coefficients, c in biases:
            coefficients.set_gradient_coefficients(c, None if clip is None else clip.to(c.device))

    def _set_grads(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        """Gives the plans their gradients, after building new ones if anything that they depend on has changed."""
        if not self._cache.fits(params, grads, self.state.values()):
            if _capturing():
                raise RuntimeError("the first step on new parameters, states or dtypes must run before it is captured")
            self._cache.hold(self._build(grads), params, grads, self.state.values())
        try:
            for batch in self._batches:
                batch.set_grads(grads)
        except RuntimeError:  # a sparse gradient has no address
            self._check(grads)
            raise

    def _reset(self) -> None:
        """Forgets the plans; the next step builds them anew."""
        self._cache = BatchCache()
        self._grad_norm = None

    def _check(self, grads: list[Tensor | None]) -> None:
        for (name, param), grad in zip(self._named_params(), grads, strict=True):
            if grad is not None:
                check_param(name, local(param))
                self.precision.check_param(name, param)
                check_grad(name, local(param), grad)

    def _build(self, grads: list[Tensor | None]) -> list[DeviceBatch]:
        """The batches of the parameters that have a gradient, after every check and before any change."""
        named = self._named_params()
        group_of = [g for g, group in enumerate(self.param_groups) for _ in group["params"]]
        present = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        self._check(grads)
        resolved = {p.device: backends.resolve(self.backend, p.device) for _, p in (named[i] for i, _ in present)}
        parts = {i: (named[i][0], local(named[i][1]), Shard.of(named[i][1])) for i, _ in present}
        places = {i: place_of(name, shard, self.precision.stochastic) for i, (name, _, shard) in parts.items()}
        bounds: dict[int, BoundDelta | None] = {}
        if self._binding is not None:
            self._binding.check(named)
            bounds = dict(zip(parts, self._binding.bind(list(parts.values())), strict=True))

        slots: dict[tuple[torch.device, torch.device], list[Slot]] = {}
        for i, grad in present:
            name, param, shard = parts[i]
            on_device = self._counts_on_device or self.param_groups[group_of[i]]["capturable"]
            steps_device = param.device if on_device else torch.device("cpu")
            key = self.param_groups[group_of[i]][SEED] + (i << 32) if self.precision.stochastic else None
            state = self._state_of(named[i][1])
            slot = Slot(i, group_of[i], name, param, grad.dtype, state, bounds.get(i), key, places[i], shard)
            slots.setdefault((param.device, steps_device), []).append(slot)
        return [
            DeviceBatch(device, members, steps_device, resolved[device])
            for (device, steps_device), members in slots.items()
        ]

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        """The state of a parameter, zeros at its first step."""
        state: dict[str, Any] = self.state[param]
        if not state:
            state.update(self.precision.new_state(param))
        return state

    # Saving and loading

    def state_dict(self, *, dtype: torch.dtype | None = None) -> StateDict:
        """As `torch.optim.Optimizer.state_dict`; with dtype=torch.float32, exp_avg and exp_avg_sq are float32 whatever
        they are held as: for a `torch.optim.AdamW`, or for other precision."""
        if dtype not in (None, torch.float32):
            raise ValueError(f"dtype must be torch.float32 or None, got {dtype}")
        saved = super().state_dict()
        if dtype is not None:
            saved["state"] = {i: float32_state(state) for i, state in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Loads a state_dict of this class or of `torch.optim.AdamW`; states take this optimizer's `state_dtype`.

        Hyperparameters that the state_dict does not have (torch's has no alpha) keep their present values.

        Raises:
            PriorMismatchError: it was saved under another prior than this optimizer's.
            ValueError: its groups, parameters or states do not fit this optimizer's. Nothing has been changed.
        """
        checked = check_state_dict(state_dict, self.param_groups, self.prior_fingerprint)
        # torch casts states to their parameter's dtype; this keeps what it was given, after the user's own hooks.
        given: dict[str, Any] = {}
        hook = self.register_load_state_dict_pre_hook(lambda _, loaded: given.update(loaded))
        try:
            super().load_state_dict(checked)
        finally:
            hook.remove()
        restore_states(self, given, self.precision)
        for group in self.param_groups:
            group[FINGERPRINT] = self.prior_fingerprint
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("precision", "max_grad_norm", "backend", "_binding")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()

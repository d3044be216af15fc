"""FusedDriftAdamW: torch.optim.AdamW with a prior, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from .adapters import AdapterPrior
from .engine.backward import BackwardHandle, attach
from .engine.binding import PriorBinding
from .engine.engine import Engine
from .engine.figures import bias_figures, memory_report
from .engine.hyperparameters import check_max_grad_norm, check_seed, hyperparameters
from .engine.launches import capturing
from .engine.rules import AdamW
from .kernels import backends
from .kernels.coefficients import GradScale
from .kernels.scalings import PriorScaling
from .prior import Prior, PriorLike
from .prior.names import without_wrappers
from .prior.strengths import AlphaLike, Strengths
from .state.masters import master_weight, refresh_masters
from .state.param_groups import FINGERPRINT, SEED, check_names, labels, named_params
from .state.precision import Precision, Rounding, StateDType, float32_state
from .state.state_dict import check_state_dict, only_asks_for_states, restore_states
from .torch_private import grad_scaler_says, not_compiled, unscales_gradients


@unscales_gradients
class FusedDriftAdamW(Optimizer):
    """AdamW with decoupled weight decay whose gradients a prior biases; without a prior, a fast drop-in for
    `torch.optim.AdamW`. The formulas of a step: `docs/api/optimizer.md`.

    Args:
        params: parameters or param groups, as in torch; with a prior, named ones (`model.named_parameters()`). Dense,
            float32, bfloat16 or float16; DTensors too. A gradient has its parameter's dtype or float32; that of a
            float32 parameter may be bfloat16 or float16. Frozen parameters are ignored until they have a gradient.
        lr: learning rate, a number or a tensor of one element.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; applied in float32, before the parameter is rounded.
        prior: a `Prior`, its folder or Hub id, or a mapping from parameter names to deltas; bound by name. For LoRA
            adapters, the result of `lora_prior`.
        alpha: strength of the prior; positive values pull toward the expert, 0 is plain AdamW. `AlphaScheduler` changes
            it over time. A mapping such as `{"re:self_attn": 1.0, "mlp": 0.5}` sets it by pattern: the first that fits
            a delta decides, and a delta that none fits is not used. The groups' alpha is then 1 and multiplies these.
        prior_scaling: "absolute", "gradnorm", "adaptive_cosine" or "decoupled" (`docs/method.md`).
        normalize_to_param: with "absolute", rescale each delta to norm(W): that of the base checkpoint or, for a
            mapping, that of the parameter when it is first stepped.
        anchor: pull along the remaining distance, expert - W for the current W, so that the pull stops at the expert
            (`docs/method.md`). Each parameter then keeps its target in its state (`prior_target`).
        prior_device: "cpu" keeps the deltas of CUDA parameters in pinned host memory, where the kernels read them in
            every step; None moves each to its parameter's device.
        max_grad_norm: clip the biased gradient of all parameters together to this norm, inside the step; `math.inf`
            only measures it. Leave it None if the trainer clips.
        state_dtype: of exp_avg and exp_avg_sq: float32, bfloat16, or int8 (codes, with a float32 scale for each 128
            elements) for parameters of at least 4096 elements. Also "float32", "fp32", "bfloat16", "bf16", "int8".
        rounding: "nearest", or "stochastic" for bfloat16 parameters (without masters) and their states; float32
            parameters then have float32 states. Not for float16.
        seed: of the stochastic rounding, in [0, 2^32); saved in the state_dict.
        master_weights: keep 16 more bits of each bfloat16 parameter (the state `param_residual`): together a float32
            master that is updated exactly as a float32 parameter; the parameter is the nearest bfloat16. Not for
            float16.
        maximize: ascend the objective. The prior still pulls toward the expert.
        capturable: allow the step in a CUDA graph, but not the first one. Step counts are kept on the parameters'
            device. A replay reads an lr or alpha that is a tensor there; a number keeps its value from the capture.
        amsgrad, differentiable, foreach, fused: as in torch; the first two must be False, the others have no effect.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    lr, betas, eps, weight_decay, alpha, prior_scaling, normalize_to_param and maximize are set per param group and may
    change between steps.

    Raises:
        TypeError, ValueError: a hyperparameter or parameter has a wrong type, dtype, layout or value.
        PriorError: there are no names to bind the prior by, it is damaged (`PriorFormatError`), or it matches no
            parameter, only frozen ones, or one by name but not by shape (`PriorMismatchError`).
        BackendUnavailableError: `backend` names one that cannot run here.
    """

    _in_backward: BackwardHandle | None = None

    @not_compiled
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        prior: PriorLike | AdapterPrior | None = None,
        alpha: AlphaLike = 1.0,
        prior_scaling: PriorScaling = "adaptive_cosine",
        normalize_to_param: bool = False,
        anchor: bool = False,
        prior_device: str | torch.device | None = None,
        max_grad_norm: float | None = None,
        state_dtype: torch.dtype | StateDType = torch.float32,
        rounding: Rounding = "nearest",
        seed: int = 0,
        master_weights: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        backend: backends.Name = "auto",
    ) -> None:
        max_grad_norm = check_max_grad_norm(max_grad_norm)
        backends.check_name(backend)
        self.precision = Precision.of(state_dtype, rounding, master_weights)
        group_alpha, strengths = Strengths.split(alpha)
        binding = None if prior is None else PriorBinding.of(prior, prior_device, strengths, bool(anchor))
        self._engine = Engine(AdamW(self.precision), binding, backend, max_grad_norm)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": group_alpha,
            "prior_scaling": prior_scaling,
            "normalize_to_param": normalize_to_param,
            "maximize": maximize,
            "capturable": capturable,
            "amsgrad": amsgrad,
            "differentiable": differentiable,
            "foreach": foreach,
            "fused": fused,
            SEED: seed,
            FINGERPRINT: self.prior_fingerprint,
        }
        super().__init__(params, defaults)
        named = named_params(self.param_groups)
        backends.check_devices(backend, [param for _, param in named if param.requires_grad])
        if binding is not None:
            binding.check(named)

    @property
    def max_grad_norm(self) -> float | None:
        """Norm to which the biased gradient is clipped, or None; may be set between steps."""
        return self._engine.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: float | None) -> None:
        self._engine.max_grad_norm = check_max_grad_norm(max_grad_norm)

    @property
    def backend(self) -> str:
        """Name of the backend, as passed to the constructor."""
        return self._engine.backend

    @property
    def prior(self) -> Prior | None:
        """The bound `Prior`, or None without one."""
        return None if self._engine.binding is None else self._engine.binding.prior

    @property
    def prior_fingerprint(self) -> str | None:
        """The prior's fingerprint, or None without a prior; saved in the state_dict."""
        return None if self.prior is None else self.prior.fingerprint

    @not_compiled
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch. An invalid one raises as in the constructor, and nothing changes."""
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        try:
            hyperparameters(group, index)
            check_seed(group, index)
            if self.prior is not None:
                check_names(group, index)
            for name, param in zip(labels(group, index), group["params"], strict=True):
                if param.requires_grad:
                    self._engine.rule.check(name, param)
        except Exception:
            del self.param_groups[index]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. All checks run before anything changes.

        Returns:
            The loss of the closure, or None without a closure.

        Raises:
            TypeError, ValueError: a gradient or a changed hyperparameter is invalid.
            PriorError: the prior does not fit the parameters, or a delta cannot be read.
            RuntimeError: a CUDA graph captures the step without `capturable=True`; or the optimizer is attached to the
                backward pass, and there is a GradScaler or a gradient that no backward pass has used.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @not_compiled
    def _step(self) -> None:
        grad_scale = GradScale(*grad_scaler_says(self))
        if self._in_backward is not None and self._in_backward.attached:
            self._in_backward.finish(grad_scale)
        elif not self.state and not capturing() and only_asks_for_states(self.param_groups):
            self._engine.make_states(self.param_groups, self.state)
        else:
            self._engine.step(self.param_groups, self.state, grad_scale)
        self._engine.keep_turn(self.param_groups)

    def attach_to_backward(self) -> BackwardHandle:
        """Update each parameter inside the backward pass, as soon as its gradient is complete, and free the gradient.

        The updates are bitwise identical to those of `step()` after the backward pass; `step()` itself then changes
        nothing. Every backward pass is a step, so gradients cannot be accumulated. Details: `docs/api/optimizer.md`.

        Returns:
            A handle, whose `remove()` detaches the optimizer.

        Raises:
            ValueError: `max_grad_norm` is set, or several processes train together.
            RuntimeError: the optimizer is attached already.
        """
        if self._in_backward is not None and self._in_backward.attached:
            raise RuntimeError("the optimizer is already attached to the backward pass: remove() its handle first")
        self._in_backward = attach(self, self._engine)
        return self._in_backward

    @property
    def covered_names(self) -> list[str]:
        """Names of the parameters that the prior covers; raises PriorError if the current ones do not fit it."""
        return [] if self._engine.binding is None else self._engine.binding.covered(self.param_groups)

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of the whole biased gradient before clipping, float64 []; None without `max_grad_norm`."""
        return self._engine.grad_norm

    @property
    def prior_names(self) -> list[str]:
        """Names of the last step's parameters that the prior covers, n of them."""
        return bias_figures(self._engine.batches).names

    @property
    def biased_names(self) -> list[str]:
        """Names of the parameters that the last step biased; their group's alpha was not 0."""
        return self._engine.biased_names()

    @property
    def prior_modules(self) -> list[str]:
        """Module of each of `prior_names` (attn, mlp, norm, embed, head or other)."""
        binding = self._engine.binding
        return [] if binding is None else [binding.module(name) for name in self.prior_names]

    @property
    def prior_cosine(self) -> Tensor | None:
        """cos(g, delta) for each of `prior_names`, float64 [n]; None if the step needed no statistics."""
        return bias_figures(self._engine.batches).cosine

    @property
    def prior_ratio(self) -> Tensor | None:
        """norm(c*delta)/norm(g) for each of `prior_names`, float64 [n]; None as `prior_cosine`."""
        return bias_figures(self._engine.batches).ratio

    def memory_report(self) -> dict[str, float]:
        """Return the memory that the last step worked on, without gradients; empty before the first step.

        Returns:
            Bytes allocated per element of the parameters with a gradient, for "param", "states", "scales" (of codes),
            "param_residual" (masters), "prior" (with what changing deltas are made from) and "total".
        """
        binding = self._engine.binding
        return memory_report(self._engine.batches, 0 if binding is None else binding.nbytes())

    def master_weight(self, param: Tensor) -> Tensor:
        """Return a copy of a parameter's master, float32; before the first step, of the parameter itself.

        Args:
            param: one of this optimizer's parameters.

        Raises:
            ValueError: the optimizer was built without `master_weights=True`.
            KeyError: the parameter is not one of this optimizer's.
        """
        if not self.precision.master_weights:
            raise ValueError("there are no master weights: create the optimizer with master_weights=True")
        if not any(param is own for _, own in named_params(self.param_groups)):
            raise KeyError("the parameter does not belong to this optimizer")
        return master_weight(param, self.state.get(param, {}))

    def refresh_masters(self) -> None:
        """Reset the masters to the parameters. Call it after writing to parameters directly."""
        refresh_masters(self.state.values())

    def state_dict(self, *, dtype: torch.dtype | None = None) -> StateDict:
        """Return the state, as in torch.

        Args:
            dtype: torch.float32 converts exp_avg and exp_avg_sq to float32, for `torch.optim.AdamW` or another
                precision; None keeps them as they are stored; anything else raises ValueError.
        """
        if dtype not in (None, torch.float32):
            raise ValueError(f"dtype must be torch.float32 or None, got {dtype}")
        saved = super().state_dict()
        if dtype is not None:
            saved["state"] = {i: float32_state(state) for i, state in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state_dict of this class or of `torch.optim.AdamW`; states are converted to this optimizer's
        `state_dtype`.

        If both sides have names (`param_names`), states are matched by name, in any order and grouping; names may
        differ by what wrappers add ("module.", "_orig_mod."). A group takes the hyperparameters of the saved group with
        the same parameters, or keeps its own. Without names, matching is by position, as in torch. Hyperparameters that
        were not saved (torch has no alpha) keep their values. Registered hooks run first.

        Raises:
            PriorMismatchError: the state was saved under another prior.
            ValueError: its groups, parameters, names or states do not fit; nothing has changed.
        """
        # torch casts states to their parameter's dtype; this keeps the originals, as the user's own hooks leave them.
        given: dict[str, Any] = {}

        def check(_: Optimizer, loaded: StateDict) -> StateDict:
            given.update(check_state_dict(loaded, self.param_groups, self.prior_fingerprint, without_wrappers))
            return given

        hook = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        restore_states(self, given, self.precision)
        for group in self.param_groups:
            group[FINGERPRINT] = self.prior_fingerprint
        self._engine.resume(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "precision": self.precision, "_engine": self._engine}

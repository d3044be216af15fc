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
    """AdamW with decoupled weight decay whose gradient is biased by a prior; without a prior, a fast drop-in for
    `torch.optim.AdamW`.

    One pass over memory reads param, grad, delta and the states and writes param and states; scalings that need the
    gradient's norm, and clipping, add one read-only pass. Formulas: `coefficients.py` and `reference.py`; bits:
    docs/numerics.md.

    Args:
        params: parameters, or groups of them, as `torch.optim.AdamW` takes; named ones (`model.named_parameters()`)
            with a prior. Each contiguous, float32, bfloat16 or float16, its gradient of its own dtype or float32, of a
            float32 one bfloat16 or float16 too; DTensors too (docs/distributed.md). What needs no gradient is ignored.
        lr: learning rate, a number or a tensor of one element.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; acts in float32, before the one rounding of the parameter.
        prior: a `Prior`, the folder of one, or a mapping from parameter names to deltas; bound by name. For LoRA
            adapters what `drift_kernels.integrations.peft.lora_prior` makes of one.
        alpha: strength of the prior; positive pulls toward the expert. A schedule may change it (`AlphaScheduler`);
            at 0 the step is plain AdamW. Or by pattern, `{"re:self_attn": 1.0, "mlp": 0.5}`: the first that fits
            decides, what none fits is left alone; the groups' alpha is then 1, and multiplies these.
        prior_scaling: "absolute", "gradnorm", "adaptive_cosine" or "decoupled" (docs/method.md).
        normalize_to_param: with "absolute", rescale each delta to norm(W): of the base checkpoint, or, for a mapping,
            of the parameter when it is first stepped.
        anchor: pull by what is left of the way, expert - W as W is now, so that the pull ends where the expert is
            (docs/method.md). Each parameter then has where it is pulled in its state (`prior_target`).
        prior_device: "cpu" leaves the deltas of CUDA parameters in pinned host memory, where the kernels read them in
            every step; None moves each to its parameter's device.
        max_grad_norm: clip the biased gradient of all parameters together to this norm, inside the step; `math.inf`
            only measures it. Leave None when the trainer clips.
        state_dtype: of exp_avg and exp_avg_sq, float32, bfloat16, or int8: codes of one byte with a scale for each 128
            elements (formats/blocks.py), for parameters of 4096 elements or more. Also "float32", "fp32", "bfloat16",
            "bf16", "int8".
        rounding: "nearest", or "stochastic" for bfloat16 parameters (without masters) and their states; float32
            parameters have float32 states then. Not for float16.
        seed: of the stochastic rounding, in [0, 2^32); the state_dict carries it.
        master_weights: a bfloat16 parameter and 16 bits more (the state `param_residual`) are a float32 that is updated
            exactly as a float32 parameter would be; the parameter is its nearest bfloat16. float32 parameters need
            none. Not for float16.
        maximize: ascend the objective. The prior still pulls toward the expert.
        capturable: a CUDA graph may hold the step. Step counts are kept on the parameters' device, and an lr or alpha
            that is a tensor there is read in every replay (schedulers fill it in place); one that is a number stays
            what it was at the capture. The first step must run before the capture.
        amsgrad, differentiable, foreach, fused: torch.optim.AdamW's; the first two must be False, the others are idle.
        backend: "auto" or the name of one.

    lr, betas, eps, weight_decay, alpha, prior_scaling, normalize_to_param and maximize are per param group and may
    change between steps.

    A NaN or Inf in a gradient behaves as in `torch.optim.AdamW`: it reaches that element's states and parameter. A
    tensor whose gradient norm is not finite takes no bias that depends on the norm in that step; with
    `max_grad_norm`, a NaN norm makes every element NaN, as `torch.nn.utils.clip_grad_norm_` does.

    A `torch.amp.GradScaler` may hold the step: `scaler.step(optimizer)` unscales inside the pass (gradients keep their
    scale, where `torch.optim.AdamW(fused=True)` leaves them unscaled; `max_grad_norm` and `grad_norm` are of the
    unscaled ones), and where a gradient is not finite the device leaves parameters, states and step counts as they are.
    From then on step counts are on the parameters' device.

    Raises:
        TypeError, ValueError: a hyperparameter or a parameter of a wrong type, value, dtype or layout; named in the
            message.
        PriorError: a prior without names to bind by; a damaged prior (PriorFormatError); one that matches no parameter,
            only frozen ones, or one by name but not by shape (PriorMismatchError).
        BackendUnavailableError: a backend asked for by name cannot run here.
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
        """May be set between steps."""
        return self._engine.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: float | None) -> None:
        self._engine.max_grad_norm = check_max_grad_norm(max_grad_norm)

    @property
    def backend(self) -> str:
        return self._engine.backend

    @property
    def prior(self) -> Prior | None:
        return None if self._engine.binding is None else self._engine.binding.prior

    @property
    def prior_fingerprint(self) -> str | None:
        return None if self.prior is None else self.prior.fingerprint

    @not_compiled
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `torch.optim.Optimizer`; the group is checked and left out if it is wrong."""
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
        grad_scale = GradScale(*grad_scaler_says(self))
        if self._in_backward is not None and self._in_backward.attached:
            self._in_backward.finish(grad_scale)
        elif not self.state and not capturing() and only_asks_for_states(self.param_groups):
            self._engine.make_states(self.param_groups, self.state)
        else:
            self._engine.step(self.param_groups, self.state, grad_scale)
        self._engine.keep_turn(self.param_groups)

    def attach_to_backward(self) -> BackwardHandle:
        """From now on `loss.backward()` updates each parameter as soon as its gradient is complete, and sets the
        gradient to None: the memory of all gradients falls to that of the few which are not used yet.

        The updates are those of `step()` after the backward pass, bit for bit. `step()` itself then changes nothing, so
        training loops, trainers and schedulers stay as they are; it raises RuntimeError under a GradScaler, and for a
        gradient that did not come by a backward pass. Every backward pass is a step: gradients cannot be accumulated
        over several. A parameter that is used more than once gets one update (but not under reentrant checkpointing,
        which completes its gradient piece by piece). For the parameters that require gradients now, all of which get
        states at the first pass; it ends with the returned handle's `remove()`.

        Raises:
            ValueError: `max_grad_norm` is set (the norm of all gradients would be known too late), or several processes
                train together, since their gradients are reduced after this.
            RuntimeError: it is attached already.
        """
        if self._in_backward is not None and self._in_backward.attached:
            raise RuntimeError("the optimizer is attached to the backward pass already: remove() its handle first")
        self._in_backward = attach(self, self._engine)
        return self._in_backward

    @property
    def covered_names(self) -> list[str]:
        """The parameters that the prior covers. Raises PriorError if those that there are now do not fit it."""
        return [] if self._engine.binding is None else self._engine.binding.covered(self.param_groups)

    # The last step's figures are on the device: reading one is the only thing that waits.

    @property
    def grad_norm(self) -> Tensor | None:
        """float64 []: norm of the whole biased gradient, before clipping; None unless `max_grad_norm` is set."""
        return self._engine.grad_norm

    @property
    def prior_names(self) -> list[str]:
        """The parameters of the last step that the prior covers, in the order of `prior_cosine` and `prior_ratio`."""
        return bias_figures(self._engine.batches).names

    @property
    def biased_names(self) -> list[str]:
        """The parameters that the last step biased: those of `prior_names` whose group's alpha was not 0."""
        return self._engine.biased_names()

    @property
    def prior_modules(self) -> list[str]:
        """The module of each of `prior_names`: attn, mlp, norm, embed, head or other."""
        binding = self._engine.binding
        return [] if binding is None else [binding.module(name) for name in self.prior_names]

    @property
    def prior_cosine(self) -> Tensor | None:
        """float64 [len(prior_names)]: cos(g, delta); None if the step needed no gradient statistics."""
        return bias_figures(self._engine.batches).cosine

    @property
    def prior_ratio(self) -> Tensor | None:
        """float64 [len(prior_names)]: norm(c*delta)/norm(g); None if the step needed no gradient statistics."""
        return bias_figures(self._engine.batches).ratio

    def memory_report(self) -> dict[str, float]:
        """Bytes per parameter of what the last step worked on, by kind and in all ("total"), without the gradients.

        "param", "states", "scales" (of codes), "param_residual" (the other halves of masters) and "prior" (also what
        deltas that change are made of: those of weights, projected onto adapters, or targets); as allocated, over the
        elements of the parameters that had a gradient. Empty before the first step.
        """
        binding = self._engine.binding
        return memory_report(self._engine.batches, 0 if binding is None else binding.nbytes())

    def master_weight(self, param: Tensor) -> Tensor:
        """The float32 master of a parameter, in memory of its own: of the parameter itself before the first step.

        Raises ValueError without master weights, and KeyError for a parameter that is not this optimizer's.
        """
        if not self.precision.master_weights:
            raise ValueError("there are no masters: the optimizer was built without master_weights=True")
        if not any(param is own for _, own in named_params(self.param_groups)):
            raise KeyError("the parameter is not one of this optimizer's")
        return master_weight(param, self.state.get(param, {}))

    def refresh_masters(self) -> None:
        """Makes the parameters as they are the masters: to be called after writing to parameters directly."""
        refresh_masters(self.state.values())

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

        Where both have names (`param_names`), a state reaches the parameter of its name, in whatever order and groups
        they come; a group then has the hyperparameters of the saved group of the same parameters, and keeps its own if
        there is none. Names differ by what wrappers add ("module.", "_orig_mod.") at most. Without names on one side
        it goes by position, as in torch. Hooks that were registered see the state_dict first.

        Raises:
            PriorMismatchError: it was saved under another prior than this optimizer's.
            ValueError: its groups, parameters, their names or states do not fit this optimizer's. Nothing has been
                changed.
        """
        # torch casts states to their parameter's dtype; this keeps what it was given, after the user's own hooks.
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

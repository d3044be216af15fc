"""The scalars of a step: scaling modes, clipping, bias corrections. They are computed here and nowhere else.

A `CoefficientTable` holds one row per tensor, so tensors of different param groups, steps and scalings share a
launch. All arithmetic is float64 on vectors of length n, on the device without host syncs, and rounded once to the
float32 table that the kernels read.

This is the specification. A backend with `fill_coefficients` has a kernel that is bitwise identical to it (filling.py).
So every operation here is rounded separately (no addcmul), powers are those of counts.py, and sums have a fixed order.

With g the gradient of the descent direction (negated by `maximize`), delta the prior's delta, c the prior's
coefficient (scalings.py) and k the clip coefficient:

    g'   = g - c*delta                                     the biased gradient
    g"   = k*g'                                            what AdamW sees

The clip coefficient is computed from the same sums, norm(g')^2 = norm(g)^2 - 2 c <g, delta> + c^2 norm(delta)^2, over
all tensors. Gradients scaled by a GradScaler are not rewritten: 1/scale is folded into their coefficients and the sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats.rounding import sqrt64
from .counts import counts_of
from .scalings import SCALINGS

# As in torch.nn.utils.clip_grad_norm_, which divides by norm + 1e-6.
CLIP_EPSILON = 1e-6

# The number of threads that sum the rows in csrc/cuda/coefficients.h (kFillThreads there).
LANES = 512


class Coefficients(NamedTuple):
    """One row of the table, in the order of struct Coefficients in csrc/table.h: float32 tensors of shape []."""

    grad_coef: Tensor
    delta_coef: Tensor
    delta_step: Tensor
    decay: Tensor
    beta1: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    step_size: Tensor
    inv_sqrt_bc2: Tensor
    eps: Tensor
    step: Tensor


FIELDS = {name: index for index, name in enumerate(Coefficients._fields)}


class Hyperparameters(NamedTuple):
    """The hyperparameters of a param group. `alpha` is 0 without a prior.

    lr and alpha may be tensors of one element on the device, which are read there without a host sync.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    alpha: float | Tensor
    scaling: str
    normalize_to_param: bool

    def must_be_written(self, before: Hyperparameters | None) -> bool:
        """Whether the device, which holds the values of `before`, may be out of date. Tensors may change in place."""
        return before is None or self._has_tensors or before._has_tensors or self != before

    @property
    def _has_tensors(self) -> bool:
        return isinstance(self.lr, Tensor) or isinstance(self.alpha, Tensor)

    @property
    def acts(self) -> bool:
        """Whether the prior may have an effect, as far as the host can tell."""
        return isinstance(self.alpha, Tensor) or self.alpha != 0

    @property
    def biases_gradients(self) -> bool:
        return self.acts and SCALINGS[self.scaling].biases_gradients

    @property
    def moves_params(self) -> bool:
        """Whether the prior moves parameters rather than gradients."""
        return SCALINGS[self.scaling].decoupled != 0

    @property
    def needs_stats(self) -> bool:
        """Whether the bias depends on the gradient's norm."""
        return self.acts and SCALINGS[self.scaling].needs_stats


class GradScale(NamedTuple):
    """What a `torch.amp.GradScaler` reports of a step's gradients: numbers, or tensors of one element on any device.

    Attributes:
        scale: the scale of the gradients; None for 1.
        found_inf: nonzero if a gradient is not finite, so that the step must be skipped; None for 0.
    """

    scale: Tensor | float | None
    found_inf: Tensor | float | None

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return 1/scale, float64 [], and whether the step is taken, bool []; None for 1 and for True. There is no host
        sync, except for CPU tensors."""

        def moved(value: Tensor | float | None) -> Tensor | None:
            if value is None:
                return None
            # A copy to the host must finish before it is used; a copy to a GPU is ordered by the stream.
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device=device)
            return tensor.detach().to(device, torch.float64, non_blocking=device.type != "cpu").reshape(())

        scale, found_inf = moved(self.scale), moved(self.found_inf)
        return None if scale is None else 1 / scale, None if found_inf is None else found_inf == 0


UNSCALED = GradScale(None, None)


class Row(NamedTuple):
    """The hyperparameters of one tensor, in float64. `normalized` replaces `absolute` if it is rescaled to norm(W)."""

    lr: float | Tensor
    weight_decay: float
    beta1: float
    beta2: float
    sign: float
    alpha: float | Tensor
    absolute: float
    normalized: float
    by_ratio: float
    by_cosine: float
    decoupled: float

    @classmethod
    def of(cls, h: Hyperparameters) -> Row:
        scaling = SCALINGS[h.scaling]
        return cls(
            lr=h.lr,
            weight_decay=h.weight_decay,
            beta1=h.beta1,
            beta2=h.beta2,
            sign=-1.0 if h.maximize else 1.0,
            alpha=h.alpha,
            absolute=0.0 if h.normalize_to_param else scaling.absolute,
            normalized=scaling.absolute if h.normalize_to_param else 0.0,
            by_ratio=scaling.by_ratio,
            by_cosine=scaling.by_cosine,
            decoupled=scaling.decoupled,
        )


def _fixed(h: Hyperparameters) -> dict[str, float]:
    """The coefficients that do not change from step to step."""
    return {
        "beta1": h.beta1,
        "one_minus_beta1": 1 - h.beta1,
        "beta2": h.beta2,
        "one_minus_beta2": 1 - h.beta2,
        "eps": h.eps,
    }


class OrderedSum:
    """The sum of n numbers, float64, in a fixed order: number r is added to lane r % 512, then the upper half of the
    lanes to the lower half, until one is left. (Fewer numbers use fewer lanes: the others would only add zeros.)

    Attributes:
        addends: [n], to be filled before each `total`, which overwrites them.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        width = min(LANES, 1 << (n - 1).bit_length())
        lanes = torch.zeros(-(-n // width), width, dtype=torch.float64, device=device)
        self.addends = lanes.view(-1)[:n]
        self._total = lanes[0, 0]
        added: Any = lanes.numpy() if device.type == "cpu" else lanes  # numpy calls have less overhead
        self._additions = [(added[0], row) for row in added[1:]]
        while width > 1:
            width //= 2
            self._additions.append((added[0, :width], added[0, width : 2 * width]))

    def total(self) -> Tensor:
        """Return the sum as a new tensor of shape []."""
        for lower, upper in self._additions:
            lower += upper
        return self._total.clone()


class CoefficientTable:
    """The coefficients of n tensors on one device.

    Args:
        device: where the kernels read the table.
        steps: float32 [n], the number of steps that each tensor has taken; advanced in place.
        delta_norms: norm(delta) of each tensor; 0 if it has no delta.
        param_norms: norm(W) of each tensor, for `normalize_to_param`; ignored if it has no delta.
        alphas: a factor for each tensor, by which the alpha of its group is multiplied; None for 1.
        alphas_change: whether `set_alphas` will be called.
    """

    def __init__(
        self,
        device: torch.device,
        steps: Tensor,
        delta_norms: list[float],
        param_norms: list[float],
        alphas: list[float] | None = None,
        alphas_change: bool = False,
    ) -> None:
        n = len(delta_norms)
        self.steps = steps
        self.table = torch.zeros(n, len(FIELDS), dtype=torch.float32, device=device)
        self.stats = torch.zeros(n, 2, dtype=torch.float64, device=device)
        self.prior_cosine: Tensor | None = None
        self.prior_ratio: Tensor | None = None
        self.delta_norm = torch.tensor(delta_norms, dtype=torch.float64, device=device)
        self.inv_delta_norm = torch.where(self.delta_norm > 0, self.delta_norm.reciprocal(), 0.0)
        self.norm_ratio = torch.tensor(param_norms, dtype=torch.float64, device=device) * self.inv_delta_norm
        same = alphas is None or all(alpha == 1 for alpha in alphas)
        constant = same and not alphas_change
        self.factor = None if constant else torch.tensor(alphas or [1.0] * n, dtype=torch.float64, device=device)
        self._one = torch.ones((), dtype=torch.float64, device=device)
        self._constant = torch.zeros(n, dtype=torch.float64, device=device)  # the part of c that needs no statistics
        # The table of hyperparameters is stored by column, that of the kernels by row. Their columns, by name:
        self._rows = torch.zeros(len(Row._fields), n, dtype=torch.float64, device=device)
        self._of: Any = Row._make(self._rows)
        self._alpha: Any = self._of.alpha  # times `factor`
        self._out = Coefficients._make(self.table.unbind(1))
        self._counts = counts_of(steps, device)
        self._sum: OrderedSum | None = None
        self._written: Tensor | None = None  # the prior's coefficients in the table, if unclipped and unscaled
        self._inv_scale: Tensor | None = None  # 1/scale of this step's gradients
        self._sums = self.stats  # `stats` without the scale
        self._along = self._pull = self._constant  # <g, delta> and norm(c*delta)
        self._stale = True  # whether hyperparameters have been set since the last `refresh`

    def set_delta_norms(self, rows: Tensor, norms: Tensor) -> None:
        """Set norm(delta) of these rows (int64 [m], norms float64 [m]), whose deltas have been renewed. The factors of
        `normalize_to_param` do not change."""
        self.delta_norm.index_copy_(0, rows, norms)
        self.inv_delta_norm.index_copy_(0, rows, torch.where(norms > 0, norms.reciprocal(), 0.0))

    def set_alphas(self, rows: Tensor, alphas: Tensor) -> None:
        """Set the factors of alpha of these rows (int64 [m], alphas float64 [m])."""
        assert self.factor is not None
        self.factor.index_copy_(0, rows, alphas)
        self._stale = True

    def set_hyperparameters(self, rows: slice, h: Hyperparameters, before: Hyperparameters | None = None) -> None:
        """Write the hyperparameters of these rows that differ from `before` or are tensors.

        Each takes one write that a CUDA graph can capture: a copy on the device for a tensor, a fill for a number.
        """
        held = {} if before is None else {**Row.of(before)._asdict(), **_fixed(before)}
        for columns, values in ((self._of, Row.of(h)._asdict()), (self._out, _fixed(h))):
            for name, value in values.items():
                if isinstance(value, Tensor) or isinstance(held.get(name), Tensor) or held.get(name) != value:
                    getattr(columns, name)[rows] = value
        if before is None or (before.beta1, before.beta2) != (h.beta1, h.beta2):
            self._counts.set_betas(rows, h.beta1, h.beta2)
        self._stale = True

    def forget_written(self) -> None:
        """Note that other code has written to the table: set all hyperparameters before the next `advance`."""
        self._written = None

    def refresh(self) -> None:
        """Fill the coefficients that depend on newly set hyperparameters alone."""
        if self._stale:
            torch.sub(self._one, self._of.lr * self._of.weight_decay, out=self._out.decay)
            if self.factor is not None:
                self._alpha = self._of.alpha * self.factor
            torch.mul(self._of.lr * self._alpha, self._of.decoupled, out=self._out.delta_step)
            self._constant = self._alpha * (self._of.absolute + self._of.normalized * self.norm_ratio)
            self._stale = False

    def advance(self, grad_scale: GradScale = UNSCALED) -> None:
        """Count one more step, if it is taken, and fill what depends on the count and on newly set hyperparameters.

        With a `found_inf`, `steps` should be on the device; otherwise this costs a host sync.
        """
        self.refresh()
        self._inv_scale, taken = grad_scale.on(self._rows.device)
        self.steps += 1 if taken is None else taken.to(self.steps.device)
        bc1, inv_sqrt_bc2, steps = self._counts.corrections()
        torch.div(self._of.lr, bc1, out=self._out.step_size)
        self._out.inv_sqrt_bc2.copy_(inv_sqrt_bc2)
        self._out.step.copy_(steps if taken is None else steps * taken)

    def bias(self, with_stats: bool) -> Tensor:
        """Return the prior's coefficients c, float64 [n], computed from `stats` if `with_stats`.

        For a zero gradient, a zero delta, or a gradient whose norm is not finite, the terms with the gradient's norm
        are 0; in the last case, so that NaN and Inf stay in the elements where `torch.optim.AdamW` would have them.
        """
        if not with_stats:
            self.prior_cosine = self.prior_ratio = None
            return self._constant
        inv = self._inv_scale
        self._sums = self.stats if inv is None else self.stats * torch.stack((inv * inv, inv))
        grad_norm = sqrt64(self._sums[:, 0])
        ratio = grad_norm.nan_to_num(nan=0.0, posinf=0.0).mul_(self.inv_delta_norm)
        self._along = self._of.sign * self._sums[:, 1]
        cosine = (self._along / grad_norm).mul_(self.inv_delta_norm).nan_to_num_(nan=0.0).clamp_(-1.0, 1.0)
        c = self._constant + ratio.mul_(self._alpha).mul_(self._of.by_ratio + self._of.by_cosine * cosine)
        self.prior_cosine = cosine
        self._pull = c.abs() * self.delta_norm
        self.prior_ratio = (self._pull / grad_norm).nan_to_num_(nan=0.0, posinf=torch.inf)
        return c

    def biased_norm_squared(self, c: Tensor) -> Tensor:
        """Return norm(g')^2 over all tensors, float64 []. Call `bias` with statistics first."""
        if self._sum is None:
            self._sum = OrderedSum(len(c), c.device)
        torch.add(self._sums[:, 0] - 2 * c * self._along, self._pull * self._pull, out=self._sum.addends)
        return self._sum.total()

    def set_gradient_coefficients(self, c: Tensor, clip: Tensor | None) -> None:
        """Set the coefficients of gradient and delta from the prior's coefficients (`bias`) and from `clip`."""
        inv = self._inv_scale
        if clip is None and inv is None:
            if self._written is not c:
                self._out.grad_coef.copy_(self._of.sign)
                self._out.delta_coef.copy_(c)
            self._written = c
            return
        clip = self._one if clip is None else clip
        torch.mul(self._of.sign, clip if inv is None else clip * inv, out=self._out.grad_coef)
        torch.mul(c, clip, out=self._out.delta_coef)
        self._written = None


def clip_coefficient(grad_norm: Tensor, max_grad_norm: float) -> Tensor:
    """k = min(1, max_grad_norm/(norm + 1e-6)), as in `torch.nn.utils.clip_grad_norm_`; a NaN norm gives NaN."""
    return (max_grad_norm / (grad_norm + CLIP_EPSILON)).clamp(max=1.0)

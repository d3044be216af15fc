"""The input of a step: parameters, gradients and deltas, the same for every contender."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from drift_kernels import Prior
from drift_kernels.kernels.scalings import SCALINGS
from drift_kernels.prior import quantize

from .modes import Storage
from .shapes import NamedShape, covered

LR, BETAS, EPS, WEIGHT_DECAY, ALPHA = 1e-6, (0.9, 0.999), 1e-8, 1e-2, 0.5
ADAMW = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
MAX_GRAD_NORM = 1.0  # for steps that clip


@dataclass(frozen=True)
class Problem:
    """Parameters by name, each with a gradient and, if the prior covers it, a delta (else None)."""

    names: list[str]
    params: list[Tensor]
    grads: list[Tensor]
    deltas: list[Tensor | None]

    @classmethod
    def random(
        cls,
        shapes: list[NamedShape],
        modules: list[str],
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
    ) -> Problem:
        """Normal numbers at the scale of fine-tuning: weights 2e-2, gradients and deltas 1e-3."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(shape: tuple[int, ...], deviation: float) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(0, deviation, generator=generator)

        return cls(
            names=[name for name, _ in shapes],
            params=[normal(shape, 2e-2) for _, shape in shapes],
            grads=[normal(shape, 1e-3) for _, shape in shapes],
            deltas=[normal(shape, 1e-3) if covered(name, modules) else None for name, shape in shapes],
        )

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.params)

    @property
    def prior(self) -> dict[str, Tensor]:
        return {name: delta for name, delta in zip(self.names, self.deltas, strict=True) if delta is not None}

    @cached_property
    def _loaded_priors(self) -> dict[torch.dtype | None, Prior]:
        return {}

    def loaded_prior(self, codes: torch.dtype | None) -> Prior:
        """The deltas as a prior, hashed and checked once and shared by the optimizers that bind it; with `codes` (int8
        or float8_e4m3fn), as a small prior."""
        if codes not in self._loaded_priors:
            small = {name: quantize(delta, codes) for name, delta in self.prior.items()} if codes else None
            self._loaded_priors[codes] = Prior.from_mapping(small or self.prior)
        return self._loaded_priors[codes]

    @cached_property
    def host_deltas(self) -> list[Tensor | None]:
        """The deltas in the host's pageable memory."""
        return [None if delta is None else delta.cpu() for delta in self.deltas]

    @cached_property
    def scratch_grads(self) -> list[Tensor]:
        """Gradients shared by the contenders that overwrite them; see `restore_scratch_grads`."""
        return [grad.clone() for grad in self.grads]

    def restore_scratch_grads(self) -> None:
        for scratch, grad in zip(self.scratch_grads, self.grads, strict=True):
            scratch.copy_(grad)

    def own_params(self, grads: list[Tensor] | None = None) -> list[Tensor]:
        """A copy of the parameters, with these gradients (default: `self.grads`), which are not copied."""
        own = [param.clone() for param in self.params]
        for param, grad in zip(own, self.grads if grads is None else grads, strict=True):
            param.grad = grad
        return own

    def bytes_to_move(self, scaling: str | None, storage: Storage, clip: bool = False) -> int:
        """The memory traffic that a step cannot avoid, in bytes, computed from the dtypes.

        Every step reads param, grad and the states (with residuals, and the scales of codes) and writes param and
        states; under a prior it reads delta (with the scales of codes). A norm takes another pass: over the biased
        gradients for a coefficient with norm(g), over all gradients for clipping; and over the deltas too for
        <g, delta>, which adaptive_cosine and the norm of a biased gradient need (norm(delta) is a constant).
        """
        total = 0
        for param, grad, delta in zip(self.params, self.grads, self.deltas, strict=True):
            bias = None if delta is None else scaling
            total += 2 * param.nbytes + grad.nbytes + 2 * storage.states(param.numel())
            total += grad.nbytes if clip or (bias is not None and SCALINGS[bias].needs_stats) else 0
            if bias is not None:
                needs_dot = bias == "adaptive_cosine" or (clip and bias != "decoupled")
                total += storage.delta(param.numel()) * (2 if needs_dot else 1)
        return total

"""The scaling modes: how strongly the prior biases the gradient of each tensor. The only list of them.

With g the gradient of the descent direction, delta the prior's delta, and c its coefficient in g' = g - c*delta:

    absolute         c = alpha * r        r = 1, or norm(W)/norm(delta) with normalize_to_param
    gradnorm         c = alpha * norm(g)/norm(delta)
    adaptive_cosine  c = alpha * (1 + cos(g, delta))/2 * norm(g)/norm(delta)
    decoupled        c = 0, and param moves by + lr*alpha*delta

(From arXiv 2510.15050, with the sign of its code: alpha > 0 pulls toward the expert. `decoupled` is specific to this
package.)
"""

from __future__ import annotations

from typing import Literal, NamedTuple

GradientScaling = Literal["absolute", "gradnorm", "adaptive_cosine"]
PriorScaling = Literal[GradientScaling, "decoupled"]


class Scaling(NamedTuple):
    """The terms of a mode, each a factor of alpha:

    c = alpha * (absolute*r + norm(g)/norm(delta) * (by_ratio + by_cosine*cos(g, delta)))

    and param moves by + lr*alpha*decoupled*delta.
    """

    absolute: float = 0.0
    by_ratio: float = 0.0
    by_cosine: float = 0.0
    decoupled: float = 0.0

    @property
    def biases_gradients(self) -> bool:
        return self.absolute != 0 or self.needs_stats

    @property
    def needs_stats(self) -> bool:
        """Whether c depends on the gradient's norm."""
        return self.by_ratio != 0 or self.by_cosine != 0


SCALINGS = {
    "absolute": Scaling(absolute=1.0),
    "gradnorm": Scaling(by_ratio=1.0),
    "adaptive_cosine": Scaling(by_ratio=0.5, by_cosine=0.5),
    "decoupled": Scaling(decoupled=1.0),
}
GRADIENT_SCALINGS = tuple(name for name, scaling in SCALINGS.items() if scaling.biases_gradients)

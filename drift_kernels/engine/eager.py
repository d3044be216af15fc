"""What torch.compile leaves alone: a step is addresses, cached plans and launches, which no graph could hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def not_compiled(function: F) -> F:
    """`torch.compiler.disable`, as torch's own optimizers use it: the compiler, which takes most of a second to import,
    is imported at the first call."""
    disable: Callable[[F], F] = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    return disable(function)

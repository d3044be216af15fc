"""What torch.compile leaves alone: a step is addresses, cached plans and launches, which no graph could hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def not_compiled(function: F) -> F:
    """`torch.compiler.disable` in the form that torch's own optimizers use: it imports the compiler, which takes most of
    a second, at the first call."""
    disable: Callable[[F], F] = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    return disable(function)

"""Renamed keyword arguments: the old name still works, with a DeprecationWarning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def renamed(old: str, new: str) -> Callable[[F], F]:
    """Let a function accept `old` for its keyword `new`, with a DeprecationWarning. Both together raise TypeError."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                name = function.__qualname__.removesuffix(".__init__")
                if new in kwargs:
                    raise TypeError(f"{name} got both {new} and its old name {old}: pass only {new}")
                warnings.warn(f"{name}: {old} is deprecated, use {new} instead", DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return cast(F, call)

    return decorate

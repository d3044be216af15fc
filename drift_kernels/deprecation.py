"""Keyword arguments that have got another name: the old one still works, and says so."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def renamed(old: str, new: str) -> Callable[[F], F]:
    """A function that takes `new` takes `old` for it, with a DeprecationWarning; both together raise TypeError."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                name = function.__qualname__.removesuffix(".__init__")
                if new in kwargs:
                    raise TypeError(f"{name} got {new} and {old}, which is the old name of {new}: pass {new} alone")
                warnings.warn(f"{old} is called {new} now ({name})", DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return cast(F, call)

    return decorate

"""Triton, if it is installed, for the modules with kernels."""

# mypy: allow-untyped-defs

from __future__ import annotations

import inspect
from typing import Any

try:
    import triton
except ImportError as error:
    triton = None
    missing: str | None = f"cannot import Triton ({error})"
else:
    missing = None
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        missing = f"Triton {triton.__version__} is too old: its kernels need 3.6 or newer"  # torch 2.9 brings 3.5
        triton = None


def constant(value: int) -> Any:
    """`value` as a constant that kernels can read from their module; without Triton, the number itself."""
    return value if triton is None else triton.language.constexpr(value)


def _jit(function):
    """`triton.jit` without specialisation on arguments; without Triton, the function itself, which is never called."""
    if triton is None:
        return function
    arguments = [name for name in inspect.signature(function).parameters if name not in function.__annotations__]
    return triton.jit(function, do_not_specialize=arguments)

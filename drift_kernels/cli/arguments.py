"""What the commands share: how they are declared, and how their arguments are parsed."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import torch
from rich.console import Console

from ..prior.names import parse_layers, select_names

Result = TypeVar("Result")
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[argparse.Namespace, Console], int]
"""Runs a command, given its arguments and the console for errors and progress. Returns the exit status."""

EXIT_STATUS = (
    "Exit status: 0 on success; 1 on an error, or if a prior does not fit or is damaged; 2 for invalid arguments; 129, "
    "130 or 143 if stopped by SIGHUP, Ctrl-C or SIGTERM. Errors and warnings go to stderr."
)
CHECKPOINT = (
    "a checkpoint folder; a Hub id (org/name or org/name@revision), from which only the required parts are downloaded; "
    "or BASE+ADAPTER (each a folder or a Hub id), where ADAPTER is a PEFT LoRA adapter to merge. FP8 weights with "
    "scales are supported"
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
PRIOR = "a prior folder or a Hub id"


def add_command(commands: Commands, name: str, what: str, run: Run) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=EXIT_STATUS)
    parser.set_defaults(run=run, misuse=parser.error)
    return parser


def modules(text: str) -> list[str]:
    """Regular expressions may contain commas, so each `re:` extends to the next `,re:`."""
    presets, *patterns = re.split(r"(?:^|,)re:", text)
    modules = [module for module in presets.split(",") if module] + [f"re:{pattern}" for pattern in patterns]
    checked(select_names, (), modules)
    return modules


def layers(text: str) -> frozenset[int]:
    return checked(parse_layers, text)


def rank(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def name_rule(text: str) -> tuple[str, str]:
    prefix, equals, canonical = text.partition("=")
    if not prefix or not equals:
        raise argparse.ArgumentTypeError(f"expected PREFIX=CANONICAL, got {text!r}")
    return prefix, canonical


def number(text: str) -> float:
    """A finite number other than 0."""
    value = float(text)
    if not math.isfinite(value) or value == 0:
        raise argparse.ArgumentTypeError(f"must be finite and not 0, got {text}")
    return value


def checked(function: Callable[..., Result], *values: object) -> Result:
    """Call `function`, and let argparse report the message of its ValueError."""
    try:
        return function(*values)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

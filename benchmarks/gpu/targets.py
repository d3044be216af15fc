"""The targets of a GPU run, and how the rows compare with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..captions import Row

# Ours with the same states as torch, and its row in the run with matrices of the real size.
OURS = {"contender": "cuda", "scaling": "absolute", "clip": False, "states": "bfloat16"}
REAL_SIZE = {**OURS, "run": "7b"}

# The smallest mode, and the mode that it must beat.
PLAIN = {**OURS, "run": "modes", "states": "float32", "rounding": "nearest", "master": False, "prior_dtype": "same"}
SMALL = {**PLAIN, "states": "int8", "rounding": "stochastic", "prior_dtype": "int8"}


def of_copy(row: Row) -> float | None:
    return row["percent_of_copy"]


def over(rival: str) -> Callable[[Row], float | None]:
    """The ratio of the median time to a rival's."""

    def ratio(row: Row) -> float | None:
        spread = row[f"ratio_to_{rival}"]
        return None if spread is None else spread["median"]

    return ratio


def bytes_moved(row: Row) -> float | None:
    return row["bytes_per_param"]


def speed(row: Row) -> float | None:
    """Steps per millisecond."""
    return 1 / row["ms"]["median"]


def host_microseconds(row: Row) -> float | None:
    return 1e3 * row["host_ms"]["median"]


@dataclass(frozen=True)
class Target:
    """A bound on a figure of the row that matches `where`.

    With `over`, the bound is on the figure divided by that of the row that matches `over`.
    """

    name: str
    where: dict[str, Any]
    figure: Callable[[Row], float | None]
    bound: float
    unit: str = ""
    at_least: bool = False
    over: dict[str, Any] | None = None

    def measured(self, rows: list[Row]) -> float | None:
        """The figure; None if no row has it."""
        found = self._figure(rows, self.where)
        if found is None or self.over is None:
            return found
        base = self._figure(rows, self.over)
        return None if base is None else found / base

    def _figure(self, rows: list[Row], where: dict[str, Any]) -> float | None:
        found = (row for row in rows if all(row[key] == value for key, value in where.items()))
        return next((figure for figure in map(self.figure, found) if figure is not None), None)

    def check(self, rows: list[Row]) -> dict[str, Any]:
        """The target with its measurement, ready for JSON; `met` is None if nothing was measured."""
        value = self.measured(rows)
        met = None
        if value is not None:
            met = value >= self.bound if self.at_least else value <= self.bound
        wanted = f"{'at least' if self.at_least else 'at most'} {self.bound:g}{self.unit}"
        return {"target": self.name, "wanted": wanted, "measured": value, "unit": self.unit, "met": met}


TARGETS = [
    Target(
        "absolute, float32 states: bandwidth relative to a copy",
        {**REAL_SIZE, "states": "float32"},
        of_copy,
        90,
        " %",
        at_least=True,
    ),
    Target("absolute, bfloat16 states: bandwidth relative to a copy", REAL_SIZE, of_copy, 90, " %", at_least=True),
    Target("absolute: time / torch fused without a prior", REAL_SIZE, over("fused"), 1.0),
    Target("absolute: time / (_foreach_add_ + torch fused)", REAL_SIZE, over("foreach_bias"), 0.70),
    Target("absolute: time / authors' hook", REAL_SIZE, over("hook"), 0.10),
    Target("absolute: host time for 729 tensors", {**OURS, "run": "tiny"}, host_microseconds, 200, " us"),
    Target("int8 mode: bytes moved / float32-state mode", SMALL, bytes_moved, 0.5, over=PLAIN),
    Target("int8 mode: speed / float32-state mode", SMALL, speed, 1.6, "x", at_least=True, over=PLAIN),
]


def describe(checked: dict[str, Any]) -> str:
    """Format a target as a line of the summary."""
    verdict = {True: "met", False: "MISSED", None: "not measured"}[checked["met"]]
    value = "" if checked["measured"] is None else f"{checked['measured']:.3g}{checked['unit']}"
    return f"{checked['target']:<50} {checked['wanted']:<16} {value:>10}  {verdict}"

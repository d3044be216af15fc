"""The layout of what crosses to compiled code, as Python has it, and whether an extension was built for the same."""

from __future__ import annotations

from ..formats.blocks import BLOCK
from ..reinstalling import reinstall_command
from .coefficients import Coefficients
from .filling import FILLING_FIELDS, GROUP_FIELDS, MAX_GROUPS
from .plan import CHUNK, ROW_FIELDS

# As an extension exports it (csrc/layout.h): the columns of Plan.table and of the coefficients' table, the words of a
# Filling and how many param groups it takes, the elements of a chunk and of a block of codes.
LAYOUT: dict[str, tuple[str, ...] | int] = {
    "row": ROW_FIELDS,
    "coefficients": Coefficients._fields,
    "filling": FILLING_FIELDS,
    "group": GROUP_FIELDS,
    "groups": MAX_GROUPS,
    "chunk": CHUNK,
    "block": BLOCK,
}


def mismatch(extension: object, backend: str) -> str | None:
    """Why nothing of `extension`, the compiled module of `backend`, may be called; None if it has this layout.

    One of another commit imports like any other. Its kernels would take one column of a table for another.
    """
    built = getattr(extension, "LAYOUT", None)
    if built == LAYOUT:
        return None
    if not isinstance(built, dict):
        built = {}  # of sources that did not export it yet
    parts = [part for part in {**LAYOUT, **built} if built.get(part) != LAYOUT.get(part)]
    differences = "; ".join(
        f"{part}: the extension has {_shown(built, part)}, this drift_kernels {_shown(LAYOUT, part)}" for part in parts
    )
    where = getattr(extension, "__file__", None) or "in memory"
    said = "for another layout" if built else "from older sources, which do not say their layout"
    return (
        f"its compiled extension ({where}) was built {said} ({differences}); build it anew by: "
        f"{reinstall_command(backend)}"
    )


def _shown(layout: dict[str, tuple[str, ...] | int], part: str) -> str:
    value = layout.get(part, "nothing")
    return " ".join(value) if isinstance(value, tuple) else str(value)

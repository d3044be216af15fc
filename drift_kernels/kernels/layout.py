"""The layout of the tables that are passed to compiled code, and a check that an extension was built for it."""

from __future__ import annotations

from ..formats.blocks import BLOCK
from ..reinstalling import reinstall_command
from .coefficients import Coefficients
from .filling import FILLING_FIELDS, GROUP_FIELDS, MAX_GROUPS
from .plan import CHUNK, ROW_FIELDS

# As an extension exports it (csrc/layout.h): the columns of Plan.table and of the coefficient table, the words of a
# Filling and its maximum number of param groups, and the elements of a chunk and of a block of codes.
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
    """Why `extension`, the compiled module of `backend`, must not be called; None if its layout matches.

    An extension built from another commit can still be imported, but its kernels would read the wrong columns.
    """
    built = getattr(extension, "LAYOUT", None)
    if built == LAYOUT:
        return None
    if not isinstance(built, dict):
        built = {}  # built from sources that did not export it yet
    parts = [part for part in {**LAYOUT, **built} if built.get(part) != LAYOUT.get(part)]
    differences = "; ".join(
        f"{part}: expected {_shown(LAYOUT, part)}, the extension has {_shown(built, part)}" for part in parts
    )
    where = getattr(extension, "__file__", None) or "in memory"
    said = "for a different layout" if built else "from older sources, which do not export their layout"
    return (
        f"its compiled extension ({where}) was built {said} ({differences}); rebuild it with: "
        f"{reinstall_command(backend)}"
    )


def _shown(layout: dict[str, tuple[str, ...] | int], part: str) -> str:
    value = layout.get(part, "nothing")
    return " ".join(value) if isinstance(value, tuple) else str(value)

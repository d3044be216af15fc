"""What the package says, by the logger `drift_kernels`: warnings, and once for each binding what the prior acts on.

Python's default shows warnings alone, and a prior that is bound should be seen to be. So the logger's level is INFO,
and where nobody has set up logging (no handler on the root logger or on this one) records go to stderr. Where somebody
has, they go there and nowhere else. `logging.getLogger("drift_kernels").setLevel(logging.WARNING)` leaves the warnings.
"""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("drift_kernels")


class LastResort(logging.Handler):
    """stderr, where there is no other handler."""

    def emit(self, record: logging.LogRecord) -> None:
        if not any(not isinstance(handler, LastResort) for handler in (*logger.handlers, *logging.root.handlers)):
            print(f"drift_kernels: {record.getMessage()}", file=sys.stderr)


def set_up() -> None:
    """Done once, when the package is imported; a level that was set before stays."""
    if not any(isinstance(handler, LastResort) for handler in logger.handlers):
        logger.addHandler(LastResort())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)

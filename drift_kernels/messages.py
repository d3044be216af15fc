"""The logger `drift_kernels`: it logs warnings and, once per binding, which parameters the prior acts on.

By default, Python shows warnings only, but users should see that a prior is bound. So the logger's level is INFO, and
if logging has not been set up (no handler on the root logger or on this one), records go to stderr. Otherwise they go
to the handlers that were set up. `logging.getLogger("drift_kernels").setLevel(logging.WARNING)` keeps warnings only.
"""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("drift_kernels")


class LastResort(logging.Handler):
    """Prints records to stderr, if there is no other handler."""

    def emit(self, record: logging.LogRecord) -> None:
        if not any(not isinstance(handler, LastResort) for handler in (*logger.handlers, *logging.root.handlers)):
            print(f"drift_kernels: {record.getMessage()}", file=sys.stderr)


def set_up() -> None:
    """Set up the logger, when the package is imported. A level that was set before is kept."""
    if not any(isinstance(handler, LastResort) for handler in logger.handlers):
        logger.addHandler(LastResort())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)

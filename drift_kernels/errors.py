"""The named errors of the package. Hyperparameters of a wrong type or value raise TypeError or ValueError."""

from __future__ import annotations


class BackendUnavailableError(RuntimeError):
    """A backend was requested by name and cannot run here; the message gives the reason."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, or not a safetensors checkpoint; or its files cannot be read, and then
    `__cause__` is the system's OSError.
    """


class PriorError(ValueError):
    """A prior cannot be used as requested. Base class of the errors below."""


class PriorFormatError(PriorError):
    """A folder is not a prior, or its files are damaged, foreign, of a newer version, or cannot be read."""


class PriorMismatchError(PriorError):
    """A prior does not belong to a model, or to a saved optimizer state."""

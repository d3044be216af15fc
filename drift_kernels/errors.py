"""The named errors of the package. Hyperparameters of a wrong type or value raise TypeError or ValueError."""

from __future__ import annotations


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message carries the recorded reason."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, or not a safetensors checkpoint; or its files cannot be read just now, and
    then the system's OSError is the cause (`__cause__`)."""


class PriorError(ValueError):
    """A prior cannot be used as asked. Base of the errors below."""


class PriorFormatError(PriorError):
    """A folder is not a prior, or its files are damaged, foreign, of a newer version, or cannot be read."""


class PriorMismatchError(PriorError):
    """A prior and a model, or a prior and a saved optimizer state, do not belong together."""

"""The version, in this one place: setup reads it from here without importing anything."""

__version__ = "0.1.0"

"""The version. It is defined only here; setup.py reads this file without importing anything."""

__version__ = "0.2.0"

"""Runs the cuda backend's PTX on a machine without a GPU. docs/cuda.md lists what it can and cannot find."""

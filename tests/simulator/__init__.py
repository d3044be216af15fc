"""The cuda backend, from PTX, on a machine without a GPU: docs/cuda.md says what it finds and what it does not."""

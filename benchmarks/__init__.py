"""Benchmarks: the optimizer step against its rivals, and building a prior. See README.md in this folder."""

"""Every model family of transformers, at tiny size: does a prior bind to it, pull the right way, and leave the rest be?

`python -m tests.families` runs all of them and writes docs/families.md; tests/test_families.py runs a few.
"""

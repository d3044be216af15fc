"""Every model family of transformers, at tiny size: does a prior bind, pull the right way, and leave the rest alone?

`python -m tests.families` runs all of them and writes docs/families.md; tests/test_families.py runs a few.
"""

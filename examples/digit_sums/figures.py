from __future__ import annotations


def draw(out, result, experiment):
    return []

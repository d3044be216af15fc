"""The plots of the step benchmark."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks.step import bars, roofline

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def test_a_slow_rival_leaves_the_others_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    rows = json.loads((RESULTS / "step-cpu.json").read_text())
    slow = next(row for row in rows if row["contender"] == "hook")
    slow["ratio_to_fused"] = {"median": 61.2, "low": 59.0, "high": 70.0}
    bars.draw(rows, tmp_path / "bars.png")
    (axes,) = figures[0].axes
    lengths = [bar.get_width() for bar in axes.patches]
    shown = [row for row in rows if row["contender"] not in ("copy", "streams")]  # those are limits
    expected = [min(row["ratio_to_fused"]["median"], bars.LONGEST) for row in shown]
    assert lengths == pytest.approx(expected)
    assert any(text.get_text().startswith("61.20x") for text in axes.texts)


def test_labels_are_spread_out_as_little_as_it_takes() -> None:
    assert roofline.spread_out([0.2, 0.5], 0.1) == [0.2, 0.5]
    assert roofline.spread_out([0.5, 0.5, 0.9], 0.1) == pytest.approx([0.45, 0.55, 0.9])
    assert roofline.spread_out([0.0, 0.0], 0.1) == pytest.approx([0.05, 0.15])
    crowded = roofline.spread_out([0.3] * 20, 0.1)
    assert [b - a for a, b in itertools.pairwise(crowded)] == pytest.approx([0.05] * 19)
    heights = sorted(torch.rand(37).tolist())
    moved = roofline.spread_out(heights, 0.02)
    assert all(b - a > 0.02 - 1e-9 for a, b in itertools.pairwise(moved))
    assert 0 < moved[0] < moved[-1] < 1


def test_rows_of_older_runs_can_be_drawn(tmp_path: Path) -> None:
    bars.main([str(RESULTS / "step-cpu.json"), str(tmp_path / "bars.png")])
    roofline.main([str(RESULTS / "step-cpu.json"), str(tmp_path / "roofline.png")])
    with pytest.raises(ValueError, match="copy"):
        roofline.main([str(RESULTS / "tiny-cpu.json"), str(tmp_path / "none.png")])

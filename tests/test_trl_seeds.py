"""examples/trl_seeds.py: docs/trainers.md has its table, and the table matches its JSON."""

from __future__ import annotations

import json

import pytest
from documents import ROOT

pytest.importorskip("trl")
pytest.importorskip("transformers", minversion="5", reason="its examples need transformers 5")
pytest.importorskip("sklearn")

from examples import trl_seeds

FOUND = json.loads(trl_seeds.RESULTS.read_text())


def test_the_page_has_the_table() -> None:
    assert f"\n{trl_seeds.table(FOUND['results'])}\n" in (ROOT / "docs" / "trainers.md").read_text()


def test_the_table_is_of_what_the_script_runs() -> None:
    assert list(FOUND["results"]) == list(trl_seeds.EXAMPLES)
    assert not FOUND["made_by"]["dirty"]
    for columns in FOUND["results"].values():
        assert list(columns) == list(trl_seeds.COLUMNS)
        assert {len(scores) for scores in columns.values()} == {len(trl_seeds.SEEDS)}


def test_a_cell_is_mean_and_standard_deviation_in_percent() -> None:
    assert trl_seeds.cell([{"right": 0.5}, {"right": 0.6}, {"right": 0.7}]) == "60 ± 10"


def test_the_prior_helps_in_each() -> None:
    """The page's claim: by more than two standard deviations wherever the tower is frozen."""
    for name, columns in FOUND["results"].items():
        if "tower" in name:
            continue
        for without, with_prior in (("without prior", "with the prior"), ("LoRA, without", "LoRA, with")):
            best = max(scores["right"] for scores in columns[without])
            assert min(scores["right"] for scores in columns[with_prior]) > best, name

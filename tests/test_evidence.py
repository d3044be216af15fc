"""docs/evidence.md and other pages that cite examples/digit_sums: every number is one of the committed results."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("peft")

from examples.digit_sums import pages, report
from examples.digit_sums.analysis import CHOSEN_BY, mean_and_interval
from examples.digit_sums.experiments import DEMO, EXPERIMENTS
from examples.digit_sums.settings import TUNING_SEEDS

EVIDENCE = (pages.ROOT / "docs/evidence.md").read_text()
ESTIMATE = re.compile(r"[+-]?\d+\.\d \[[+-]?\d+\.\d, [+-]?\d+\.\d\]")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return pages.results()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_results_are_of_the_experiment_as_it_is(name: str, results: dict[str, Any]) -> None:
    """They tried what the code tries, on other seeds than the tuning seeds, with the code of a commit."""
    result, experiment = results[name], EXPERIMENTS[name]
    assert result["seeds"] == list(range(experiment.seeds))
    assert experiment.seeds >= 10
    assert result["tuning_seeds"] == list(TUNING_SEEDS)
    assert not set(result["seeds"]) & set(TUNING_SEEDS)
    assert all(re.fullmatch("[0-9a-f]{40}", made["commit"]) and not made["dirty"] for made in result["made_by"])
    assert result["command"] == f"python -m examples.digit_sums --experiment {name}"
    assert result["question"] == experiment.question
    assert result["references"] == list(experiment.references)
    assert [entry["name"] for entry in result["entries"]] == [entry.name for entry in experiment.entries]
    for found, entry in zip(result["entries"], experiment.entries, strict=True):
        assert found["world"] == asdict(entry.world)
        if len(entry.candidates) == 1:
            assert found["arm"] == asdict(replace(entry.candidates[0], **dict(entry.then)))
            continue
        assert [tried["arm"] for tried in found["tried"]] == [asdict(arm) for arm in entry.candidates]
        right = [sum(sum(tried["scores"][score]) for score in CHOSEN_BY) for tried in found["tried"]]
        best = entry.candidates[right.index(max(right))]
        assert found["arm"] == asdict(replace(best, **dict(entry.then)))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_means_and_differences_follow_from_the_seeds(name: str, results: dict[str, Any]) -> None:
    by_name = {entry["name"]: entry for entry in results[name]["entries"]}
    for entry in by_name.values():
        for score, found in entry["scores"].items():
            assert len(found["seeds"]) == len(results[name]["seeds"])
            said = {key: found[key] for key in ("mean", "low", "high")}
            assert said == pytest.approx(mean_and_interval(found["seeds"])), (entry["name"], score)
        for line, differences in entry["against"].items():
            placed = f"{line}, {entry['x']:g}" if entry["x"] is not None else line
            reference = by_name.get(placed) or by_name[line]
            for score, found in differences.items():
                pairs = zip(entry["scores"][score]["seeds"], reference["scores"][score]["seeds"], strict=True)
                assert found == pytest.approx(mean_and_interval([a - b for a, b in pairs]))


def test_tables_are_the_results(results: dict[str, Any]) -> None:
    """`python -m examples.digit_sums.pages` writes them."""
    filled = {path: pages.filled(path.read_text(), results) for path in pages.pages()}
    assert [path.name for path, page in filled.items() if page != path.read_text()] == []
    assert sum(page.count("<!-- digit_sums: ") for page in filled.values()) >= len(EXPERIMENTS)


def test_numbers_in_sentences_are_the_results(results: dict[str, Any]) -> None:
    """In docs/evidence.md, the results of the section's experiment."""
    known = {name: estimates(result) for name, result in results.items()}
    cited = []
    for section in EVIDENCE.split("\n## "):
        numbers = ESTIMATE.findall(section)
        names = re.findall(r"digit_sums --experiment (\w+)", section)
        allowed = set().union(*(known[name] for name in names or known))
        assert set(numbers) - allowed == set(), section.splitlines()[0]
        cited += numbers
    assert len(cited) > 100
    for path in pages.pages():
        assert set(ESTIMATE.findall(path.read_text().split("## Speed")[0])) - set().union(*known.values()) == set(), (
            path
        )


def estimates(result: dict[str, Any]) -> set[str]:
    """The estimates as formatted in the text."""
    scores = {report.percent(found) for entry in result["entries"] for found in entry["scores"].values()}
    differences = [by_score for entry in result["entries"] for by_score in entry["against"].values()]
    return scores | {report.points(found) for by_score in differences for found in by_score.values()}


def test_nothing_is_left_to_be_filled() -> None:
    assert [path.name for path in pages.pages() if "@@" in path.read_text()] == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_page_has_the_command_and_the_figures(name: str) -> None:
    assert f"`python -m examples.digit_sums --experiment {name}`" in EVIDENCE
    for kind in EXPERIMENTS[name].figures:
        assert f"../examples/digit_sums/results/{name}-{kind}.png" in EVIDENCE
        assert all((pages.RESULTS / f"{name}-{kind}.{ending}").exists() for ending in ("png", "pdf"))


def test_the_demo_has_the_settings_that_were_chosen(results: dict[str, Any]) -> None:
    chosen = {entry["name"]: entry["arm"] for name in ("adapters", "main") for entry in results[name]["entries"]}
    for entry in DEMO.entries:
        assert asdict(entry.candidates[0]) == chosen[entry.name], entry.name

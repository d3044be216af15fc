"""Turns runs into results: the chosen settings, means with their intervals, differences paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy
from scipy import stats

from .cells import Cell
from .experiments import Entry, Experiment
from .parallel import Pool
from .run import stage_of
from .settings import TUNING_SEEDS, Arm, Run, World

SCORES = {
    "held_out_sums": "held-out sums",
    "seen_sums": "seen sums",
    "reading": "reading",
    "single_digits": "single digits",
    "single_answers": "single answers",
}
CHOSEN_BY = ("held_out_sums", "seen_sums", "reading")
RESAMPLES, CONFIDENCE = 10_000, 0.95
FEWEST = 5  # seeds needed for an interval

Result = dict[str, Any]  # the content of an experiment's JSON file


@dataclass(frozen=True)
class Choice:
    """The settings tried on the tuning seeds, and the best: the highest mean of held-out sums, seen sums and readings;
    on ties the first."""

    tried: tuple[tuple[Arm, dict[str, list[float]]], ...]  # scores by name, one per tuning seed

    @property
    def best(self) -> int:
        right = [sum(sum(scores[score]) for score in CHOSEN_BY) for _, scores in self.tried]
        return right.index(max(right))


def choose(entries: Sequence[Entry], pool: Pool, name: str) -> tuple[dict[Entry, Choice], dict[Run, Cell]]:
    """Return the choices for the entries with several candidates, and the runs that they are based on."""
    open_ones = [entry for entry in entries if len(entry.candidates) > 1]
    wanted = {(entry, arm): _runs(TUNING_SEEDS, entry.tuned_in, arm) for entry in open_ones for arm in entry.candidates}
    cells = pool.cells_of([run for runs in wanted.values() for run in runs], f"{name}, choice of settings")
    choices = {
        entry: Choice(
            tuple((arm, _scores([cells[run] for run in wanted[entry, arm]])) for arm in entry.candidates),
        )
        for entry in open_ones
    }
    return choices, cells


def answer(name: str, experiment: Experiment, seeds: Sequence[int], pool: Pool) -> Result:
    """Choose settings, run all entries on the seeds, and summarize them."""
    choices, tuning_cells = choose(experiment.entries, pool, name)
    arms = {}
    for entry in experiment.entries:
        arm = entry.candidates[0]
        if entry in choices:
            arm = choices[entry].tried[choices[entry].best][0]
        arms[entry] = replace(arm, **dict(entry.then))
    runs = {entry: _runs(seeds, entry.world, arm) for entry, arm in arms.items()}
    cells = pool.cells_of([run for several in runs.values() for run in several], name)
    of_entry = {entry: [cells[run] for run in several] for entry, several in runs.items()}
    scores = {entry: _scores(several) for entry, several in of_entry.items()}
    return {
        "experiment": name,
        "question": experiment.question,
        "references": list(experiment.references),
        "seeds": list(seeds),
        "tuning_seeds": list(TUNING_SEEDS),
        "chosen_by": list(CHOSEN_BY),
        "interval": f"{CONFIDENCE:.0%}, bootstrap over seeds (BCa, {RESAMPLES} resamples)",
        "entries": [
            {
                "name": entry.name,
                "line": entry.line,
                "x": entry.x,
                "world": asdict(entry.world),
                "arm": asdict(arms[entry]),
                "lr": stage_of(arms[entry], pool.settings).lr if arms[entry].tuned else None,
                "expert": float(numpy.mean(pool.expert_scores(seeds, entry.world))),
                "tried": _tried(choices.get(entry)),
                "scores": {
                    score: {**mean_and_interval(values), "seeds": values} for score, values in scores[entry].items()
                },
                "against": _differences(entry, scores, experiment.references),
                "kept_energy": _mean_of([cell.get("kept_energy") for cell in of_entry[entry]]),
                "loss": mean_loss(of_entry[entry]),
            }
            for entry in experiment.entries
        ],
        "run_seconds": round(sum(cell["seconds"] for cell in (tuning_cells | cells).values())),
        "made_by": _distinct([cell["made_by"] for cell in (tuning_cells | cells).values()]),
    }


def mean_and_interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and its bootstrap interval (Efron, 1987: bias-corrected and accelerated); None for too few values."""
    mean = float(numpy.mean(values))
    if len(values) < FEWEST:
        return {"mean": mean, "low": None, "high": None}
    if len(set(values)) == 1:
        return {"mean": mean, "low": mean, "high": mean}
    found = stats.bootstrap(
        (values,),
        numpy.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="BCa",
        rng=numpy.random.default_rng(0),
    ).confidence_interval
    return {"mean": mean, "low": float(found.low), "high": float(found.high)}


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the Pareto-optimal points: no other point is at least as good in both scores and better in one."""
    return [
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
    ]


def mean_loss(cells: Sequence[Cell]) -> list[tuple[int, float]]:
    """The loss curve, averaged over the seeds."""
    curves = [cell["loss"] for cell in cells]
    return [
        (points[0][0], round(float(numpy.mean([loss for _, loss in points])), 4))
        for points in zip(*curves, strict=True)
    ]


def _runs(seeds: Sequence[int], world: World, arm: Arm) -> list[Run]:
    return [Run(seed, world, arm) for seed in seeds]


def _scores(cells: Sequence[Cell]) -> dict[str, list[float]]:
    return {score: [cell["scores"][score] for cell in cells] for score in SCORES}


def _differences(
    entry: Entry, scores: Mapping[Entry, dict[str, list[float]]], references: Sequence[str]
) -> dict[str, dict[str, dict[str, float | None]]]:
    """entry - reference, paired by seed, by reference and score. A reference at the same x precedes one without x."""
    found = {}
    for line in references:
        same = [other for other in scores if other.line == line and other.x in (entry.x, None)]
        same.sort(key=lambda other: other.x is None)
        if same and same[0] != entry:
            reference = scores[same[0]]
            found[line] = {
                score: mean_and_interval([a - b for a, b in zip(values, reference[score], strict=True)])
                for score, values in scores[entry].items()
            }
    return found


def _tried(choice: Choice | None) -> list[dict[str, Any]]:
    return [] if choice is None else [{"arm": asdict(arm), "scores": scores} for arm, scores in choice.tried]


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(numpy.mean(known)) if known else None


def _distinct(made_by: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each commit with its versions and machine, without duplicates."""
    return list({str({**row, "date": None, "load": None}): row for row in made_by}.values())

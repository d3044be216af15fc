"""The experiments: questions, and the arms that answer them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .settings import RANK, Arm, Settings, World

Candidates = tuple[Arm, ...]  # the best of several is chosen on the tuning seeds; a single one is used directly


CLEAN = World()


@dataclass(frozen=True)
class Entry:
    """A row of a table or a point of a figure: an arm in a world.

    Args:
        line: the arm's name, shared by the points of one line.
        candidates: the arm, or those that its settings are chosen from.
        world: where it is reported. The choice is made with clean data and a good expert.
        x: the point's position on the line, if it has one.
        then: fields that are set after the choice.
    """

    line: str
    candidates: Candidates
    world: World = CLEAN
    x: float | None = None
    then: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return self.line if self.x is None else f"{self.line}, {self.x:g}"

    @property
    def tuned_in(self) -> World:
        return World(self.world.family)


@dataclass(frozen=True)
class Experiment:
    """A question, and the entries that answer it.

    Args:
        references: the lines that each entry is compared with, paired by seed, at the same x if they have one.
        figures: dots: scores by entry; lines: scores over x; front: held-out sums over readings.
        scores: the scores shown by dots and lines.
        x_label: of lines.
        seeds: the number of seeds that it is reported on, starting from 0.
    """

    question: str
    entries: tuple[Entry, ...]
    references: tuple[str, ...] = ("SFT",)
    figures: tuple[Literal["dots", "lines", "front", "loss"], ...] = ("dots",)
    scores: tuple[str, ...] = ("held_out_sums", "reading")
    x_label: str = ""
    seeds: int = 10


def sweep(arm: Arm, **values: Sequence[float]) -> Candidates:
    """The arm with every combination of the values of some of its fields."""
    arms: Candidates = (arm,)
    for field, several in values.items():
        arms = tuple(replace(each, **{field: value}) for each in arms for value in several)
    return arms


def fixed(arms: Candidates, **values: float) -> Candidates:
    """The arm with these values, which need not be among the candidates."""
    return (replace(arms[0], **values),)


GRADNORM, ADAPTIVE = Arm(scaling="gradnorm"), Arm(scaling="adaptive_cosine")
ABSOLUTE, DECOUPLED = Arm(scaling="absolute"), Arm(scaling="decoupled")


def pulled(arm: Arm, alphas: Sequence[float], *slower: Sequence[float]) -> Candidates:
    """The arm with these alphas at the settings' learning rate, and with others at the next lower rates."""
    rates = (RATES if arm.rank is None else LORA_RATES)[1:]
    at_rates = (sweep(arm, lr=(rate,), alpha=several) for rate, several in zip(rates, slower, strict=False))
    assert len(slower) <= len(rates)
    return (*sweep(arm, alpha=alphas), *itertools.chain.from_iterable(at_rates))


def annealed(arm: Arm) -> Arm:
    return replace(arm, anneal=0.5)


def falling(part: float, *alphas: Sequence[float]) -> Candidates:
    """adaptive_cosine with an alpha that decreases to 0 over a part of the fine-tuning."""
    return pulled(replace(ADAPTIVE, anneal=part), *alphas)


def anchored(arm: Arm) -> Arm:
    return replace(arm, anchor=True)


ALPHAS = (0.25, 0.5, 1.0, 2.0, 4.0)
RANKS = (4, 8, 16)  # of priors; the matrices have 96 to 192 rows and columns
RATES = (5e-4, 2.5e-4, 1e-4, 5e-5)
LORA_RATES = (5e-3, 2.5e-3, 1e-3, 5e-4, 2.5e-4)
WEIGHTS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)

FORMS: dict[str, Candidates] = {
    "no fine-tuning": (Arm(tuned=False),),
    "task arithmetic": sweep(Arm(tuned=False), merge=(0.25, *WEIGHTS)),
    "TIES": sweep(Arm(tuned=False, vector="ties"), density=(0.2, 0.5, 0.8), merge=(0.5, 1.0, 1.5, 2.0)),
    "SFT": sweep(Arm(), lr=(*RATES[:3], 1e-3, 2e-3)),
    "merge, then SFT": sweep(Arm(), merge=(1.0, 0.5, 1.5, 2.0, 3.0), lr=(*RATES[:3], 1e-3)),
    "TIES, then SFT": (
        *sweep(Arm(vector="ties"), density=(0.2, 0.5, 0.8), merge=(1.0, 1.5, 2.0)),
        *sweep(Arm(vector="ties", density=0.5), merge=(1.0, 1.5, 2.0), lr=RATES[1:]),
    ),
    "expert's weights, then SFT": sweep(Arm(vector="way"), merge=(1.0, 0.5, 0.75, 1.25), lr=RATES),
    "absolute": pulled(ABSOLUTE, (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), (0.1, 0.3)),
    "gradnorm": pulled(GRADNORM, ALPHAS[1:], (0.5, 1.0, 2.0), (1.0, 2.0, 4.0)),
    "adaptive_cosine": pulled(ADAPTIVE, ALPHAS[1:], (1.0, 2.0, 4.0), (2.0, 4.0, 8.0)),
    "decoupled": pulled(DECOUPLED, (10.0, 20.0, 40.0, 80.0), (40.0, 80.0), (80.0, 160.0)),
    "gradnorm, annealed": pulled(annealed(GRADNORM), (1.0, 2.0, 4.0, 8.0), (2.0, 4.0, 8.0), (4.0, 8.0)),
    "adaptive_cosine, annealed": pulled(annealed(ADAPTIVE), (1.0, 2.0, 4.0, 8.0), (2.0, 4.0, 8.0), (4.0, 8.0)),
    "decoupled, annealed": pulled(annealed(DECOUPLED), (30.0, 60.0, 120.0), (60.0, 120.0, 240.0), (240.0, 480.0)),
    "gradnorm, anchor": pulled(anchored(GRADNORM), (1.5, 3.0, 6.0, 12.0), (3.0, 6.0)),
    "adaptive_cosine, anchor": pulled(anchored(ADAPTIVE), (4.0, 8.0, 16.0, 32.0), (8.0, 16.0)),
    "decoupled, anchor": pulled(anchored(DECOUPLED), (40.0, 80.0, 160.0, 320.0, 640.0, 1280.0), (320.0, 640.0)),
}

LORA, ALONG = Arm(rank=RANK), Arm(rank=RANK, along=True)
ADAPTERS: dict[str, Candidates] = {
    "LoRA: SFT": sweep(LORA, lr=(*LORA_RATES[:4], 1e-2)),
    "LoRA: merge, then SFT": sweep(LORA, merge=(1.0, 0.5, 1.5), lr=LORA_RATES),
    "LoRA: expert's weights, then SFT": sweep(replace(LORA, vector="way"), merge=(1.0, 0.75), lr=LORA_RATES),
    "LoRA: gradnorm": pulled(replace(LORA, scaling="gradnorm"), (0.03, 0.1, 0.3, 1.0), (0.1, 0.3, 1.0), (0.3, 1.0)),
    "LoRA: gradnorm, anchor": pulled(
        anchored(replace(LORA, scaling="gradnorm")), (0.5, 1.0, 2.0, 4.0), (1.0, 2.0, 4.0), (2.0, 4.0, 8.0)
    ),
    "LoRA along prior: SFT": sweep(ALONG, lr=LORA_RATES[:4]),
    "LoRA along prior: decoupled, annealed": pulled(
        annealed(replace(ALONG, scaling="decoupled")), (2.0, 4.0, 8.0), (4.0, 8.0, 16.0), (8.0, 16.0)
    ),
    "LoRA along prior: gradnorm, anchor": pulled(
        anchored(replace(ALONG, scaling="gradnorm")), (0.5, 1.0, 2.0, 4.0), (1.0, 2.0, 4.0), (2.0, 4.0, 8.0)
    ),
}


def entries(*names: str, world: World = CLEAN) -> tuple[Entry, ...]:
    """The entries of FORMS with these names."""
    return tuple(Entry(name, FORMS[name], world) for name in names)


def over_alpha(name: str, field: str, values: Sequence[float]) -> tuple[Entry, ...]:
    """A form at the given values of a field."""
    return tuple(Entry(name, fixed(FORMS[name], **{field: value}), x=value) for value in values)


def of_modules() -> tuple[Entry, ...]:
    """The entries for single modules, which may need other alphas than both together."""
    forms = {name: FORMS[name] for name in ("gradnorm", "adaptive_cosine", "adaptive_cosine, anchor")}
    made = []
    for name, arms in forms.items():
        for modules, more in (("attn", (0.25, 2.0)), ("mlp", (64.0, 128.0) if arms[0].anchor else (8.0, 16.0))):
            wider = dict.fromkeys((*arms, *sweep(arms[0], alpha=more)))
            made.append(Entry(f"{name}: {modules}", tuple(replace(arm, modules=modules) for arm in wider)))
    both = [Entry(f"{name}: both", FORMS[name]) for name in ("absolute", *forms, "decoupled")]
    return (*entries("SFT"), *made, *both)


def of_ranks() -> tuple[Entry, ...]:
    full, lora = "adaptive_cosine, anchor", "LoRA along prior: gradnorm, anchor"
    lines = {full: FORMS[full], lora: ADAPTERS[lora]}
    whole = [Entry(f"{line}, whole", arms) for line, arms in lines.items()]
    low = [Entry(line, arms, x=rank, then=(("prior_rank", rank),)) for line, arms in lines.items() for rank in RANKS]
    return (*whole, *low)


def of_noise() -> tuple[Entry, ...]:
    rivals = ("SFT", "merge, then SFT", "expert's weights, then SFT")
    lines = (*rivals, "adaptive_cosine", "adaptive_cosine, annealed", "adaptive_cosine, anchor")
    shares = (0.0, 0.25, 0.5)
    return tuple(Entry(line, FORMS[line], World(noise=share), 100 * share) for line in lines for share in shares)


def of_experts() -> tuple[Entry, ...]:
    lines = ("merge, then SFT", "adaptive_cosine", "adaptive_cosine, anchor")
    made = [
        Entry(line, FORMS[line], World(expert_steps=steps), x=steps or Settings().expert.steps)
        for line in lines
        for steps in (60, 100, 200, None)
    ]
    random = [Entry(f"{line}, random direction", FORMS[line], then=(("random", True),)) for line in lines[1:]]
    return (*entries("SFT"), *random, *made)


CONSTANT = Entry("constant", FORMS["adaptive_cosine"])
MAIN = Experiment(
    "Does a text expert's prior bring its reasoning to a model that sees, and more of it than merging does?",
    entries(*FORMS),
    references=("SFT", "merge, then SFT", "expert's weights, then SFT"),
    figures=("dots", "front"),
    scores=("held_out_sums", "seen_sums", "reading"),
    seeds=20,
)
EXPERIMENTS: dict[str, Experiment] = {
    "main": MAIN,
    "scalings": Experiment(
        "Which scaling, and on which modules?",
        of_modules(),
        references=("SFT", "adaptive_cosine: both"),
        figures=("dots", "loss"),
    ),
    "noise": Experiment(
        "What do wrong sums in the fine-tuning's data do?",
        of_noise(),
        figures=("lines",),
        references=("SFT", "merge, then SFT", "expert's weights, then SFT"),
        x_label="wrong sums in the fine-tuning, %",
    ),
    "perception": Experiment(
        "Is what the model could see before kept?",
        MAIN.entries,
        references=("no fine-tuning", "SFT"),
        scores=("reading", "single_digits", "single_answers"),
        seeds=MAIN.seeds,
    ),
    "expert": Experiment(
        "How good must the expert be, and is it the direction that helps?",
        of_experts(),
        figures=("lines",),
        references=("SFT", "merge, then SFT"),
        x_label="steps of the expert's training",
    ),
    "family": Experiment(
        "Does it hold for another family, LLaVA around Llama?",
        entries(
            "no fine-tuning",
            "task arithmetic",
            "SFT",
            "merge, then SFT",
            "expert's weights, then SFT",
            "adaptive_cosine",
            "adaptive_cosine, annealed",
            "adaptive_cosine, anchor",
            "decoupled, anchor",
            world=World("llava"),
        ),
        references=("SFT", "merge, then SFT", "expert's weights, then SFT"),
        figures=("dots", "front"),
        scores=("held_out_sums", "seen_sums", "reading"),
    ),
    "alpha": Experiment(
        "How much pull?",
        (
            *entries("SFT"),
            *over_alpha("merge, then SFT", "merge", (0.5, 1.0, 1.5, 2.0)),
            *over_alpha("adaptive_cosine", "alpha", ALPHAS),
            *over_alpha("adaptive_cosine, annealed", "alpha", (1.0, 2.0, 4.0, 8.0)),
            *over_alpha("adaptive_cosine, anchor", "alpha", (2.0, 4.0, 8.0, 16.0, 32.0)),
        ),
        figures=("lines", "front"),
        x_label="alpha, or the weight of the merge (log scale)",
    ),
    "schedules": Experiment(
        "When should the pull end?",
        (
            *entries("SFT"),
            CONSTANT,
            Entry("falls to 0 at the end", falling(1.0, (0.5, 1.0, 2.0, 4.0), (1.0, 2.0, 4.0), (2.0, 4.0, 8.0))),
            Entry("falls to 0 at 1/2", FORMS["adaptive_cosine, annealed"]),
            Entry("falls to 0 at 1/4", falling(0.25, (2.0, 4.0, 8.0, 16.0, 32.0), (4.0, 8.0, 16.0), (8.0, 16.0))),
            Entry("anchor", FORMS["adaptive_cosine, anchor"]),
        ),
        references=("SFT", "constant"),
    ),
    "adapters": Experiment(
        "Does it hold for LoRA?",
        (*(Entry(name, arms) for name, arms in ADAPTERS.items()), *entries("adaptive_cosine, anchor")),
        references=("LoRA: SFT", "LoRA: merge, then SFT", "LoRA: expert's weights, then SFT"),
        figures=("dots", "front"),
        scores=("held_out_sums", "seen_sums", "reading"),
    ),
    "ranks": Experiment(
        "How much of the prior is needed?",
        of_ranks(),
        references=(),
        figures=("lines",),
        x_label="rank of the prior's deltas (log scale)",
    ),
}


def chosen(name: str, **values: float) -> Entry:
    """A form with the settings that `main` chose for it; tests/test_evidence.py compares them."""
    return Entry(name, fixed(FORMS[name], **values))


DEMO = Experiment(
    "Does a text expert's prior transfer its reasoning to a model that sees?",
    (
        *entries("no fine-tuning"),
        chosen("task arithmetic", merge=1.0),
        chosen("SFT", lr=5e-4),
        chosen("merge, then SFT", merge=1.5, lr=2.5e-4),
        chosen("expert's weights, then SFT", merge=1.0, lr=1e-4),
        chosen("gradnorm, annealed", alpha=2.0),
        chosen("adaptive_cosine", alpha=2.0, lr=2.5e-4),
        chosen("adaptive_cosine, anchor", alpha=8.0),
        chosen("decoupled, anchor", alpha=640.0),
        Entry(
            "LoRA along prior: gradnorm, anchor",
            fixed(ADAPTERS["LoRA along prior: gradnorm, anchor"], alpha=2.0, lr=2.5e-3),
        ),
    ),
    figures=("front", "loss"),
    scores=("held_out_sums", "seen_sums", "reading"),
    seeds=2,
)

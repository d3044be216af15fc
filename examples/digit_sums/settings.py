"""Every number of the experiment: chosen once for all seeds, and the same for all arms but for an arm's own knobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One training run: AdamW, a cosine learning rate after a short warm-up, gradients clipped by their global norm."""

    steps: int
    lr: float
    batch_size: int = 16
    warmup: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Arm:
    """One way from the multimodal model to a model that adds."""

    name: str
    tuned: bool = True
    merge: float = 0.0  # how much of the task vector (expert - base) is added before the fine-tuning
    scaling: str | None = None  # how the prior acts during the fine-tuning; None: there is no prior
    alpha: float = 0.0
    anneal: float | None = None  # alpha falls linearly to 0 over this part of the fine-tuning; None: it stays
    anchor: bool = False  # the pull is by what is left of the way to the expert
    rank: int | None = None  # of LoRA adapters, which are trained in place of the weights; None: there are none
    along: bool = False  # the adapters begin along the prior
    prior_rank: int | None = None  # of the prior's deltas; None: they are whole
    in_short: bool = True  # whether the short run has it


@dataclass(frozen=True)
class Settings:
    base: Stage = Stage(steps=300, lr=1e-3)
    expert: Stage = Stage(steps=400, lr=1e-3)
    reader: Stage = Stage(steps=500, lr=1e-3)
    tuning: Stage = Stage(steps=200, lr=5e-4)
    adapters: Stage = Stage(steps=200, lr=5e-3)  # the tuning of arms that train adapters
    reader_examples: int = 4000
    tuning_examples: int = 400
    test_images: int = 500  # of scikit-learn's 1,797; no stage trains on them
    test_examples: int = 400  # of held-out pairs, and as many of seen pairs

    def total_steps(self, arms: Sequence[Arm]) -> int:
        """Optimizer steps of one seed."""
        tuned = sum(self.stage(arm).steps for arm in arms if arm.tuned)
        return self.base.steps + self.expert.steps + self.reader.steps + tuned

    def stage(self, arm: Arm) -> Stage:
        """The fine-tuning of an arm."""
        return self.tuning if arm.rank is None else self.adapters


RANK = 16  # of all adapters

ARMS = (
    Arm("no fine-tuning", tuned=False),
    Arm("merge", tuned=False, merge=1.0),
    Arm("SFT"),
    Arm("merge, then SFT", merge=1.0),
    Arm("gradnorm", scaling="gradnorm", alpha=1.0, in_short=False),
    Arm("gradnorm, annealed", scaling="gradnorm", alpha=2.0, anneal=0.5),
    Arm("gradnorm, anchor", scaling="gradnorm", alpha=3.0, anchor=True, in_short=False),
    Arm("adaptive_cosine", scaling="adaptive_cosine", alpha=1.0),
    Arm("adaptive_cosine, annealed", scaling="adaptive_cosine", alpha=2.0, anneal=0.5, in_short=False),
    Arm("adaptive_cosine, anchor", scaling="adaptive_cosine", alpha=8.0, anchor=True),
    Arm("decoupled, annealed", scaling="decoupled", alpha=60.0, anneal=0.5, in_short=False),
    Arm("decoupled, anchor", scaling="decoupled", alpha=80.0, anchor=True),
    Arm("LoRA: SFT", rank=RANK, in_short=False),
    Arm("LoRA: merge, then SFT", rank=RANK, merge=1.0, in_short=False),
    Arm("LoRA, anchor", rank=RANK, scaling="gradnorm", alpha=1.0, anchor=True, in_short=False),
    Arm(
        "LoRA along prior, annealed",
        rank=RANK,
        along=True,
        scaling="decoupled",
        alpha=4.0,
        anneal=0.5,
        in_short=False,
    ),
    Arm("LoRA along prior, anchor", rank=RANK, along=True, scaling="gradnorm", alpha=1.0, anchor=True),
)

"""Every number of a run: the stages, the sizes, and what one run differs in from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TUNING_SEEDS = (1000, 1001, 1002)  # settings are chosen on these, and reported on seeds from 0 on

RANK = 16  # of all adapters

# What is added when models are merged: the expert's task vector, expert - base; what TIES makes of it and the reader's
# own, reader - base, which then replaces the latter; or the whole way to the expert, expert - reader.
Vector = Literal["task", "ties", "way"]


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
class Settings:
    base: Stage = Stage(steps=300, lr=1e-3)
    expert: Stage = Stage(steps=400, lr=1e-3)
    reader: Stage = Stage(steps=600, lr=1e-3)
    tuning: Stage = Stage(steps=200, lr=5e-4)
    adapters: Stage = Stage(steps=200, lr=5e-3)  # the tuning of arms that train adapters
    reader_examples: int = 4000  # of two images, and a quarter as many of one
    tuning_examples: int = 400
    test_images: int = 500  # of scikit-learn's 1,797; no stage trains on them
    test_examples: int = 400  # of held-out pairs, as many of seen pairs, and as many single digits


@dataclass(frozen=True)
class World:
    """What a run finds: the models and the data of the fine-tuning."""

    family: str = "qwen2_5_vl"
    expert_steps: int | None = None  # of the expert's training; None: those of the settings
    noise: float = 0.0  # the share of the fine-tuning's answers that end in a wrong sum


@dataclass(frozen=True)
class Arm:
    """One way from the multimodal model to a model that adds."""

    tuned: bool = True
    lr: float | None = None  # of the fine-tuning; None: that of the settings
    merge: float = 0.0  # how much of `vector` is added before the fine-tuning
    vector: Vector = "task"
    density: float = 1.0  # what TIES keeps of each vector
    scaling: str | None = None  # how the prior acts during the fine-tuning; None: there is no prior
    alpha: float = 0.0
    anneal: float | None = None  # alpha falls linearly to 0 over this part of the fine-tuning; None: it stays
    anchor: bool = False  # the pull is by what is left of the way to the expert
    modules: str = "default"  # whose deltas the prior has
    random: bool = False  # the deltas point anywhere, and have the norms of the prior's
    rank: int | None = None  # of LoRA adapters, which are trained in place of the weights; None: there are none
    along: bool = False  # the adapters begin along the prior
    prior_rank: int | None = None  # of the prior's deltas; None: they are whole

    def __post_init__(self) -> None:
        if self.scaling is None and (self.alpha or self.anneal or self.anchor or self.random):
            raise ValueError("alpha, anneal, anchor and random are of a prior: expected a scaling too")
        if self.rank is None and self.along:
            raise ValueError("along is of adapters: expected a rank too")
        if self.rank is not None and self.random:
            raise ValueError("random is of whole weights: expected no rank")
        if self.vector != "ties" and self.density != 1.0:
            raise ValueError("density is of TIES: expected the vector to be ties")


@dataclass(frozen=True)
class Run:
    """One arm, in one world, with one seed: all that its scores depend on, but for the settings."""

    seed: int
    world: World
    arm: Arm

"""Every number of a run: the stages, the sizes, and how runs differ from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TUNING_SEEDS = (1000, 1001, 1002)  # settings are chosen on these, and reported on seeds from 0 on

RANK = 16  # of all adapters

# What merging adds: the expert's task vector, expert - base; the TIES merge of that and the reader's task vector,
# reader - base, which it replaces; or the whole way to the expert, expert - reader.
Vector = Literal["task", "ties", "way"]


@dataclass(frozen=True)
class Stage:
    """A training run: AdamW, a cosine learning rate after a short warm-up, gradients clipped by their global norm."""

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
    adapters: Stage = Stage(steps=200, lr=5e-3)  # fine-tuning of arms that train adapters
    reader_examples: int = 4000  # with two images, and a quarter as many with one
    tuning_examples: int = 400
    test_images: int = 500  # of scikit-learn's 1,797; no stage trains on them
    test_examples: int = 400  # of held-out pairs, as many of seen pairs, and as many single digits


@dataclass(frozen=True)
class World:
    """The conditions of a run: the models and the data of the fine-tuning."""

    family: str = "qwen2_5_vl"
    expert_steps: int | None = None  # of the expert's training; None: the settings' value
    noise: float = 0.0  # the share of the fine-tuning's answers that end in a wrong sum


@dataclass(frozen=True)
class Arm:
    """A way to turn the multimodal model into a model that adds."""

    tuned: bool = True
    lr: float | None = None  # of the fine-tuning; None: the settings' value
    merge: float = 0.0  # the weight of `vector` added before the fine-tuning
    vector: Vector = "task"
    density: float = 1.0  # the share of each vector that TIES keeps
    scaling: str | None = None  # the prior's scaling during the fine-tuning; None: no prior
    alpha: float = 0.0
    anneal: float | None = None  # alpha decreases linearly to 0 over this part of the fine-tuning; None: constant
    anchor: bool = False  # the pull is proportional to the remaining distance to the expert
    modules: str = "default"  # the modules that the prior has deltas for
    random: bool = False  # the deltas have random directions and the norms of the prior's
    rank: int | None = None  # of LoRA adapters, which are trained instead of the weights; None: no adapters
    along: bool = False  # the adapters are initialized along the prior
    prior_rank: int | None = None  # of the prior's deltas; None: full rank

    def __post_init__(self) -> None:
        if self.scaling is None and (self.alpha or self.anneal or self.anchor or self.random):
            raise ValueError("alpha, anneal, anchor and random need a prior: expected a scaling too")
        if self.rank is None and self.along:
            raise ValueError("along needs adapters: expected a rank too")
        if self.rank is not None and self.random:
            raise ValueError("random cannot be combined with adapters: expected no rank")
        if self.vector != "ties" and self.density != 1.0:
            raise ValueError("density needs TIES: expected the vector to be ties")


@dataclass(frozen=True)
class Run:
    """An arm in a world with a seed: everything that the scores depend on, except the settings."""

    seed: int
    world: World
    arm: Arm

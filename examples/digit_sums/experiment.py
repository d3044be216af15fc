"""One seed of the experiment: three models, the prior built from them, and every arm from the same start."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration

from drift_kernels import AlphaScheduler, FusedDriftAdamW, Prior, linear_anneal
from drift_kernels.integrations.peft import lora_prior
from drift_kernels.prior.summary import group_deltas

from .data import ALL_PAIRS, DigitImages, Example, chain, image_examples, reading, split_pairs, text_examples
from .models import multimodal_model, random_adapters, text_model
from .priors import drift_prior, merge
from .settings import Arm, Settings, Stage
from .train import LossCurve, answers, fit


class SeedRun:
    """All of one seed.

    Args:
        seed: decides the first weights, the images set aside, the split of the pairs, and the order of the examples.
        settings: the stages and the sizes.
        folder: for the checkpoints and the priors.
        after_step: called after every optimizer step with the name of the stage or the arm.
    """

    def __init__(self, seed: int, settings: Settings, folder: Path, after_step: Callable[[str], object]) -> None:
        self.seed, self.settings, self.folder, self.after_step = seed, settings, folder, after_step
        images = DigitImages(seed, settings.test_images)
        rng = random.Random(seed)
        seen, held_out = split_pairs(rng)
        self.readings = image_examples(ALL_PAIRS, images.train, settings.reader_examples, reading, rng)
        self.tuning_sums = image_examples(seen, images.train, settings.tuning_examples, chain, rng)
        self.seen_sums = image_examples(seen, images.test, settings.test_examples, chain, rng)
        self.held_out_sums = image_examples(held_out, images.test, settings.test_examples, chain, rng)

    def run(self, arms: Sequence[Arm]) -> dict[str, Any]:
        """The record of the seed: how well its expert adds, how much of the prior its low-rank forms keep, and each
        arm's scores and loss curve."""
        expert = self.make_models()
        self.make_priors()
        kept = {rank: self.make_prior(rank) for rank in {arm.prior_rank for arm in arms} if rank is not None}
        return {
            "seed": self.seed,
            "expert": expert,
            "kept_energy": kept,
            "arms": {arm.name: self.run_arm(arm) for arm in arms},
        }

    def make_models(self) -> float:
        """Train and save the base, the expert and the reader; returns the share of text sums the expert gets right."""
        text_sums = text_examples(chain)
        base = text_model(self.seed)
        self._fit("base", base, text_examples(reading), self.settings.base)
        expert = copy.deepcopy(base)
        self._fit("expert", expert, text_sums, self.settings.expert)
        reader = multimodal_model(base, self.seed)
        self._fit("reader", reader, self.readings, self.settings.reader)
        for name, model in (("base", base), ("expert", expert), ("reader", reader)):
            model.save_pretrained(self.folder / name)
        return share_right(answers(expert, text_sums), text_sums)

    def make_priors(self) -> None:
        """The prior of DRIFT (expert - reader), and the task vector of merging (expert - base)."""
        self._build("prior")
        self._build("task_vector", "--reference", self.folder / "base")

    def make_prior(self, rank: int) -> float:
        """The prior in low-rank form; returns the part of its energy that is kept."""
        self._build(f"prior_{rank}", "--rank", rank)
        (group,) = group_deltas(Prior.open(self.folder / f"prior_{rank}"), lambda name: True).values()
        return 1.0 if group.kept_energy is None else group.kept_energy

    def _build(self, name: str, *options: object) -> None:
        models = ["--expert", self.folder / "expert", "--base", self.folder / "reader", "--overwrite"]
        drift_prior("build", *models, "--out", self.folder / name, *options)

    def run_arm(self, arm: Arm) -> dict[str, Any]:
        """From the saved reader to a model that adds: the arm's scores, and the loss curve of its fine-tuning."""
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(self.folder / "reader")
        if arm.merge:
            merge(model, self.folder / "task_vector", arm.merge)
        loss = self._tune(model, arm) if arm.tuned else []
        return {"scores": self.scores(model), "loss": loss}

    def scores(self, model: PreTrainedModel) -> dict[str, float]:
        """On unseen images: right chains for held-out and for seen pairs, and right readings, whatever follows them."""
        held_out, seen = answers(model, self.held_out_sums), answers(model, self.seen_sums)
        return {
            "held_out_sums": share_right(held_out, self.held_out_sums),
            "seen_sums": share_right(seen, self.seen_sums),
            "reading": share_read(held_out + seen, self.held_out_sums + self.seen_sums),
        }

    def _tune(self, model: PreTrainedModel, arm: Arm) -> LossCurve:
        folder = self.folder / ("prior" if arm.prior_rank is None else f"prior_{arm.prior_rank}")
        tuned, prior = model, folder
        if arm.rank is not None:
            tuned = self._with_adapters(model, folder, arm)
            prior = lora_prior(tuned, folder)
        drift: dict[str, Any] = {}
        if arm.scaling:
            drift = {"prior": prior, "prior_scaling": arm.scaling, "alpha": arm.alpha, "anchor": arm.anchor}
        loss = self._fit(arm.name, tuned, self.tuning_sums, self.settings.stage(arm), arm.anneal, **drift)
        if tuned is not model:
            tuned.merge_and_unload()  # into `model`
        return loss

    def _with_adapters(self, model: PreTrainedModel, prior: Path, arm: Arm) -> PeftModel:
        """On the language model's attention and MLP projections; all else is frozen."""
        if not arm.along:
            return random_adapters(model, arm.rank, self.seed)
        start = self.folder / "adapters"
        drift_prior(
            "init-lora", prior, "--base", self.folder / "reader", "--rank", arm.rank, "--out", start, "--overwrite"
        )
        return PeftModel.from_pretrained(model, start, is_trainable=True)

    def _fit(
        self,
        name: str,
        model: PreTrainedModel,
        examples: list[Example],
        stage: Stage,
        anneal: float | None = None,
        **drift: Any,
    ) -> LossCurve:
        optimizer = FusedDriftAdamW(
            [(name, param) for name, param in model.named_parameters() if param.requires_grad],
            lr=stage.lr,
            weight_decay=stage.weight_decay,
            max_grad_norm=stage.max_grad_norm,
            **drift,
        )
        after_step = [lambda: self.after_step(name)]
        if anneal:
            after_step.append(AlphaScheduler(optimizer, linear_anneal(round(anneal * stage.steps))).step)
        return fit(model, examples, optimizer, stage, after_step, seed=self.seed, folder=self.folder / "trainer")


def share_right(said: list[str], examples: list[Example]) -> float:
    """The share of answers that are right to the last character."""
    return sum(text == example.answer for text, example in zip(said, examples, strict=True)) / len(examples)


def share_read(said: list[str], examples: list[Example]) -> float:
    """The share of answers whose part before the "=" names the two digits."""
    read = [text.partition("=")[0] for text in said]
    return sum(text == reading(example.pair) for text, example in zip(read, examples, strict=True)) / len(examples)

"""One run: turns the saved reader into a model that adds, and scores it."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from drift_kernels import AlphaScheduler, linear_anneal
from drift_kernels.integrations.peft import lora_prior

from .checkpoints import Checkpoints
from .data import Example, with_wrong_sums
from .priors import add, kept_energy, random_direction
from .settings import Arm, Run, Settings, Stage
from .train import LossCurve, adamw, answers, fit, share_read, share_right

PROJECTIONS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"  # the modules with adapters


def stage_of(arm: Arm, settings: Settings) -> Stage:
    """The fine-tuning of an arm."""
    stage = settings.tuning if arm.rank is None else settings.adapters
    return replace(stage, steps=stage.steps if arm.tuned else 0, lr=arm.lr or stage.lr)


class Runner:
    """Makes one run.

    Args:
        run: the seed, the world and the arm.
        settings: the stages and the sizes.
        root: folder of the checkpoints (`Checkpoints`).
        after_step: called after every optimizer step with the name of what is trained.
    """

    def __init__(self, run: Run, settings: Settings, root: Path, after_step: Callable[[str], object]) -> None:
        self.seed, self.world, self.arm = run.seed, run.world, run.arm
        self.settings, self.after_step = settings, after_step
        self.checkpoints = Checkpoints(run.seed, settings, run.world, root, after_step)
        self.family, self.data = self.checkpoints.family, self.checkpoints.data()

    def record(self) -> dict[str, Any]:
        """The scores, the loss curve, and for a low-rank prior the share of energy that it keeps."""
        model = self.family.MODEL.from_pretrained(self.checkpoints.reader())
        self.merge(model)
        loss = self.tune(model) if self.arm.tuned else []
        record: dict[str, Any] = {"scores": self.scores(model), "loss": loss}
        if self.arm.prior_rank is not None:
            record["kept_energy"] = kept_energy(self.prior())
        return record

    def merge(self, model: PreTrainedModel) -> None:
        """Merge in place."""
        arm, made = self.arm, self.checkpoints
        if arm.merge and arm.vector == "ties":
            add(model, made.own_vector(), -1.0)
            add(model, made.ties_vector(arm.density), arm.merge)
        elif arm.merge:
            add(model, made.task_vector() if arm.vector == "task" else made.prior(), arm.merge)

    def tune(self, model: PreTrainedModel) -> LossCurve:
        """Fine-tune in place; adapters are merged into the weights afterwards."""
        arm, tuned = self.arm, model
        if arm.rank is not None:
            tuned = self.with_adapters(model)
        drift: dict[str, Any] = {}
        if arm.scaling:
            drift = {"prior_scaling": arm.scaling, "alpha": arm.alpha, "anchor": arm.anchor}
            drift["prior"] = self.prior() if arm.rank is None else lora_prior(tuned, self.prior())
            if arm.random:
                drift["prior"] = random_direction(self.prior(), self.seed)
        stage = stage_of(arm, self.settings)
        optimizer = adamw(tuned, stage, **drift)
        after_step = [lambda: self.after_step("fine-tuning")]
        if arm.anneal:
            after_step.append(AlphaScheduler(optimizer, linear_anneal(round(arm.anneal * stage.steps))).step)
        with tempfile.TemporaryDirectory() as folder:
            loss = fit(
                tuned, self.sums(), self.family, optimizer, stage, after_step, seed=self.seed, folder=Path(folder)
            )
        if tuned is not model:
            tuned.merge_and_unload()  # into `model`
        return loss

    def prior(self) -> Path:
        return self.checkpoints.prior(self.arm.modules, self.arm.prior_rank, biases=self.arm.rank is None)

    def sums(self) -> list[Example]:
        """The fine-tuning's examples."""
        return with_wrong_sums(self.data.tuning_sums, self.world.noise, random.Random(self.seed))

    def with_adapters(self, model: PreTrainedModel) -> PeftModel:
        """Add adapters to the language model's attention and MLP projections; everything else is frozen."""
        if self.arm.along:
            start = self.checkpoints.adapters(self.prior(), self.arm.rank)
            return PeftModel.from_pretrained(model, start, is_trainable=True)
        torch.manual_seed(self.seed)
        return get_peft_model(model, LoraConfig(r=self.arm.rank, lora_alpha=self.arm.rank, target_modules=PROJECTIONS))

    def scores(self, model: PreTrainedModel) -> dict[str, float]:
        """The scores on images that no stage was trained on: correct chains for held-out and for seen pairs; correct
        readings of both digits, whatever follows; and for single images, which the reader was trained on but the
        fine-tuning does not show, the digit named, whatever follows, and the digit named and nothing else."""
        held_out, seen, single = (
            answers(model, examples, self.family)
            for examples in (self.data.held_out_sums, self.data.seen_sums, self.data.single_digits)
        )
        return {
            "held_out_sums": share_right(held_out, self.data.held_out_sums),
            "seen_sums": share_right(seen, self.data.seen_sums),
            "reading": share_read(held_out + seen, self.data.held_out_sums + self.data.seen_sums),
            "single_digits": share_right([text[:1] for text in single], self.data.single_digits),
            "single_answers": share_right(single, self.data.single_digits),
        }

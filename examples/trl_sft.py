"""TRL's SFTTrainer: like transformers' Trainer; it tokenizes, and computes the loss on the completions only."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from drift_kernels import linear_anneal
from drift_kernels.integrations.transformers import use_drift

from . import tiny
from .transformers_trainer import StopAfter, arguments, figures


def build(
    prior: tiny.Prior | None, folder: Path, steps: int = tiny.STEPS, stop_after: int | None = None, **options: Any
) -> SFTTrainer:
    """An SFTTrainer; `options` are passed to FusedDriftAdamW."""
    texts = [tiny.text(pair) for pair in tiny.training_pairs(steps * tiny.BATCH_SIZE)]
    trainer = SFTTrainer(
        model=tiny.base_model(),
        args=SFTConfig(**arguments(folder, steps), bf16=False),
        processing_class=tiny.tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in texts]),
        callbacks=[StopAfter(stop_after)],
    )
    use_drift(trainer, prior=prior, alpha_lambda=linear_anneal(steps), **{"alpha": tiny.ALPHA, **options})
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(prior: tiny.Prior | None, folder: Path, *, resume: bool = False, **options: Any) -> Any:
    """Return the fine-tuned model."""
    trainer = build(prior, folder, **options)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if resume else None)
    return trainer.model


def quiet() -> None:
    tiny.quiet()
    disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)  # from TRL's calls to transformers


if __name__ == "__main__":
    quiet()
    with TemporaryDirectory() as folder:
        tiny.show(partial(train, folder=Path(folder)))
        trainer = build(tiny.expert_prior(), Path(folder))
        trainer.train()
        print("Added to the logs, first and last entry:", *figures(trainer), sep="\n")

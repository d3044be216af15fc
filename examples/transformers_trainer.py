"""transformers' Trainer: `use_drift` gives it the optimizer, and a callback that schedules alpha and logs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from drift_kernels import linear_anneal
from drift_kernels.integrations.transformers import use_drift

from . import tiny


class StopAfter(TrainerCallback):
    """Saves a checkpoint and stops, like an interrupted run."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def arguments(folder: Path, steps: int) -> dict[str, Any]:
    """The training arguments of a quiet CPU run."""
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": tiny.BATCH_SIZE,
        "learning_rate": tiny.LR,
        "lr_scheduler_type": "cosine",
        "logging_steps": max(1, steps // 4),
        "save_strategy": "no",
        "report_to": "none",
        "log_level": "error",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def build(
    prior: tiny.Prior | None, folder: Path, steps: int = tiny.STEPS, stop_after: int | None = None, **options: Any
) -> Trainer:
    """A Trainer; `options` are passed to FusedDriftAdamW."""
    trainer = Trainer(
        model=tiny.base_model(),
        args=TrainingArguments(**arguments(folder, steps)),
        train_dataset=[tiny.encoded(pair) for pair in tiny.training_pairs(steps * tiny.BATCH_SIZE)],
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


def figures(trainer: Trainer) -> list[dict[str, float]]:
    """The prior's metrics in the first and the last log entry of the training."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{key: round(value, 3) for key, value in entries[i].items() if "prior/" in key} for i in (0, -1)]


if __name__ == "__main__":
    tiny.quiet()
    with TemporaryDirectory() as folder:
        tiny.show(partial(train, folder=Path(folder)))
        trainer = build(tiny.expert_prior(), Path(folder))
        trainer.train()
        print("Added to the logs, first and last entry:", *figures(trainer), sep="\n")

"""A four-step run of transformers' Trainer, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from drift_kernels import FusedDriftAdamW
from examples import tiny

STEPS = 4


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "log_level": "error",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**{**defaults, **options})


def fit(args: TrainingArguments, model: nn.Module | None = None, **options: Any) -> Trainer:
    rows = [tiny.encoded(pair) for pair in tiny.training_pairs(64)]
    trainer = Trainer(
        model=model if model is not None or "model_init" in options else tiny.base_model(),
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:8],
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def drift_of(trainer: Trainer) -> FusedDriftAdamW:
    return trainer.optimizer.optimizer


class Tracker(TrainerCallback):
    """Records the logs that a previously registered tracker receives."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self.entries.append(dict(logs))

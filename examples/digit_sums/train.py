"""Training through transformers' Trainer, and answers through `generate`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

from drift_kernels import FusedDriftAdamW

from .data import LONGEST_ANSWER, Example, collate, decode, reading
from .families import Family
from .settings import Stage

LossCurve = list[tuple[int, float]]  # (step, mean loss of the steps since the last one)

LOG_EVERY = 10


class AfterStep(TrainerCallback):
    """Calls functions after every optimizer step."""

    def __init__(self, *functions: Callable[[], object]) -> None:
        self.functions = functions

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        for function in self.functions:
            function()


def fit(
    model: PreTrainedModel,
    examples: list[Example],
    family: Family,
    optimizer: Optimizer,
    stage: Stage,
    after_step: Sequence[Callable[[], object]],
    *,
    seed: int,
    folder: Path,
) -> LossCurve:
    """Train in place. Only the seed determines the order of the examples. `folder` is for the Trainer, which leaves it
    empty."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size,
        max_grad_norm=0,  # the optimizer clips
        seed=seed,
        logging_steps=LOG_EVERY,
        log_level="error",
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        use_cpu=True,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, round(stage.warmup * stage.steps), stage.steps)
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=functools.partial(collate, family=family),
        train_dataset=examples,
        optimizers=(optimizer, schedule),
        callbacks=[AfterStep(*after_step)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


@torch.inference_mode()
def answers(model: PreTrainedModel, examples: list[Example], family: Family, batch_size: int = 250) -> list[str]:
    """The model's greedy answers to prompts of equal length."""
    model.eval()
    said = []
    for start in range(0, len(examples), batch_size):
        prompts = collate(examples[start : start + batch_size], family, with_answers=False)
        tokens = model.generate(**prompts, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        said += [decode(row) for row in tokens[:, prompts["input_ids"].shape[1] :].tolist()]
    return said


def share_right(said: list[str], examples: list[Example]) -> float:
    """The share of answers that match exactly."""
    return sum(text == example.answer for text, example in zip(said, examples, strict=True)) / len(examples)


def share_read(said: list[str], examples: list[Example]) -> float:
    """The share of answers whose part before the "=" names the digits."""
    read = [text.partition("=")[0] for text in said]
    return sum(text == reading(example.digits) for text, example in zip(read, examples, strict=True)) / len(examples)


def adamw(model: nn.Module, stage: Stage, **drift: Any) -> FusedDriftAdamW:
    """The optimizer of every stage. It clips the gradient after the prior has acted on it."""
    return FusedDriftAdamW(
        [(name, param) for name, param in model.named_parameters() if param.requires_grad],
        lr=stage.lr,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        **drift,
    )

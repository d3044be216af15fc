"""TRL's DPOTrainer: the model learns to prefer right sums to wrong ones. The reference model is TRL's own, and frozen.

DPOTrainer has no `optimizer_cls_and_kwargs`; `use_drift` gives it the optimizer after it has been made.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer

from drift_kernels.integrations.transformers import use_drift

from . import tiny
from .transformers_trainer import StopAfter, arguments, figures
from .trl_sft import quiet

# With gradnorm the pull scales with the gradient; the anchor ends it at the expert.
OPTIONS = {"prior_scaling": "gradnorm", "alpha": 3.0, "anchor": True}
LORA = {"r": 8, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
STEPS, LR, ADAPTERS_LR = 40, 2e-3, 1e-2


def preferences(count: int) -> Dataset:
    """`count` sums of the pairs to fine-tune on, each with a right and a wrong answer."""
    rng = random.Random(3)
    rows = []
    for pair in tiny.training_pairs(count):
        prompt, chosen = tiny.text(pair)
        wrong = (tiny.right(pair) + rng.randrange(1, 10)) % 10
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": f" {wrong}"})
    return Dataset.from_list(rows)


def build(
    prior: tiny.Prior | None,
    folder: Path,
    steps: int = STEPS,
    stop_after: int | None = None,
    adapters: bool = False,
    seed: int = 0,
    **options: Any,
) -> DPOTrainer:
    """A DPOTrainer of the weights, or of adapters; `options` are passed to use_drift."""
    tiny.base_model().save_pretrained(folder / "base")
    lr = ADAPTERS_LR if adapters else LR
    run = {**arguments(folder / "run", steps), "learning_rate": lr}
    trainer = DPOTrainer(
        model=str(folder / "base"),
        args=DPOConfig(**run, seed=seed, bf16=False),
        processing_class=tiny.tokenizer(),
        train_dataset=preferences(steps * tiny.BATCH_SIZE),
        peft_config=LoraConfig(**LORA) if adapters else None,
        callbacks=[StopAfter(stop_after)],
    )
    trainer.remove_callback(PrinterCallback)
    use_drift(trainer, prior=prior, **{**OPTIONS, **options})
    return trainer


def train(prior: tiny.Prior | None, folder: Path, *, resume: bool = False, **options: Any) -> Any:
    """Return the fine-tuned model."""
    trainer = build(prior, folder, **options)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder / "run")) if resume else None)
    return trainer.model


if __name__ == "__main__":
    quiet()
    with TemporaryDirectory() as folder:
        for adapters in (False, True):
            print("LoRA" if adapters else "all weights")
            tiny.show(partial(train, folder=Path(folder) / str(adapters), adapters=adapters), STEPS)
        trainer = build(tiny.expert_prior(), Path(folder))
        trainer.train()
        print("Added to the logs, first and last entry:", *figures(trainer), sep="\n")

"""Unsloth's SFTTrainer, which is TRL's, patched: `use_drift` works the same. Import Unsloth before what it patches."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")

import torch

from unsloth import FastLanguageModel  # isort: skip
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from drift_kernels.integrations.transformers import use_drift

from . import tiny
from .transformers_trainer import arguments

# With adapters, half the steps.
STEPS, RANK = 120, 8
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(folder: Path, *, adapters: bool = False, steps: int = STEPS) -> SFTTrainer:
    """A trainer of `folder/base`, without a prior."""
    model, _ = FastLanguageModel.from_pretrained(
        str(folder / "base"), max_seq_length=16, dtype=torch.float32, load_in_4bit=False, full_finetuning=not adapters
    )
    args = {**arguments(folder / "run", steps), "optim": "adamw_torch", "bf16": False, "dataset_num_proc": 1}
    if adapters:
        model = FastLanguageModel.get_peft_model(
            model, r=RANK, lora_alpha=2 * RANK, lora_dropout=0, target_modules=MODULES, use_gradient_checkpointing=False
        )
        args["learning_rate"] = 10 * tiny.LR
    texts = [tiny.text(pair) for pair in tiny.training_pairs(steps * tiny.BATCH_SIZE)]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**args),
        processing_class=tiny.tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in texts]),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(folder: Path, *, with_prior: bool, adapters: bool = False, steps: int = STEPS) -> SFTTrainer:
    """Fine-tune; return the trainer."""
    trainer = build(folder, adapters=adapters, steps=steps)
    if with_prior:
        options = {"prior_scaling": "gradnorm", "anchor": True} if adapters else {"anneal": 1.0}
        use_drift(trainer, prior=folder / "prior", alpha=tiny.ALPHA, **options)
    trainer.train()
    return trainer


if __name__ == "__main__":
    tiny.quiet()
    with TemporaryDirectory() as name:
        folder = Path(name)
        tiny.write_files(folder)
        for adapters, steps in ((False, STEPS), (True, STEPS // 2)):
            print("LoRA" if adapters else "full")
            for with_prior in (False, True):
                trainer = train(folder, with_prior=with_prior, adapters=adapters, steps=steps)
                which = "with the prior " if with_prior else "without a prior"
                print(f"  held-out loss {which} {tiny.held_out_loss(trainer.model):.3f}")

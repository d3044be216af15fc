"""QLoRA: PEFT's adapters over a base that bitsandbytes stores in 4 bits. The prior is built from the unquantized
checkpoints; its deltas are projected onto the adapters, whose A is initialized along them.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from drift_kernels import build_prior, linear_anneal
from drift_kernels.integrations.transformers import use_drift
from drift_kernels.prior.init_lora import init_lora

from . import tiny
from .transformers_trainer import StopAfter, arguments

RANK, LR = 16, 1e-3
OPTIONS = {"prior_scaling": "decoupled", "alpha": 20.0}


def checkpoints(folder: Path) -> None:
    """Write `base`, `expert`, `prior`, and adapters initialized along the prior."""
    for name, model in zip(("base", "expert"), tiny.base_and_expert(), strict=True):
        model.save_pretrained(folder / name)
    build_prior(folder / "expert", folder / "base", folder / "prior", overwrite=True)
    init_lora(folder / "prior", folder / "base", folder / "start", rank=RANK, overwrite=True)


def quantised_base(folder: Path) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def build(
    with_prior: bool, folder: Path, steps: int = tiny.STEPS, stop_after: int | None = None, **options: Any
) -> Trainer:
    """A Trainer of the adapters; `options` are passed to FusedDriftAdamW."""
    model = PeftModel.from_pretrained(quantised_base(folder), folder / "start", is_trainable=True)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**{**arguments(folder / "run", steps), "learning_rate": LR}),
        train_dataset=[tiny.encoded(pair) for pair in tiny.training_pairs(steps * tiny.BATCH_SIZE)],
        callbacks=[StopAfter(stop_after)],
    )
    prior = folder / "prior" if with_prior else None
    use_drift(trainer, prior=prior, alpha_lambda=linear_anneal(steps), **{**OPTIONS, **options})
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(with_prior: bool, folder: Path, *, resume: bool = False, **options: Any) -> Trainer:
    """Fine-tune; return the Trainer."""
    trainer = build(with_prior, folder, **options)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder / "run")) if resume else None)
    return trainer


def held_out_loss(trainer: Trainer, folder: Path) -> float:
    """The held-out loss of the adapters over the unquantized base."""
    trainer.model.save_pretrained(folder / "adapter")
    return tiny.held_out_loss(PeftModel.from_pretrained(tiny.base_model(), folder / "adapter"))


if __name__ == "__main__":
    tiny.quiet()
    with TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints(folder)
        print(f"held-out loss before fine-tuning       {tiny.held_out_loss(tiny.base_model()):.3f}")
        print(f"              after, without a prior   {held_out_loss(train(False, folder), folder):.3f}")
        print(f"              after, with the prior    {held_out_loss(train(True, folder), folder):.3f}")

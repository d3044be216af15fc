"""Priors for adapters in trainers: TRL's `peft_config`, transformers' Trainer; stopped and resumed bitwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from drift_kernels import linear_anneal
from drift_kernels.integrations import unwrap_optimizer
from drift_kernels.integrations.peft import lora_prior
from drift_kernels.integrations.transformers import DriftCallback, drift_adamw
from examples import tiny
from examples.transformers_trainer import StopAfter, arguments

STEPS = 6
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    tiny.quiet()


def sft_trainer(folder: Path, stop_after: int | None) -> Trainer:
    """A trainer in which TRL adds the adapters."""
    args = SFTConfig(**arguments(folder, STEPS), bf16=False)
    texts = [tiny.text(pair) for pair in tiny.training_pairs(STEPS * tiny.BATCH_SIZE)]
    model = tiny.base_model()
    torch.manual_seed(0)  # of the adapters
    return SFTTrainer(
        model=model,
        args=args,
        processing_class=tiny.tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in texts]),
        peft_config=LORA,
        optimizer_cls_and_kwargs=drift_adamw(
            args, prior=lambda model: lora_prior(model, tiny.expert_prior()), max_grad_norm=1.0
        ),
        callbacks=[DriftCallback(linear_anneal(STEPS)), StopAfter(stop_after)],
    )


def trainer_of_adapters(folder: Path, stop_after: int | None) -> Trainer:
    model = tiny.base_model()
    torch.manual_seed(0)  # of the adapters
    model = get_peft_model(model, LORA)
    args = TrainingArguments(**arguments(folder, STEPS))
    return Trainer(
        model,
        args,
        train_dataset=[tiny.encoded(pair) for pair in tiny.training_pairs(STEPS * tiny.BATCH_SIZE)],
        optimizer_cls_and_kwargs=drift_adamw(
            args, model, prior=lora_prior(model, tiny.expert_prior(), refresh=2), max_grad_norm=1.0
        ),
        callbacks=[DriftCallback(linear_anneal(STEPS)), StopAfter(stop_after)],
    )


def trained(trainer: Any, resume: str | None = None) -> dict[str, Tensor]:
    trainer.train(resume_from_checkpoint=resume)
    optimizer = unwrap_optimizer(trainer.optimizer)
    assert len(optimizer.prior_names) == 2 * sum("_proj.weight" in name for name in tiny.expert_prior())
    assert "prior/cosine/attn" in trainer.state.log_history[0]
    return {name: param.detach().clone() for name, param in trainer.model.named_parameters() if param.requires_grad}


TELLS_THE_MODEL = pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 does not tell the model")


@pytest.mark.parametrize("build", [pytest.param(sft_trainer, marks=TELLS_THE_MODEL), trainer_of_adapters])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_that_stopped_ends_as_one_that_did_not(build: Any, tmp_path: Path) -> None:
    whole = trained(build(tmp_path / "whole", None))
    half = trained(build(tmp_path / "half", STEPS // 2))
    assert not all(torch.equal(half[name], whole[name]) for name in whole)
    last = get_last_checkpoint(str(tmp_path / "half"))
    assert last is not None
    again = trained(build(tmp_path / "half", None), resume=last)
    for name, expected in whole.items():
        assert torch.equal(again[name], expected), name

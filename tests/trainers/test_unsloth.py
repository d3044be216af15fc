"""Unsloth's SFTTrainer on its CPU path: the prior acts, in full and on adapters, and nothing trains without it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("unsloth")

from examples import unsloth_sft as example  # isort: skip  (before what unsloth patches)
import torch
from unsloth import UnslothTrainer, UnslothTrainingArguments

from drift_kernels.integrations import unwrap_optimizer
from drift_kernels.integrations.transformers import use_drift
from examples import tiny
from examples.transformers_trainer import arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny.quiet()
    folder = tmp_path_factory.mktemp("unsloth")
    tiny.write_files(folder)
    return folder


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_the_prior_acts(folder: Path, adapters: bool) -> None:
    steps = example.STEPS // (2 if adapters else 1)
    loss = {}
    for with_prior in (False, True):
        trainer = example.train(folder, with_prior=with_prior, adapters=adapters, steps=steps)
        loss[with_prior] = tiny.held_out_loss(trainer.model)
    assert loss[True] < 0.5 * loss[False]
    drift = unwrap_optimizer(trainer.optimizer)
    weights = [name for name in tiny.expert_prior() if name.endswith(".weight")]
    expected = tiny.expert_prior()
    if adapters:
        expected = [
            f"base_model.model.{w.removesuffix('.weight')}.lora_{f}.default.weight" for w in weights for f in "AB"
        ]
    assert sorted(drift.prior_names) == sorted(expected)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["prior/biased"] == logged[0]["prior/bound"] == len(expected)
    assert logged[0]["prior/ratio/attn"] > 0


def test_alpha_of_zero_is_the_optimizer_alone(folder: Path) -> None:
    models = []
    for settings in ({"prior": None}, {"prior": folder / "prior", "alpha": 0.0}, {"prior": folder / "prior"}):
        trainer = example.build(folder, steps=4)
        use_drift(trainer, **settings)
        trainer.train()
        models.append(trainer.model)
    plain, zero, biased = models
    assert tiny.same(plain, zero)
    assert not tiny.same(plain, biased)


def test_a_trainer_that_makes_an_optimizer_of_its_own_is_stopped(folder: Path, tmp_path: Path) -> None:
    """For an `embedding_learning_rate`: here Unsloth itself rejects it, because of our optimizer."""
    plain = example.build(folder, steps=4)
    args = {**arguments(tmp_path, 4), "optim": "adamw_torch", "bf16": False, "embedding_learning_rate": 1e-5}
    trainer = UnslothTrainer(
        model=plain.model,
        args=UnslothTrainingArguments(**args, dataset_num_proc=1),
        processing_class=tiny.tokenizer(),
        train_dataset=plain.train_dataset,
    )
    before = [param.detach().clone() for param in trainer.model.parameters()]
    use_drift(trainer, prior=folder / "prior")
    with pytest.raises(NotImplementedError, match="embedding_learning_rate cannot be combined"):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))

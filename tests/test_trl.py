"""TRL beyond SFT: preferences (DPO) and rewards (GRPO), full and with TRL's `peft_config`. What is trained is in
examples/. The bounds leave room: docs/trainers.md has what several seeds came to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from documents import block_with
from fine_tuned import ADAPTERS, FEW, expect_same, of_adapters, trained
from transformers import AutoModelForSequenceClassification
from transformers.trainer_utils import get_last_checkpoint

from drift_kernels.integrations import unwrap_optimizer
from drift_kernels.integrations.transformers import DriftCallback, use_drift
from examples import tiny, trl_dpo, trl_grpo
from examples.transformers_trainer import arguments
from examples.trl_sft import quiet

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

Build = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    quiet()


@pytest.fixture(params=[trl_dpo, trl_grpo], ids=["dpo", "grpo"])
def build(request: pytest.FixtureRequest, tmp_path: Path) -> Build:
    """The example's trainer: build(prior, steps=..., adapters=..., options of use_drift)."""
    return lambda prior, **options: request.param.build(prior, tmp_path, **options)


@ADAPTERS
def test_sums_that_no_pair_or_reward_showed_come_with_the_prior(build: Build, adapters: bool) -> None:
    accuracy = {}
    for prior in (None, tiny.expert_prior()):
        trainer = build(prior, adapters=adapters)
        trainer.train()
        accuracy[prior is not None] = tiny.held_out_accuracy(trainer.model)
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(logged) == 4
        assert all(("prior/cosine/attn" in entry) == (prior is not None) for entry in logged)
    assert accuracy[False] < 0.15
    assert accuracy[True] > 0.3
    names = of_adapters(list(tiny.expert_prior())) if adapters else list(tiny.expert_prior())
    assert sorted(unwrap_optimizer(trainer.optimizer).prior_names) == sorted(names)
    for entry in logged:
        assert entry["prior/biased"] == entry["prior/bound"] == len(names)
        assert entry["prior/alpha"] == trl_dpo.OPTIONS["alpha"]
        assert entry["prior/grad_norm"] > 0
        assert entry["prior/ratio/mlp"] > 0


@ADAPTERS
def test_an_alpha_of_0_has_the_bits_of_no_prior(build: Build, adapters: bool) -> None:
    prior = tiny.expert_prior()
    without = trained(build(None, adapters=adapters, steps=FEW))
    expect_same(trained(build(prior, adapters=adapters, steps=FEW, alpha=0.0)), without)
    biased = trained(build(prior, adapters=adapters, steps=FEW))
    assert any(not torch.equal(biased[name], without[name]) for name in without)


@ADAPTERS
def test_a_run_that_stopped_ends_as_one_that_did_not(build: Build, adapters: bool) -> None:
    prior = tiny.expert_prior()
    whole = trained(build(prior, adapters=adapters, steps=FEW, anneal=1.0))
    stopped = build(prior, adapters=adapters, steps=FEW, anneal=1.0, stop_after=FEW // 2)
    half = trained(stopped)
    assert any(not torch.equal(half[name], whole[name]) for name in whole)
    resumed = build(prior, adapters=adapters, steps=FEW, anneal=1.0)
    resumed.train(resume_from_checkpoint=get_last_checkpoint(stopped.args.output_dir))
    expect_same(dict(resumed.model.named_parameters()), whole)


@pytest.mark.parametrize(("example", "options"), [(trl_dpo, {}), (trl_grpo, {"beta": 0.1})], ids=["dpo", "grpo"])
def test_the_reference_stays(example: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """TRL's own, a second copy of the base; with adapters it is the model without them, whose weights are frozen."""
    trainer = example.build(tiny.expert_prior(), tmp_path, steps=FEW, **options)
    trainer.train()
    assert tiny.same(trainer.ref_model, tiny.base_model())
    optimized = {id(param) for group in trainer.optimizer.param_groups for param in group["params"]}
    assert optimized == {id(param) for param in trainer.model.parameters()}
    with_adapters = example.build(tiny.expert_prior(), tmp_path, steps=FEW, adapters=True, **options)
    with_adapters.train()
    assert with_adapters.ref_model is None
    assert tiny.same(with_adapters.model.unload(), tiny.base_model())


def test_what_is_frozen_is_not_pulled(build: Build) -> None:
    trainer = build(tiny.expert_prior(), steps=FEW)
    frozen = trainer.model.model.layers[0].requires_grad_(False)
    trainer.train()
    assert tiny.same(frozen, tiny.base_model().model.layers[0])
    reached = unwrap_optimizer(trainer.optimizer).prior_names
    assert sorted(reached) == sorted(name for name in tiny.expert_prior() if ".layers.1." in name)


def test_the_head_of_a_reward_model_is_not_pulled(tmp_path: Path) -> None:
    """Nor does it keep the prior, which is a language model's, from the layers beneath it."""
    tiny.write_files(tmp_path)
    scores = {}
    for alpha in (0.0, 2.0):
        args = trl.RewardConfig(**arguments(tmp_path / "run", FEW), bf16=False)
        torch.manual_seed(0)
        trainer = trl.RewardTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1),
            args=args,
            processing_class=tiny.tokenizer(),
            train_dataset=trl_dpo.preferences(FEW * tiny.BATCH_SIZE),
        )
        use_drift(trainer, prior=tmp_path / "prior", alpha=alpha)
        scores[alpha] = trained(trainer)
    names = unwrap_optimizer(trainer.optimizer).prior_names
    assert sorted(names) == sorted(tiny.expert_prior())
    assert not torch.equal(scores[0.0][names[0]], scores[2.0][names[0]])


def test_where_rewards_do_not_differ_only_decoupled_pulls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GRPO's gradient is 0 then, and so is a bias that is measured by it."""
    monkeypatch.setattr(trl_grpo, "right_sum", lambda completions, **_: [0.0] * len(completions))
    trainer = trl_grpo.build(tiny.expert_prior(), tmp_path, steps=FEW)
    trainer.train()
    assert tiny.same(trainer.model, tiny.base_model())
    assert trainer.state.log_history[0]["prior/ratio/attn"] == 0
    after = trained(trl_grpo.build(tiny.expert_prior(), tmp_path, steps=FEW, prior_scaling="decoupled", alpha=30.0))
    for name, param in tiny.base_model().named_parameters():
        if name in tiny.expert_prior():
            moved, delta = after[name] - param, tiny.expert_prior()[name]
            assert torch.cosine_similarity(moved.flatten(), delta.flatten(), dim=0) > 0.999, name
        else:
            assert torch.equal(after[name], param), name


def labelled(count: int) -> Dataset:
    """What KTO takes: single answers, each right or wrong."""
    rows = [(row["prompt"], row[kind], kind == "chosen") for row in trl_dpo.preferences(count) for kind in KINDS]
    return Dataset.from_list([{"prompt": prompt, "completion": said, "label": label} for prompt, said, label in rows])


KINDS = ("chosen", "rejected")
SHORT = {"num_generations": 4, "max_completion_length": 2}


@pytest.mark.parametrize(
    ("trainer", "config", "dataset"),
    [
        (trl.DPOTrainer, trl.DPOConfig, trl_dpo.preferences),
        (trl.KTOTrainer, trl.KTOConfig, labelled),
        (partial(trl.GRPOTrainer, reward_funcs=trl_grpo.right_sum), partial(trl.GRPOConfig, **SHORT), trl_grpo.prompts),
        (partial(trl.RLOOTrainer, reward_funcs=trl_grpo.right_sum), partial(trl.RLOOConfig, **SHORT), trl_grpo.prompts),
    ],
    ids=["dpo", "kto", "grpo", "rloo"],
)
def test_the_documented_form_with_the_defaults_of_trl(
    trainer: Build, config: Build, dataset: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block of docs/trainers.md; bfloat16 and gradient checkpointing are TRL's defaults."""
    tiny.write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "SFTTrainer": lambda model, args, train_dataset: trainer(
            model, args=args, train_dataset=train_dataset, processing_class=tiny.tokenizer()
        ),
        "model": "base",
        "args": config(**arguments(tmp_path / "run", FEW)),
        "dataset": dataset(FEW * tiny.BATCH_SIZE),
    }
    exec(block_with("trainer = SFTTrainer(model, args=args"), names)
    assert sorted(unwrap_optimizer(names["trainer"].optimizer).prior_names) == sorted(tiny.expert_prior())
    assert "prior/cosine/attn" in names["trainer"].state.log_history[0]


# Misuse


def test_another_optimizer_is_an_error_before_the_first_step(build: Build) -> None:
    """As a trainer has it that was given `optimizers`, or that makes its own."""
    trainer = build(None, steps=FEW)
    trainer.optimizer_cls_and_kwargs = None
    before = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    with pytest.raises(TypeError, match=r"expected a FusedDriftAdamW or a wrapper of one, got .*AdamW"):
        trainer.train()
    expect_same(dict(trainer.model.named_parameters()), before)


def test_optimizers_with_the_callback_are_an_error(tmp_path: Path) -> None:
    model = tiny.base_model()
    args = trl.DPOConfig(**arguments(tmp_path, FEW), bf16=False)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=tiny.base_model(),
        args=args,
        processing_class=tiny.tokenizer(),
        train_dataset=trl_dpo.preferences(FEW * tiny.BATCH_SIZE),
        optimizers=(torch.optim.AdamW(model.parameters()), None),
    )
    with pytest.raises(ValueError, match=r"the Trainer already has an optimizer \(AdamW\): leave out `optimizers`"):
        use_drift(trainer, prior=tiny.expert_prior())
    DriftCallback().add_to(trainer)
    with pytest.raises(TypeError, match=r"expected a FusedDriftAdamW or a wrapper of one, got .*AdamW"):
        trainer.train()
    assert tiny.same(model, tiny.base_model())


def test_use_drift_comes_before_the_training(build: Build) -> None:
    trainer = build(None, steps=1)
    trainer.train()
    trainer.optimizer_cls_and_kwargs = None
    with pytest.raises(ValueError, match=r"already has an optimizer .* call this before trainer\.train"):
        use_drift(trainer, prior=tiny.expert_prior())

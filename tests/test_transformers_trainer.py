"""drift_adamw and DriftCallback: the forms that keep names, logs, alpha, clipping."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import short_trainer
from checkpoints import TRANSFORMERS_5
from short_trainer import STEPS, Tracker, drift_of, fit
from transformers import PrinterCallback, Trainer, TrainingArguments

from drift_kernels import FusedDriftAdamW, PriorError, linear_anneal
from drift_kernels.integrations import named_groups
from drift_kernels.integrations.transformers import DriftCallback, drift_adamw
from examples import tiny

OPTIONS = {"alpha": 2.0, "prior_scaling": "gradnorm"}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    tiny.quiet()


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., TrainingArguments]:
    return partial(short_trainer.arguments, tmp_path)


# Forms

FORMS: dict[str, Callable[[TrainingArguments, Any, Any], dict[str, Any]]] = {
    "kwargs": lambda args, model, prior: {
        "optimizer_cls_and_kwargs": (
            FusedDriftAdamW,
            {"params": named_groups(model, 0.1), "lr": 1e-3, "prior": prior, **OPTIONS},
        )
    },
    "drift_adamw": lambda args, model, prior: {
        "optimizer_cls_and_kwargs": drift_adamw(args, model, prior=prior, **OPTIONS)
    },
    "factory": lambda args, model, prior: {"optimizer_cls_and_kwargs": drift_adamw(args, prior=prior, **OPTIONS)},
}


@pytest.fixture
def reference(arguments: Callable[..., TrainingArguments]) -> Trainer:
    """The form in which the optimizer is made before the Trainer."""
    model = tiny.base_model()
    optimizer = FusedDriftAdamW(named_groups(model, 0.1), lr=1e-3, prior=tiny.expert_prior(), **OPTIONS)
    return fit(arguments(), model, optimizers=(optimizer, None))


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_keep_names(form: str, reference: Trainer, arguments: Callable[..., TrainingArguments]) -> None:
    if form == "factory" and not TRANSFORMERS_5:
        with pytest.raises(TypeError, match="does not pass the model"):
            fit(arguments(), **FORMS[form](arguments(), None, tiny.expert_prior()))
        return
    model = tiny.base_model()
    trainer = fit(arguments(), model, **FORMS[form](arguments(), model, tiny.expert_prior()))
    assert tiny.same(model, reference.model)
    assert sorted(drift_of(trainer).prior_names) == sorted(tiny.expert_prior())
    assert [group["weight_decay"] for group in drift_of(trainer).param_groups] == [0.1, 0.0]


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 tells an optimizer's class no model")
def test_model_init(reference: Trainer, arguments: Callable[..., TrainingArguments]) -> None:
    choice = drift_adamw(arguments(), prior=tiny.expert_prior(), **OPTIONS)
    trainer = fit(arguments(), model_init=tiny.base_model, optimizer_cls_and_kwargs=choice)
    assert tiny.same(trainer.model, reference.model)


def test_the_form_without_names_is_an_error(arguments: Callable[..., TrainingArguments]) -> None:
    choice = FusedDriftAdamW, {"lr": 1e-3, "prior": tiny.expert_prior()}
    with pytest.raises(PriorError, match=r"pass model.named_parameters\(\)"):
        fit(arguments(), optimizer_cls_and_kwargs=choice)


def test_hyperparameters_and_groups_are_the_trainers(arguments: Callable[..., TrainingArguments]) -> None:
    """As with the Trainer's own AdamW."""
    args = arguments(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, lr_scheduler_type="constant")
    model = tiny.base_model()
    ours = fit(args, model, optimizer_cls_and_kwargs=drift_adamw(args, model))
    theirs = fit(args)
    for group, expected in zip(drift_of(ours).param_groups, theirs.optimizer.param_groups, strict=True):
        assert [param.shape for param in group["params"]] == [param.shape for param in expected["params"]]
        assert all(group[key] == expected[key] for key in ("lr", "betas", "eps", "weight_decay"))
    choice = drift_adamw(args, model, lr=0.5, betas=(0.1, 0.2), weight_decay=0.7)
    (decayed, _) = drift_of(fit(args, model, optimizer_cls_and_kwargs=choice)).param_groups
    assert (decayed["lr"], decayed["betas"], decayed["weight_decay"]) == (0.5, (0.1, 0.2), 0.7)


# DriftCallback


def test_figures_of_each_logged_step(arguments: Callable[..., TrainingArguments]) -> None:
    args, model = arguments(logging_steps=2, eval_strategy="steps", eval_steps=2), tiny.base_model()
    choice = drift_adamw(args, model, prior=tiny.expert_prior(), max_grad_norm=1.0)
    trainer = fit(args, model, optimizer_cls_and_kwargs=choice, callbacks=[DriftCallback()])
    drift = drift_of(trainer)
    training = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in training] == [2, 4]
    keys = {f"prior/{what}/{group}" for what in ("cosine", "ratio") for group in ("attn", "mlp")}
    keys |= {f"prior/{what}" for what in ("alpha", "bound", "biased", "grad_norm")}
    for entry in trainer.state.log_history:
        assert {key for key in entry if key.startswith("prior/")} == (keys if "loss" in entry else set())
    attention = [
        value for value, name in zip(drift.prior_ratio.tolist(), drift.prior_names, strict=True) if "attn" in name
    ]
    assert training[-1]["prior/ratio/attn"] == pytest.approx(sum(attention) / len(attention))
    assert training[-1]["prior/grad_norm"] == drift.grad_norm.item()


@pytest.mark.parametrize("first", [False, True])
def test_trackers_see_the_figures_of_a_callback_that_was_put_first(
    first: bool, arguments: Callable[..., TrainingArguments]
) -> None:
    args, model, tracker = arguments(), tiny.base_model(), Tracker()
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=[tiny.encoded(pair) for pair in tiny.training_pairs(64)],
        optimizer_cls_and_kwargs=drift_adamw(args, model, prior=tiny.expert_prior()),
        callbacks=[tracker, *([] if first else [DriftCallback()])],
    )
    if first:
        DriftCallback().add_to(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert ("prior/cosine/attn" in tracker.entries[0]) == first
    assert "prior/cosine/attn" in trainer.state.log_history[0]


def test_alpha_of_each_step(arguments: Callable[..., TrainingArguments], monkeypatch: pytest.MonkeyPatch) -> None:
    alphas: list[float] = []
    step = FusedDriftAdamW.step

    def note(self: FusedDriftAdamW, *args: Any) -> Any:
        alphas.append(self.param_groups[0]["alpha"])
        return step(self, *args)

    args, model = arguments(), tiny.base_model()
    choice = drift_adamw(args, model, prior=tiny.expert_prior(), alpha=2.0)
    with monkeypatch.context() as patch:
        patch.setattr(FusedDriftAdamW, "step", note)
        fit(args, model, optimizer_cls_and_kwargs=choice, callbacks=[DriftCallback(linear_anneal(STEPS))])
    assert alphas == [2.0, 1.5, 1.0, 0.5]


def test_callback_of_another_optimizer_is_an_error(arguments: Callable[..., TrainingArguments]) -> None:
    with pytest.raises(TypeError, match="expected a FusedDriftAdamW"):
        fit(arguments(), callbacks=[DriftCallback()])


# Clipping


def test_the_trainer_clips_the_gradient_before_the_bias(arguments: Callable[..., TrainingArguments]) -> None:
    """In a gradnorm step from zero states, the bias has the norm of the clipped gradient."""
    args, model = arguments(max_steps=1, max_grad_norm=0.01), tiny.base_model()
    choice = drift_adamw(args, model, prior=tiny.expert_prior(), max_grad_norm=float("inf"), **OPTIONS)
    trainer = fit(args, model, optimizer_cls_and_kwargs=choice, callbacks=[DriftCallback()])
    entry = trainer.state.log_history[0]
    assert entry["grad_norm"] > 0.1  # before the clipping
    assert 0.005 < entry["prior/grad_norm"] < 0.03  # norm(g - 2 * norm(g) * direction) is within norm(g) * (1, 3)


@pytest.mark.parametrize(
    ("trainers", "optimizers", "warns"),
    [(1.0, 0.5, True), (0, 0.5, False), (1.0, None, False), (1.0, float("inf"), False)],
)
def test_warning_when_both_clip(
    trainers: float,
    optimizers: float | None,
    warns: bool,
    arguments: Callable[..., TrainingArguments],
    caplog: pytest.LogCaptureFixture,
) -> None:
    args, model = arguments(max_steps=1, max_grad_norm=trainers), tiny.base_model()
    choice = drift_adamw(args, model, max_grad_norm=optimizers)
    with caplog.at_level(logging.WARNING, "drift_kernels"):
        fit(args, model, optimizer_cls_and_kwargs=choice, callbacks=[DriftCallback()])
    messages = [record.getMessage() for record in caplog.records if record.name == "drift_kernels"]
    clip, plain = messages[:-1], messages[-1]
    assert plain == "FusedDriftAdamW has no prior: this is plain fine-tuning"
    assert [
        message.startswith("gradients are clipped twice: the trainer clips the gradient to max_grad_norm=1")
        for message in clip
    ] == ([True] if warns else [])

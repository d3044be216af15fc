"""use_drift: the short form, what it takes over, what it refuses, and what stops a trainer that takes another
optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import short_trainer
import torch
from short_trainer import STEPS, Tracker, drift_of, fit
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from drift_kernels import FusedDriftAdamW, PriorError, linear_anneal
from drift_kernels.integrations.transformers import DriftCallback, drift_adamw, use_drift
from examples import tiny

OPTIONS = {"alpha": 2.0, "prior_scaling": "gradnorm"}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    tiny.quiet()


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., TrainingArguments]:
    return partial(short_trainer.arguments, tmp_path)


def in_use(args: TrainingArguments, *, steps: int = STEPS, callbacks: Any = None, **options: Any) -> Trainer:
    """A Trainer that use_drift has been called for."""
    trainer = Trainer(
        model=tiny.base_model(),
        args=args,
        train_dataset=[tiny.encoded(pair) for pair in tiny.training_pairs(steps * 16)],
        callbacks=callbacks,
    )
    use_drift(trainer, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def test_use_drift_is_the_long_form(arguments: Callable[..., TrainingArguments]) -> None:
    """With the clipping taken over, and the figures before all other callbacks."""
    tracker = Tracker()
    short = in_use(arguments(max_grad_norm=0.5), prior=tiny.expert_prior(), callbacks=[tracker], **OPTIONS)
    short.train()
    assert short.args.max_grad_norm == 0
    assert drift_of(short).max_grad_norm == 0.5
    args, model = arguments(), tiny.base_model()
    choice = drift_adamw(args, model, prior=tiny.expert_prior(), max_grad_norm=0.5, **OPTIONS)
    assert tiny.same(short.model, fit(args, model, optimizer_cls_and_kwargs=choice).model)
    assert tracker.entries[0]["prior/biased"] == tracker.entries[0]["prior/bound"] == len(tiny.expert_prior())
    assert tracker.entries[0]["prior/alpha"] == 2


@pytest.mark.parametrize("given", [None, 0.25])
def test_use_drift_clips_as_it_is_told(given: float | None, arguments: Callable[..., TrainingArguments]) -> None:
    trainer = in_use(arguments(max_grad_norm=0.5), prior=tiny.expert_prior(), max_grad_norm=given)
    trainer.train()
    assert trainer.args.max_grad_norm == 0.5
    assert drift_of(trainer).max_grad_norm == given


def test_anneal_is_a_part_of_the_training(
    arguments: Callable[..., TrainingArguments], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = in_use(arguments(max_steps=8), steps=8, prior=tiny.expert_prior(), anneal=0.5)
    trainer.train()
    alphas = [entry["prior/alpha"] for entry in trainer.state.log_history if "loss" in entry]
    assert alphas == [0.75, 0.5, 0.25, 0, 0, 0, 0, 0]  # after each step, as learning rates are logged
    biased = [entry["prior/biased"] for entry in trainer.state.log_history if "loss" in entry]
    assert biased == [len(tiny.expert_prior())] * 4 + [0] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"anneal": 0}, "in \\(0, 1\\], got 0"), ({"anneal": 0.5, "alpha_lambda": linear_anneal(3)}, "not both")],
)
def test_schedules_that_are_none(
    options: dict[str, Any], message: str, arguments: Callable[..., TrainingArguments]
) -> None:
    with pytest.raises(ValueError, match=message):
        in_use(arguments(), prior=tiny.expert_prior(), **options)


def test_use_drift_takes_no_optimizers_place(arguments: Callable[..., TrainingArguments]) -> None:
    model = tiny.base_model()
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs = {
        "already has an optimizer \\(SGD\\)": {"optimizers": (made, None)},
        "already has optimizer_cls_and_kwargs": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
        "have optim='adafactor'": {"args": arguments(optim="adafactor")},
    }
    for message, options in theirs.items():
        trainer = Trainer(**{"model": model, "args": arguments(), **options})
        with pytest.raises(ValueError, match=message):
            use_drift(trainer, prior=tiny.expert_prior())
    trainer = in_use(arguments(), prior=tiny.expert_prior())
    trainer.train()
    with pytest.raises(ValueError, match="already has an optimizer"):
        use_drift(trainer, prior=tiny.expert_prior())


def test_what_is_wrong_is_said_before_anything_changes(
    arguments: Callable[..., TrainingArguments], tmp_path: Path
) -> None:
    trainer = Trainer(model=tiny.base_model(), args=arguments(max_grad_norm=0.5))
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (
            TypeError,
            "FusedDriftAdamW got unexpected keyword arguments: alhpa, scaling",
            {"prior": None, "alhpa": 1, "scaling": "absolute"},
        ),
        (PriorError, "nowhere", {"prior": tmp_path / "nowhere"}),
        (ValueError, "anneal must be a fraction", {"prior": tiny.expert_prior(), "anneal": 3}),
        (TypeError, "prior", {}),
    ]
    for error, message, options in wrong:
        with pytest.raises(error, match=message):
            use_drift(trainer, **options)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=r"ZeRO flattens parameters.*use_hooks"):
        use_drift(trainer, prior=tiny.expert_prior())
    assert trainer.args.max_grad_norm == 0.5
    assert trainer.optimizer_cls_and_kwargs is None
    assert not any(isinstance(callback, DriftCallback) for callback in trainer.callback_handler.callbacks)


def test_a_trainer_that_makes_another_optimizer_is_stopped(arguments: Callable[..., TrainingArguments]) -> None:
    """As trainers do that have a `create_optimizer` of their own."""

    class Own(Trainer):
        def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
            self.optimizer = torch.optim.AdamW(self.model.parameters())
            return self.optimizer

    trainer = Own(model=tiny.base_model(), args=arguments(), train_dataset=[tiny.encoded((1, 2))] * 64)
    use_drift(trainer, prior=tiny.expert_prior())
    with pytest.raises(TypeError, match="got AcceleratedOptimizer around AdamW: the trainer would train without the"):
        trainer.train()


def test_a_trainer_that_steps_another_optimizer_is_stopped(arguments: Callable[..., TrainingArguments]) -> None:
    """It shows ours to callbacks, and steps another."""
    trainer = in_use(arguments(), prior=tiny.expert_prior())
    create = trainer.create_optimizer

    def another(*args: Any) -> Any:
        ours = create(*args)
        theirs = torch.optim.SGD(trainer.model.parameters(), lr=1e-3)
        ours.step = MethodType(lambda self, *args: theirs.step(*args), ours)
        return ours

    trainer.create_optimizer = another
    with pytest.raises(RuntimeError, match="has taken a step, but not with its FusedDriftAdamW"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_adapters_need_no_other_form(arguments: Callable[..., TrainingArguments]) -> None:
    """The prior of weights is projected onto the adapters."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny.base_model(), config)
    trainer = Trainer(model=model, args=arguments(), train_dataset=[tiny.encoded((1, 2))] * 64)
    use_drift(trainer, prior=tiny.expert_prior(), refresh=2)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    factors = [name for name, param in model.named_parameters() if param.requires_grad]
    assert sorted(drift_of(trainer).prior_names) == sorted(factors)
    assert all("prior_delta" in state for state in drift_of(trainer).state.values())
    assert drift_of(trainer).param_groups[0]["prior_turn"] in (0, 1)  # refresh has arrived


def test_warning_of_figures_that_trackers_will_not_get(
    arguments: Callable[..., TrainingArguments], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, model = arguments(), tiny.base_model()
    args.report_to = ["tensorboard"]
    with caplog.at_level(logging.WARNING, "drift_kernels"):
        choice = drift_adamw(args, model, prior=tiny.expert_prior())
        DriftCallback().on_train_begin(args, TrainerState(), TrainerControl(), optimizer=made(choice, model))
        assert "tensorboard will not log the statistics" in caplog.text
        caplog.clear()
        first = DriftCallback()
        first.add_to(Trainer(model=model, args=arguments()))
        first.on_train_begin(args, TrainerState(), TrainerControl(), optimizer=made(choice, model))
        assert "will not log" not in caplog.text


def made(choice: tuple[Any, dict[str, Any]], model: nn.Module) -> FusedDriftAdamW:
    options = {key: value for key, value in choice[1].items() if key != "model"}
    return choice[0](model, **options)

"""The prior's metrics arrive in TensorBoard and wandb, from the Trainer, Lightning and Accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import short_trainer
from accelerate import Accelerator
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer

from drift_kernels import FusedDriftAdamW
from drift_kernels.integrations import named_groups, step_figures
from drift_kernels.integrations.transformers import use_drift
from examples import lightning_module, tiny

wandb = pytest.importorskip("wandb")

FIGURES = {"alpha", "bound", "biased", "grad_norm"}
FIGURES |= {f"{figure}/{module}" for figure in ("cosine", "ratio") for module in ("attn", "mlp")}
BOUND = len(tiny.expert_prior())


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep wandb offline and make it write into the test's folder. On a busy machine its process may be slow."""
    tiny.quiet()
    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB__SERVICE_WAIT", "WANDB_INIT_TIMEOUT", "WANDB_SUMMARY_TIMEOUT"):
        monkeypatch.setenv(name, "600")  # seconds
    yield
    wandb.finish()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars of the event file in a folder: (step, value) by tag."""
    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    return {tag: [(entry.step, entry.value) for entry in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def check(tags: dict[str, list[tuple[int, float]]], prefix: str, steps: list[int]) -> None:
    assert {tag.removeprefix(prefix) for tag in tags if tag.startswith(prefix)} == FIGURES
    for figure in FIGURES:
        assert [step for step, _ in tags[prefix + figure]] == steps, figure
    assert [value for _, value in tags[f"{prefix}bound"]] == [BOUND] * len(steps)
    assert all(value > 0 for _, value in tags[f"{prefix}ratio/attn"])


def test_the_trainers_trackers(tmp_path: Path) -> None:
    args = short_trainer.arguments(tmp_path, report_to=["tensorboard", "wandb"], max_grad_norm=1.0)
    rows = [tiny.encoded(pair) for pair in tiny.training_pairs(64)]
    trainer = Trainer(model=tiny.base_model(), args=args, train_dataset=rows)
    use_drift(trainer, prior=tiny.expert_prior(), anneal=1.0)
    trainer.train()
    check(scalars(tmp_path / "runs"), "train/prior/", [1, 2, 3, 4])
    summary = dict(wandb.run.summary)
    assert {key.removeprefix("train/prior/") for key in summary if key.startswith("train/prior/")} == FIGURES
    assert summary["train/prior/biased"] == BOUND
    assert summary["train/prior/alpha"] == 0  # it has been annealed


def test_lightnings_loggers(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path / "events"), WandbLogger(save_dir=tmp_path, offline=True)]
    options = {"logger": loggers, "log_every_n_steps": 2}
    lightning_module.train(tiny.expert_prior(), tmp_path, steps=8, trainer_options=options, max_grad_norm=float("inf"))
    check(scalars(tmp_path / "events"), "prior/", [2, 4, 6, 8])
    assert dict(wandb.run.summary)["prior/biased"] == BOUND


def test_accelerates_trackers(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, log_with=["tensorboard", "wandb"], project_dir=tmp_path)
    accelerator.init_trackers("drift")
    model = tiny.base_model()
    optimizer = FusedDriftAdamW(named_groups(model), prior=tiny.expert_prior(), max_grad_norm=1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in (1, 2):
        accelerator.backward(model(**tiny.together([tiny.encoded((step, 2))])).loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log(step_figures(optimizer), step)
    assert dict(wandb.run.summary)["prior/bound"] == BOUND
    accelerator.end_training()
    check(scalars(tmp_path / "drift"), "prior/", [1, 2])

"""Lightning: `configure_optimizers` returns the optimizer and its schedule; `DriftCallback` schedules alpha, and logs.
A checkpoint contains everything needed to resume."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from drift_kernels import FusedDriftAdamW, linear_anneal
from drift_kernels.integrations import named_groups
from drift_kernels.integrations.lightning import DriftCallback

from . import tiny

EPOCHS = 4


class FineTuning(LightningModule):
    """The module to fine-tune; `options` are passed to FusedDriftAdamW."""

    def __init__(self, prior: tiny.Prior | None, steps: int, **options: Any) -> None:
        super().__init__()
        self.model = tiny.base_model().train()
        self.prior, self.steps, self.options = prior, steps, {"alpha": tiny.ALPHA, **options}

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        optimizer = FusedDriftAdamW(named_groups(self.model), lr=tiny.LR, prior=self.prior, **self.options)
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, self.steps), "interval": "step"}]


def build(folder: Path, stop_after: int | None = None, steps: int = tiny.STEPS, **options: Any) -> Trainer:
    """A Trainer that saves after every epoch; `options` are passed to it."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    saving = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    return Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        max_steps=-1 if stop_after is None else stop_after,
        callbacks=[DriftCallback(linear_anneal(steps)), saving],
        **{**quiet, **options},
    )


def train(
    prior: tiny.Prior | None,
    folder: Path,
    steps: int = tiny.STEPS,
    stop_after: int | None = None,
    resume: bool = False,
    clip: float = 1.0,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Return the fine-tuned model. Lightning's `clip` acts on the gradient before the bias."""
    module = FineTuning(prior, steps, **options)
    rows = [tiny.encoded(pair) for pair in tiny.training_pairs(steps // EPOCHS * tiny.BATCH_SIZE)]
    trainer = build(folder, stop_after, steps, gradient_clip_val=clip, **(trainer_options or {}))
    trainer.fit(module, DataLoader(rows, tiny.BATCH_SIZE), ckpt_path=folder / "last.ckpt" if resume else None)
    return module.model


if __name__ == "__main__":
    tiny.quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    with TemporaryDirectory() as folder:
        tiny.show(partial(train, folder=Path(folder)))

"""Lightning: the optimizer and both schedules from `configure_optimizers`; its checkpoints hold all three."""

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

from drift_kernels import AlphaScheduler, FusedDriftAdamW, linear_anneal
from drift_kernels.integrations import named_groups, step_figures

from . import tiny

EPOCHS = 4


class FineTuning(LightningModule):
    """`options` are FusedDriftAdamW's."""

    def __init__(self, prior: tiny.Prior | None, steps: int, **options: Any) -> None:
        super().__init__()
        self.model = tiny.base_model().train()
        self.prior, self.steps, self.options = prior, steps, {"alpha": tiny.ALPHA, **options}

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        groups = named_groups(self.model)  # not self: the prior does not know its prefix
        optimizer = FusedDriftAdamW(groups, lr=tiny.LR, prior=self.prior, **self.options)
        lr_schedule = CosineAnnealingLR(optimizer, self.steps)
        alpha_schedule = AlphaScheduler(optimizer, linear_anneal(self.steps))
        return [optimizer], [{"scheduler": s, "interval": "step"} for s in (lr_schedule, alpha_schedule)]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()  # Lightning asks for this hook where a schedule is not one of torch's

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step % 30 == 0:
            self.log_dict(step_figures(self.optimizers()))


def build(folder: Path, stop_after: int | None = None, steps: int = tiny.STEPS, **options: Any) -> Trainer:
    """A Trainer that saves after every epoch; `options` are its own."""
    return Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        max_steps=-1 if stop_after is None else stop_after,
        callbacks=[ModelCheckpoint(folder, filename="last", enable_version_counter=False)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def train(
    prior: tiny.Prior | None,
    folder: Path,
    steps: int = tiny.STEPS,
    stop_after: int | None = None,
    resume: bool = False,
    clip: float = 1.0,
    **options: Any,
) -> nn.Module:
    """The fine-tuned model. Lightning's `clip` is of the gradient before the bias."""
    module = FineTuning(prior, steps, **options)
    rows = [tiny.encoded(pair) for pair in tiny.training_pairs(steps // EPOCHS * tiny.BATCH_SIZE)]
    trainer = build(folder, stop_after, steps, gradient_clip_val=clip)
    trainer.fit(module, DataLoader(rows, tiny.BATCH_SIZE), ckpt_path=folder / "last.ckpt" if resume else None)
    return module.model


if __name__ == "__main__":
    tiny.quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    with TemporaryDirectory() as folder:
        tiny.show(partial(train, folder=Path(folder)))

"""A manual loop with Accelerate, which wraps the optimizer, and saves and loads everything prepared or registered."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from drift_kernels import AlphaScheduler, FusedDriftAdamW, linear_anneal
from drift_kernels.integrations import named_groups, step_figures

from . import tiny


def train(
    prior: tiny.Prior | None,
    folder: Path,
    steps: int = tiny.STEPS,
    stop_after: int | None = None,
    resume: bool = False,
    **options: Any,
) -> nn.Module:
    """Return the fine-tuned model; `options` are passed to FusedDriftAdamW."""
    accelerator = Accelerator(cpu=True)
    model = tiny.base_model()
    options = {"alpha": tiny.ALPHA, "max_grad_norm": 1.0, **options}
    optimizer = FusedDriftAdamW(named_groups(model), lr=tiny.LR, prior=prior, **options)
    lr_schedule = CosineAnnealingLR(optimizer, steps)
    rows = [tiny.encoded(pair) for pair in tiny.training_pairs(steps * tiny.BATCH_SIZE)]
    loader = DataLoader(rows, batch_size=tiny.BATCH_SIZE)

    model, optimizer, lr_schedule, loader = accelerator.prepare(model, optimizer, lr_schedule, loader)
    alpha_schedule = AlphaScheduler(optimizer, linear_anneal(steps))
    accelerator.register_for_checkpointing(alpha_schedule)

    done = 0
    if resume:
        accelerator.load_state(str(folder))
        done = alpha_schedule.last_epoch
        loader = accelerator.skip_first_batches(loader, done)

    model.train()
    for step, batch in enumerate(loader, start=done + 1):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            lr_schedule.step()
            if accelerator.sync_gradients:  # Accelerate's own wrappers check this themselves
                alpha_schedule.step()
            optimizer.zero_grad()
        if step % 30 == 0:
            accelerator.log(step_figures(optimizer), step)
        if step == stop_after:
            accelerator.save_state(str(folder))
            break
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    tiny.quiet()
    with TemporaryDirectory() as folder:
        tiny.show(partial(train, folder=Path(folder)))

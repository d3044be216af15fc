"""use_hooks: a Trainer as under DeepSpeed, whose optimizer is its own. (DeepSpeed itself: tests/trainers.)"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from short_trainer import STEPS, arguments
from transformers import Trainer

from drift_kernels.integrations.hooked import use_hooks
from drift_kernels.integrations.transformers import use_drift
from examples import tiny


def trainer(folder: Path, stage: int | None = 2, **options: Any) -> Trainer:
    args = arguments(folder, **{"max_grad_norm": 1.0, "weight_decay": 0.0, **options})
    rows = [tiny.encoded(pair) for pair in tiny.training_pairs(64)]
    made = Trainer(model=tiny.base_model(), args=args, train_dataset=rows)
    args.deepspeed_plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    return made


def test_hooks_bias_as_the_optimizer_would(tmp_path: Path) -> None:
    """In one process, in float32: over these steps the parameters are the same to 1e-4 of the way."""
    settings = {"prior": tiny.expert_prior(), "alpha": 0.05, "prior_scaling": "absolute", "anneal": 1.0}
    hooked, fused, plain = trainer(tmp_path), trainer(tmp_path, stage=None), trainer(tmp_path)
    hooks = use_hooks(hooked, **settings)
    use_drift(fused, **settings)
    for one in (hooked, fused, plain):
        one.train()
    assert sorted(hooks.names) == sorted(tiny.expert_prior())
    assert isinstance(hooked.optimizer.optimizer, torch.optim.AdamW)
    start = dict(tiny.base_model().named_parameters())
    models = zip(hooked.model.named_parameters(), fused.model.parameters(), plain.model.parameters(), strict=True)
    for (name, param), expected, other in models:
        way = (expected - start[name]).norm()
        assert (param - expected).norm() <= 1e-4 * way, name
        assert (other - expected).norm() >= 0.01 * way, name
    alphas = [[e["prior/alpha"] for e in one.state.log_history if "loss" in e] for one in (hooked, fused)]
    assert alphas[0] == alphas[1] == pytest.approx([0.05 * (1 - step / STEPS) for step in range(1, STEPS + 1)])


@pytest.mark.parametrize(
    ("stage", "args", "settings", "message"),
    [
        (3, {}, {}, "ZeRO 3 partitions"),
        (2, {}, {"anchor": True, "rounding": "stochastic"}, "do not support anchor, rounding"),
        (2, {}, {"max_grad_norm": 1.0}, "do not support max_grad_norm"),
        (2, {"gradient_accumulation_steps": 2}, {"prior_scaling": "absolute"}, "would bias a step several times"),
        (1, {"gradient_accumulation_steps": 2}, {}, "with ZeRO 1 and prior_scaling='adaptive_cosine'"),
        (2, {}, {"anneal": 2.0}, "anneal must be a fraction"),
        (2, {}, {"prior_scaling": "decoupled"}, "it moves parameters"),
    ],
)
def test_what_hooks_cannot_do_is_refused(
    tmp_path: Path, stage: int, args: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        use_hooks(trainer(tmp_path, stage, **args), prior=tiny.expert_prior(), **settings)


def test_micro_batches_are_allowed_where_each_is_biased_by_its_own_gradient(tmp_path: Path) -> None:
    use_hooks(trainer(tmp_path, gradient_accumulation_steps=2), prior=tiny.expert_prior(), prior_scaling="gradnorm")


def test_hooks_that_do_not_act_are_noticed(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    use_hooks(one, prior=tiny.expert_prior()).remove()
    with pytest.raises(RuntimeError, match="in which no hook of the prior acted"):
        one.train()

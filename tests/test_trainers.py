"""Every trainer trains a tiny model with a prior, stops and resumes; an interrupted run must end bitwise identical to
an uninterrupted one. The models are in examples/."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from drift_kernels import FusedDriftAdamW, PriorError
from drift_kernels.integrations import (
    check_in_use,
    drift_optimizer,
    named_groups,
    step_figures,
    unwrap_optimizer,
)
from drift_kernels.integrations.training_run import AlphaOverTime
from examples import accelerate_loop, lightning_module, tiny, transformers_trainer, trl_sft

STEPS = 8
EXAMPLES = [transformers_trainer, trl_sft, accelerate_loop, lightning_module]
PRECISIONS = {
    "float32": {},
    "stochastic": {"rounding": "stochastic", "state_dtype": "int8", "seed": 11},
    "masters": {"master_weights": True},
}

Train = Callable[..., nn.Module]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    tiny.quiet()


@pytest.fixture(params=EXAMPLES, ids=lambda module: module.__name__.rpartition(".")[2])
def train(request: pytest.FixtureRequest, tmp_path: Path) -> Train:
    """The example's training: train(prior, steps=..., stop_after=..., resume=..., options of the optimizer)."""

    def run(prior: tiny.Prior | None, **options: Any) -> nn.Module:
        return request.param.train(prior, tmp_path, steps=STEPS, **options)

    return run


@pytest.fixture
def optimizers(monkeypatch: pytest.MonkeyPatch) -> list[FusedDriftAdamW]:
    """Every FusedDriftAdamW, as it is made."""
    made: list[FusedDriftAdamW] = []
    build = FusedDriftAdamW.__init__

    def note(self: FusedDriftAdamW, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(FusedDriftAdamW, "__init__", note)
    return made


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_that_stopped_ends_as_one_that_did_not(
    train: Train, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior, options = tiny.expert_prior(), PRECISIONS[precision]
    if precision != "float32":
        base_model = tiny.base_model
        monkeypatch.setattr(tiny, "base_model", lambda: base_model().bfloat16())
    whole = train(prior, **options)
    half = train(prior, stop_after=STEPS // 2, **options)
    assert not tiny.same(half, whole)
    other_seed = {**options, "seed": 12}
    again = train(prior, resume=True, **other_seed)  # the checkpoint's seed replaces the optimizer's
    assert tiny.same(again, whole)
    assert tiny.same(train(prior, **other_seed), whole) == (precision != "stochastic")


def test_the_prior_acts(train: Train, optimizers: list[FusedDriftAdamW]) -> None:
    prior = tiny.expert_prior()
    biased, plain, unbiased = train(prior), train(None), train(prior, alpha=0.0)
    assert tiny.same(plain, unbiased)
    for name, param in biased.named_parameters():
        assert not torch.equal(param, plain.get_parameter(name)) or not param.requires_grad, name
    with_prior, without, _ = optimizers
    assert sorted(with_prior.prior_names) == sorted(prior)
    assert without.prior_names == []


def test_schedules_run_to_their_ends(train: Train, optimizers: list[FusedDriftAdamW]) -> None:
    """lr decreases to 0 as a cosine, alpha linearly, with one change per step."""
    train(tiny.expert_prior(), stop_after=STEPS // 2)
    train(tiny.expert_prior(), resume=True)
    halfway, ended = optimizers
    for group in halfway.param_groups:
        assert group["lr"] == pytest.approx(tiny.LR / 2)
        assert group["alpha"] == tiny.ALPHA / 2
    for group in ended.param_groups:
        assert group["lr"] == pytest.approx(0, abs=1e-12)
        assert group["alpha"] == 0


# Lightning


def by_hand(rows: list[dict[str, torch.Tensor]], clip: float) -> nn.Module:
    """The Lightning example in a plain loop: the gradient is clipped, then biased."""
    model = tiny.base_model().train()
    optimizer = FusedDriftAdamW(named_groups(model), lr=tiny.LR, prior=tiny.expert_prior(), alpha=tiny.ALPHA)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = tiny.LR * (1 + math.cos(math.pi * step / STEPS)) / 2
            group["alpha"] = tiny.ALPHA * (1 - step / STEPS)
        start = step % (STEPS // lightning_module.EPOCHS) * tiny.BATCH_SIZE
        model(**tiny.together(rows[start : start + tiny.BATCH_SIZE])).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_lightning_clips_before_the_bias(tmp_path: Path) -> None:
    """Compared with a plain loop, up to the last bits of lr, which torch's schedule computes recursively."""
    clipped = lightning_module.train(tiny.expert_prior(), tmp_path, steps=STEPS, clip=0.05)
    count = STEPS // lightning_module.EPOCHS * tiny.BATCH_SIZE
    plain = by_hand([tiny.encoded(pair) for pair in tiny.training_pairs(count)], clip=0.05)
    for param, expected in zip(clipped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-4, atol=1e-6)
    assert not tiny.same(clipped, lightning_module.train(tiny.expert_prior(), tmp_path, steps=STEPS, clip=1.0))


def test_lightning_moves_alpha_once_per_step_while_it_accumulates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alphas: list[float] = []
    monkeypatch.setattr(
        lightning_module.FineTuning,
        "on_train_batch_end",
        lambda self, *_: alphas.append(self.optimizers().param_groups[0]["alpha"]),
    )
    options = {"accumulate_grad_batches": 2}
    lightning_module.train(tiny.expert_prior(), tmp_path, steps=STEPS, stop_after=STEPS // 2, trainer_options=options)
    assert alphas == pytest.approx([tiny.ALPHA * (1 - (batch + 1) // 2 / STEPS) for batch in range(STEPS)])


def test_clipping_by_lightning_and_by_the_optimizer_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lightning_module.train(tiny.expert_prior(), tmp_path, steps=STEPS, stop_after=1, clip=2.0, max_grad_norm=0.5)
    assert "clipped twice: the trainer clips the gradient to max_grad_norm=2, then" in caplog.text


def test_lightning_figures_come_through_its_wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []
    monkeypatch.setattr(
        lightning_module.FineTuning,
        "on_train_batch_end",
        lambda self, *_: seen.append(step_figures(self.optimizers())),
    )
    lightning_module.train(tiny.expert_prior(), tmp_path, steps=STEPS, max_grad_norm=1.0)
    assert len(seen) == STEPS
    assert all(figures["prior/ratio/attn"] > 0 and figures["prior/grad_norm"] > 0 for figures in seen)
    assert len({figures["prior/cosine/mlp"] for figures in seen}) == STEPS


# Accelerate


def test_accelerate_keeps_names_and_states(tmp_path: Path) -> None:
    """Preparing an optimizer loads its own state_dict; accumulated micro-batches are one step."""
    from accelerate import Accelerator

    model = tiny.base_model()
    drift = FusedDriftAdamW(named_groups(model), prior=tiny.expert_prior(), state_dtype="int8", max_grad_norm=1.0)
    batch = tiny.together([tiny.encoded(pair) for pair in tiny.training_pairs(4)])
    model(**batch).loss.backward()
    drift.step()
    states = {param: {key: value.clone() for key, value in state.items()} for param, state in drift.state.items()}
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, drift)
    assert unwrap_optimizer(optimizer) is drift
    for param, state in states.items():
        for key, value in state.items():
            assert value.dtype == drift.state[param][key].dtype
            assert torch.equal(value, drift.state[param][key])
    before = [param.detach().clone() for param in model.parameters()]
    for micro_batch in range(2):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved == (micro_batch == 1)
    assert sorted(drift.prior_names) == sorted(tiny.expert_prior())


# The parts


def test_named_groups_look_when_they_are_taken() -> None:
    model = tiny.base_model()
    groups = named_groups(model, weight_decay=0.3)
    model.model.embed_tokens.requires_grad_(False)
    decayed, bare = FusedDriftAdamW(groups).param_groups
    assert (decayed["weight_decay"], bare["weight_decay"]) == (0.3, 0.0)
    assert "model.embed_tokens.weight" not in decayed["param_names"]
    assert all(param.ndim == 2 for param in decayed["params"])
    assert {name.rpartition(".")[2] for name in bare["param_names"]} == {"weight", "bias"}
    assert len(list(named_groups(nn.Linear(2, 3, bias=False)))) == 1


def test_groups_with_names_beside_their_parameters_bind() -> None:
    """torchtitan's groups: tensors, their names in a separate list, and keys of other optimizers."""
    model = tiny.base_model()
    names, params = zip(*model.named_parameters(), strict=True)
    group = {"params": list(params), "param_names": list(names), "fused": True, "foreach": False}
    optimizer = FusedDriftAdamW([group], prior=tiny.expert_prior())
    model(**tiny.together([tiny.encoded((1, 2))])).loss.backward()
    optimizer.step()
    assert sorted(optimizer.prior_names) == sorted(tiny.expert_prior())


@pytest.mark.parametrize("scaling", ["gradnorm", "absolute"])
@pytest.mark.parametrize("max_grad_norm", [None, math.inf])
def test_step_figures(scaling: str, max_grad_norm: float | None) -> None:
    model = tiny.base_model()
    optimizer = FusedDriftAdamW(
        named_groups(model), prior=tiny.expert_prior(), prior_scaling=scaling, max_grad_norm=max_grad_norm
    )
    assert step_figures(optimizer) == {}
    model(**tiny.together([tiny.encoded((1, 2))])).loss.backward()
    optimizer.step()
    figures = step_figures(optimizer, prefix="")
    measured = scaling == "gradnorm" or max_grad_norm is not None
    names = {f"{figure}/{group}" for figure in ("cosine", "ratio") for group in ("attn", "mlp")} if measured else set()
    assert set(figures) == names | {"alpha", "bound", "biased"} | ({"grad_norm"} if max_grad_norm else set())
    assert figures["alpha"] == 1
    assert figures["bound"] == figures["biased"] == len(tiny.expert_prior())
    if measured:
        chosen = torch.tensor(["mlp" in name for name in optimizer.prior_names])
        assert figures["cosine/mlp"] == pytest.approx(float(optimizer.prior_cosine[chosen].mean()))
        assert figures["ratio/attn"] == pytest.approx(float(optimizer.prior_ratio[~chosen].mean()))
    optimizer.param_groups[1]["alpha"] = -2.0
    assert step_figures(optimizer)["prior/alpha"] == -2


@pytest.mark.parametrize(("anneal", "total", "last"), [(0.5, 5, 3), (1, 4, 4), (0.01, 10, 1)])
def test_alpha_reaches_zero_in_the_step_in_which_the_fraction_ends(anneal: float, total: int, last: int) -> None:
    optimizer = FusedDriftAdamW(named_groups(tiny.base_model()), prior=tiny.expert_prior())
    scheduler = AlphaOverTime(anneal=anneal).scheduler(optimizer, 0, total)
    for step in range(1, last + 1):
        scheduler.step()
        assert optimizer.param_groups[0]["alpha"] == pytest.approx(1 - step / last)


def test_step_figures_without_a_prior() -> None:
    layer = nn.Linear(2, 2)
    optimizer = FusedDriftAdamW(layer.parameters(), max_grad_norm=1.0)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.prior_cosine is not None
    assert optimizer.prior_cosine.shape == (0,)
    assert step_figures(optimizer) == {"prior/grad_norm": pytest.approx(6**0.5)}


def test_another_optimizer_is_an_error() -> None:
    other = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    with pytest.raises(TypeError, match="expected a FusedDriftAdamW or a wrapper of one, got AdamW"):
        unwrap_optimizer(other)


@pytest.mark.parametrize("optimizers", [[torch.optim.AdamW], [FusedDriftAdamW, torch.optim.AdamW]])
def test_lightning_stops_at_other_optimizers(optimizers: list[Any], tmp_path: Path) -> None:
    module = lightning_module.FineTuning(None, STEPS)
    made = [cls(module.parameters()) for cls in optimizers]
    module.configure_optimizers = lambda: made
    module.automatic_optimization = len(made) == 1
    loader = DataLoader([tiny.encoded((1, 2))] * 4, 2)
    with pytest.raises(TypeError, match=r"got AdamW: the trainer would|expected one optimizer, a FusedDriftAdamW, got"):
        lightning_module.build(tmp_path).fit(module, loader)


def test_what_is_in_use_is_said(caplog: pytest.LogCaptureFixture) -> None:
    prior = tiny.expert_prior()
    optimizer = drift_optimizer(tiny.base_model(), prior=prior, alpha=0.5, lr=1e-4)
    with caplog.at_level(logging.INFO, "drift_kernels"):
        assert check_in_use(optimizer) is optimizer
        assert f"{len(prior)} parameters with a delta, alpha=0.5, prior_scaling='adaptive_cosine'" in caplog.text
        check_in_use(FusedDriftAdamW(tiny.base_model().parameters()))
        assert "FusedDriftAdamW has no prior: this is plain fine-tuning" in caplog.text
        check_in_use(drift_optimizer(tiny.base_model(), prior=prior, alpha=0.0))
        assert "alpha is 0 at the start of training" in caplog.text
        check_in_use(drift_optimizer(tiny.base_model(), prior=prior, max_grad_norm=0.5), trainer_clips=2.0)
        assert "clipped twice: the trainer clips the gradient to max_grad_norm=2, then" in caplog.text
        caplog.clear()
        optimizer = drift_optimizer(tiny.base_model(), prior=prior, max_grad_norm=math.inf)  # which measures alone
        optimizer.param_groups[1]["alpha"] = 0.0
        check_in_use(optimizer, trainer_clips=2.0)
        assert {record.levelno for record in caplog.records} == {logging.INFO}


def test_what_was_frozen_after_the_optimizer_was_made_is_noticed() -> None:
    model, prior = tiny.base_model(), tiny.expert_prior()
    optimizer = drift_optimizer(model, prior=prior)
    for name in prior:
        model.get_parameter(name).requires_grad_(False)
    with pytest.raises(PriorError, match="all 20 parameters that it covers are frozen"):
        check_in_use(optimizer)

"""alpha by pattern: the bits of param groups with these alphas, wherever alpha is given, and under schedules."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from biasing import BACKENDS, BF16, DEVICE, F32, assert_same, copies, grads_of, random_grads, watched_loads
from torch import Tensor, nn

from drift_kernels import (
    AlphaScheduler,
    FusedDriftAdamW,
    GradientBias,
    Prior,
    PriorMismatchError,
    attach_prior,
    bias_gradients_,
    linear_anneal,
)

SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (33, 65),
    "model.layers.0.self_attn.q_proj.bias": (33,),
    "model.layers.0.mlp.up_proj.weight": (17, 9),
    "model.layers.1.self_attn.q_proj.weight": (5, 7),
    "model.layers.1.mlp.up_proj.weight": (17, 9),
    "model.norm.weight": (65,),
}
ATTENTION, MLP = [n for n in SHAPES if "attn" in n], [n for n in SHAPES if "mlp" in n]
PATTERNS = {"re:layers.1.*mlp": -0.25, "attn": 1.3, "re:mlp": 0.7}
FACTORS = dict.fromkeys(ATTENTION, 1.3) | {MLP[0]: 0.7, MLP[1]: -0.25}

Params = dict[str, nn.Parameter]


def make(dtype: torch.dtype = F32) -> tuple[Params, dict[str, Tensor]]:
    params = {name: nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for name, shape in SHAPES.items()}
    return params, {name: torch.randn(shape, device=DEVICE) * 0.1 for name, shape in SHAPES.items()}


def groups(params: Params, alpha: float = 1.0) -> list[dict[str, Any]]:
    """One for each parameter, with its alpha."""
    return [{"params": [(name, p)], "alpha": alpha * FACTORS.get(name, 0.0)} for name, p in params.items()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", ["absolute", "gradnorm", "adaptive_cosine", "decoupled"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"normalize_to_param": True}], ids=str)
def test_patterns_are_param_groups(backend: str, scaling: str, options: dict[str, Any]) -> None:
    """Bit for bit, under a schedule of alpha; what no pattern fits is left alone."""
    params, deltas = make(F32 if options else BF16)
    others = copies(params)
    common = {"lr": 1e-2, "prior": deltas, "prior_scaling": scaling, "backend": backend, **options}
    ours = FusedDriftAdamW(params.items(), alpha=PATTERNS, **common)
    theirs = FusedDriftAdamW(groups(others), **common)
    schedules = [AlphaScheduler(optimizer, linear_anneal(3)) for optimizer in (ours, theirs)]
    for _ in range(4):
        random_grads(params, others)
        ours.step()
        theirs.step()
        for schedule in schedules:
            schedule.step()
        for name, p in params.items():
            assert torch.equal(p, others[name]), name
    assert set(ours.prior_names) == set(FACTORS)


@pytest.mark.parametrize("scaling", ["absolute", "gradnorm", "adaptive_cosine"])
def test_every_entry_point_takes_them(scaling: str) -> None:
    """The bits of one bias after another, each with a number for alpha and a prior of its tensors alone."""
    params, deltas = make()
    expected, by_function, by_hooks = copies(params), copies(params), copies(params)
    prior = Prior.from_mapping(deltas)
    bias = GradientBias(params.items(), prior, alpha=PATTERNS, prior_scaling=scaling)
    bias.alpha = 0.5
    model = nn.Module()
    for name, p in by_hooks.items():  # their names hold dots
        inner = model
        *path, last = name.split(".")
        for part in path:
            if part not in dict(inner.named_children()):
                inner.add_module(part, nn.Module())
            inner = getattr(inner, part)
        inner.register_parameter(last, p)
    handle = attach_prior(model, prior, alpha=PATTERNS, prior_scaling=scaling)
    handle.alpha = 0.5
    grads = random_grads(params, expected, by_function)
    bias.apply_()
    halves = {pattern: 0.5 * factor for pattern, factor in PATTERNS.items()}
    assert sorted(bias_gradients_(by_function.items(), prior, halves, scaling).names) == sorted(FACTORS)
    for name, factor in FACTORS.items():
        GradientBias([(name, expected[name])], {name: deltas[name]}, alpha=0.5 * factor, prior_scaling=scaling).apply_()
    sum((p * grads[name]).sum() for name, p in by_hooks.items()).backward()
    for found in (params, by_function, by_hooks):
        assert_same(grads_of(found), grads_of(expected))


def test_the_function_takes_other_patterns_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    params, deltas = make()
    prior = Prior.from_mapping(deltas)
    loaded = watched_loads(monkeypatch)
    for alpha, names in ((PATTERNS, list(FACTORS)), (dict(PATTERNS), []), (0.5, list(SHAPES)), ({"mlp": 1}, MLP)):
        random_grads(params)
        before = len(loaded[prior])
        bias_gradients_(params.items(), prior, alpha)
        assert len(loaded[prior]) - before == len(names)


def test_left_alone_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    params, deltas = make()
    prior = Prior.from_mapping(deltas)
    loaded = watched_loads(monkeypatch)
    optimizer = FusedDriftAdamW(params.items(), prior=prior, alpha={"mlp": 0.0, "re:": 1.0})
    random_grads(params)
    optimizer.step()
    assert len(loaded[prior]) == len(SHAPES) - len(MLP)
    assert set(optimizer.prior_names) == set(SHAPES) - set(MLP)


def test_an_alpha_on_the_device_multiplies_them() -> None:
    params, deltas = make()
    others = copies(params)
    alpha = torch.tensor(0.5, dtype=torch.float64, device=DEVICE)
    ours = FusedDriftAdamW(params.items(), prior=deltas, alpha=PATTERNS, capturable=True)
    ours.param_groups[0]["alpha"] = alpha
    theirs = FusedDriftAdamW(groups(others, 0.5), prior=deltas)
    for step in range(3):
        random_grads(params, others)
        ours.step()
        theirs.step()
        for name, p in params.items():
            assert torch.equal(p, others[name]), name
        alpha.mul_(0.5)
        for group, own in zip(theirs.param_groups, groups(others, 0.5 ** (step + 2)), strict=True):
            group["alpha"] = own["alpha"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_and_state_dicts(how: str) -> None:
    """A state_dict holds the groups' alpha; the patterns are of the optimizer, as the prior is."""
    params, deltas = make()
    others = copies(params)
    ours = FusedDriftAdamW(params.items(), prior=deltas, alpha=PATTERNS)
    AlphaScheduler(ours, lambda step: 0.5)
    random_grads(params)
    ours.step()
    if how == "state_dict":
        for name, p in params.items():
            others[name].data.copy_(p)
        again = FusedDriftAdamW(others.items(), prior=deltas, alpha=PATTERNS)
        again.load_state_dict(copy.deepcopy(ours.state_dict()))
    elif how == "deepcopy":
        again = copy.deepcopy(ours)
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert again.param_groups[0]["alpha"] == 0.5
    others = dict(zip(SHAPES, again.param_groups[0]["params"], strict=True))
    random_grads(params, others)
    for optimizer in (ours, again):
        optimizer.step()
    assert_same({n: p.detach() for n, p in params.items()}, {n: p.detach() for n, p in others.items()})
    assert set(again.prior_names) == set(FACTORS)


def test_the_authors_patterns_find_what_they_find() -> None:
    """Theirs are searched in modules' names, which do not end in weight or bias."""
    params, deltas = make()
    theirs = {r"re:\.mlp\.(gate_proj|up_proj|down_proj)$": 0.02, r"re:\.self_attn\.(q_proj|k_proj)$": 0.5}
    bias = GradientBias(params.items(), deltas, alpha=theirs)
    random_grads(params)
    assert set(bias.apply_().names) == {*ATTENTION, *MLP}


@pytest.mark.parametrize(
    ("alpha", "error", "words"),
    [
        ({"re:self_atn": 1.0}, ValueError, "'re:self_atn' matches none of the prior's 6 deltas"),
        ({"attention": 1.0}, ValueError, "alpha by pattern: modules must be any of .* got 'attention'"),
        ({"re:(": 1.0}, ValueError, "not a valid regular expression"),
        ({"attn": math.nan}, ValueError, "alpha must be finite, got alpha=nan for 'attn'"),
        ({"attn": "1"}, TypeError, "must map patterns to numbers, got 'attn': '1'"),
        ({3: 1.0}, TypeError, "must map patterns to numbers, got 3"),
        ({"attn": 0.0}, ValueError, "zero everywhere"),
        ({}, ValueError, "zero everywhere"),
    ],
)
def test_wrong_patterns(alpha: Any, error: type[Exception], words: str) -> None:
    params, deltas = make()
    prior = Prior.from_mapping(deltas)
    for run in (
        lambda: FusedDriftAdamW(params.items(), prior=prior, alpha=alpha),
        lambda: GradientBias(params.items(), prior, alpha=alpha),
        lambda: bias_gradients_(params.items(), prior, alpha),
    ):
        with pytest.raises(error, match=words):
            run()


def test_patterns_that_leave_all_parameters_alone() -> None:
    params, deltas = make()
    with pytest.raises(PriorMismatchError, match="patterns of alpha match none of the 1 matching deltas"):
        GradientBias([(MLP[0], params[MLP[0]])], deltas, alpha={"attn": 1.0})

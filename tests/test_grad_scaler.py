"""Steps under torch.amp.GradScaler: against torch's own fused AdamW, and against the step on unscaled gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import BF16, DEVICE, F16, F32, GRID, Problem, assert_same_bits, coefficients
from torch import Tensor, nn

from drift_kernels import FusedDriftAdamW
from drift_kernels.kernels import backends
from drift_kernels.kernels.coefficients import FIELDS

INT8 = torch.int8
BACKENDS = [name for name in (*backends.NAMES, GRID) if backends.load(name).unavailable(DEVICE) is None]
OPTIMIZERS = [name for name in BACKENDS if name != GRID]
SCALINGS = ["absolute", "gradnorm", "adaptive_cosine", "decoupled"]
SHAPES = {"layers.0.weight": (33, 65), "layers.0.bias": (33,), "norm.weight": (7,)}
Params = dict[str, nn.Parameter]


def models(count: int, dtype: torch.dtype = F32, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[Params]:
    """Make `count` equal models."""
    values = {name: torch.randn(shape, device=DEVICE).to(dtype) for name, shape in shapes.items()}
    return [{name: nn.Parameter(value.clone()) for name, value in values.items()} for _ in range(count)]


def deltas_of(params: Params) -> dict[str, Tensor]:
    return {name: torch.randn(p.shape, device=DEVICE) for name, p in list(params.items())[:2]}


def scaler(init_scale: float = 2.0**10) -> torch.amp.GradScaler:
    made = torch.amp.GradScaler(DEVICE.type, init_scale=init_scale, growth_interval=2)
    made.scale(torch.ones((), device=DEVICE))  # the first call makes the scale
    return made


def set_grads(grads: dict[str, Tensor], params: Params, scale: float | Tensor = 1.0) -> None:
    for name, p in params.items():
        p.grad = (grads[name] * scale).to(p.dtype)


def random_grads(params: Params, infinite: bool = False) -> dict[str, Tensor]:
    """Gradients with few bits, exact in float16 both scaled and unscaled."""
    grads = {name: torch.randint(-128, 128, p.shape, device=DEVICE) / 64.0 for name, p in params.items()}
    if infinite:
        next(iter(grads.values()))[2, 3] = math.inf
    return grads


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [value for p in params for value in optimizer.state[p].values() if isinstance(value, Tensor)]
    return [t.detach().clone() for t in (*params, *states)]


def groups_of(params: Params) -> list[dict[str, Any]]:
    (first, *rest) = params.items()
    return [{"params": [first], "lr": 1e-2}, {"params": rest, "lr": 3e-3, "weight_decay": 0.1}]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("dtypes", "modes"),
    [
        ((F32, F32, F32, F32), {}),
        ((F16, F16, BF16, None), {}),
        ((BF16, F32, F32, BF16), {"master": True}),
        ((BF16, BF16, BF16, BF16), {"stochastic": True}),
        ((BF16, BF16, INT8, INT8), {"stochastic": True}),
        ((BF16, BF16, INT8, BF16), {"master": True}),
    ],
)
def test_a_step_of_zero_changes_no_bit(
    name: str, dtypes: tuple[torch.dtype | None, ...], modes: dict[str, bool]
) -> None:
    """In its own tensor, whatever the row and the gradient contain; the neighbours take their steps."""
    problem = Problem.random([63, 1000, 17_000 if name != "triton" else 1700, 5], dtypes, **modes)
    table = coefficients(4).table
    for row in (0, 2):
        table[row] = math.nan
        table[row, FIELDS["step"]] = 0.0
        problem.grads[row].fill_(math.inf)
    before, expected = problem.clone().outputs(), problem.clone()
    backends.load("reference").update(expected.plan(), table, with_delta=True)
    backends.load(name).update(problem.plan(), table, with_delta=True)
    assert_same_bits(problem.outputs(), expected.outputs())
    count = len(before) // 4
    for row in (0, 2):
        view = slice(row * count, (row + 1) * count)
        assert all(map(torch.equal, problem.outputs()[view], before[view]))
    assert not torch.equal(problem.outputs()[count], before[count])


@pytest.mark.parametrize("backend", OPTIMIZERS)
@pytest.mark.parametrize("clipping", [False, True])
def test_it_is_torch_fused_adamw_under_the_same_scaler(backend: str, clipping: bool) -> None:
    """Scales that grow and back off, several groups, a skipped first step; clipping after `unscale_`."""
    params, expected = models(2)
    ours = FusedDriftAdamW(groups_of(params), backend=backend)
    theirs = torch.optim.AdamW(groups_of(expected), fused=True)
    scalers = [scaler(), scaler()]
    for step in range(12):
        grads = random_grads(params, infinite=step in (0, 5))
        for model, optimizer, holder in ((params, ours, scalers[0]), (expected, theirs, scalers[1])):
            set_grads(grads, model, holder.get_scale())
            before = snapshot(optimizer)
            if clipping:
                holder.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.values(), 0.5)
            holder.step(optimizer)
            holder.update()
            if step in (0, 5):
                assert all(map(torch.equal, before, snapshot(optimizer)))
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert scalers[0].get_scale() != 2.0**10
    for name, p in params.items():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=5e-6)
        assert float(ours.state[p]["step"]) == float(theirs.state[expected[name]]["step"]) == 10
        assert ours.state[p]["step"].device == p.device
    assert not hasattr(ours, "found_inf")


@pytest.mark.parametrize("backend", OPTIMIZERS)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_a_scaled_step_is_the_unscaled_one_bit_for_bit(
    backend: str, scaling: str, max_grad_norm: float | None, dtype: torch.dtype
) -> None:
    """With powers of two and gradients of few bits, the sums are exact, so c and the clip coefficient agree bitwise."""
    params, expected = models(2, dtype)
    common = {"prior": deltas_of(params), "prior_scaling": scaling, "alpha": 0.3, "max_grad_norm": max_grad_norm}
    common["prior"] = {name: (delta * 8).round() / 8 for name, delta in common["prior"].items()}
    ours = FusedDriftAdamW(groups_of(params), backend=backend, **common)
    plain = FusedDriftAdamW(groups_of(expected), backend=backend, **common)
    holder = scaler()
    for step in range(6):
        skipped = step == 3
        grads = random_grads(params, infinite=skipped)
        set_grads(grads, params, holder.get_scale())
        before = snapshot(ours)
        holder.step(ours)
        holder.update()
        if skipped:
            assert all(map(torch.equal, snapshot(ours), before))
            continue
        set_grads(grads, expected)
        plain.step()
        assert all(map(torch.equal, snapshot(ours), snapshot(plain))), f"step {step}"
        if max_grad_norm is not None:
            assert torch.equal(ours.grad_norm, plain.grad_norm)
        if scaling in ("gradnorm", "adaptive_cosine"):
            assert torch.equal(ours.prior_ratio, plain.prior_ratio)
            assert torch.equal(ours.prior_cosine, plain.prior_cosine)


@pytest.mark.parametrize(
    "mode", [{"state_dtype": "int8"}, {"master_weights": True}, {"rounding": "stochastic"}], ids=str
)
def test_a_skipped_step_leaves_codes_scales_masters_and_random_bits(mode: dict[str, Any]) -> None:
    params, expected = models(2, BF16, {"w": (70, 70), "b": (3,)})
    ours, plain = (FusedDriftAdamW(model.items(), lr=1e-2, **mode) for model in (params, expected))
    holder = scaler()
    for infinite in (True, False, True, False):
        grads = random_grads(params, infinite)
        set_grads(grads, params, holder.get_scale())
        holder.step(ours)
        holder.update()
        if not infinite:
            set_grads(grads, expected)
            plain.step()
    assert all(map(torch.equal, snapshot(ours), snapshot(plain)))


@pytest.mark.parametrize("backend", [name for name in OPTIMIZERS if name != "triton" or DEVICE.type == "cuda"])
@pytest.mark.parametrize("infinite", [False, True])
def test_the_host_reads_nothing(backend: str, infinite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (params,) = models(1)
    ours = FusedDriftAdamW(
        params.items(), prior=deltas_of(params), max_grad_norm=1.0, rounding="nearest", backend=backend
    )
    holder = scaler()
    set_grads(random_grads(params), params)
    holder.step(ours)  # builds tables, from the host
    holder.update()
    set_grads(random_grads(params, infinite), params)
    with monkeypatch.context() as patch:
        for reading in ("item", "__float__", "__bool__", "__int__", "tolist"):
            patch.setattr(Tensor, reading, lambda self: pytest.fail("the host read a tensor"))
        holder.step(ours)
    assert {float(state["step"]) for state in ours.state.values()} == {1.0 if infinite else 2.0}


def test_an_optimizer_that_stepped_without_a_scaler_goes_on_with_one_and_back() -> None:
    params, expected = models(2)
    ours, plain = FusedDriftAdamW(params.items()), FusedDriftAdamW(expected.items())
    holder = scaler()
    for held in (False, True, True, False, False):
        grads = random_grads(params)
        set_grads(grads, params, holder.get_scale() if held else 1.0)
        set_grads(grads, expected)
        if held:
            holder.step(ours)
            holder.update()
        else:
            ours.step()
        plain.step()
        assert all(map(torch.equal, snapshot(ours), snapshot(plain)))


def test_a_prior_that_takes_no_statistics_is_scaled_too_and_written_anew_without_a_scaler() -> None:
    params, expected = models(2)
    common = {"prior": deltas_of(params), "prior_scaling": "absolute"}
    ours, plain = FusedDriftAdamW(params.items(), **common), FusedDriftAdamW(expected.items(), **common)
    for scale in (None, 4.0, 8.0, None, None):
        grads = random_grads(params)
        set_grads(grads, params, scale or 1.0)
        set_grads(grads, expected)
        if scale is not None:
            ours.grad_scale = torch.tensor(scale)
        ours.step()
        plain.step()
        if scale is not None:
            del ours.grad_scale
        assert all(map(torch.equal, snapshot(ours), snapshot(plain)))


def test_without_any_gradient_nothing_happens() -> None:
    (params,) = models(1)
    ours = FusedDriftAdamW(params.items(), max_grad_norm=1.0)
    holder = scaler()
    holder.step(ours)
    assert not ours.state


def test_the_gradients_keep_their_scale_and_the_norm_does_not() -> None:
    (params,) = models(1)
    grads = random_grads(params)
    ours = FusedDriftAdamW(params.items(), max_grad_norm=math.inf)
    holder = scaler(256.0)
    set_grads(grads, params, 256.0)
    holder.step(ours)
    norm = torch.stack([g.double().square().sum() for g in grads.values()]).sum().sqrt()
    torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-6, atol=0)
    assert all(torch.equal(p.grad, grads[name] * 256.0) for name, p in params.items())


def test_a_whole_fp16_training_step_is_that_of_torch() -> None:
    """Parameters and gradients of float16, autocast off: `scaler.scale(loss).backward()` and the rest."""
    torch.manual_seed(3)
    ours_model, their_model = (nn.Linear(16, 4).to(DEVICE, F16) for _ in range(2))
    their_model.load_state_dict(ours_model.state_dict())
    ours = FusedDriftAdamW(ours_model.parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(their_model.parameters(), lr=1e-2, fused=True)
    scalers = [scaler(2.0**15), scaler(2.0**15)]  # too large at first
    for _ in range(8):
        x = torch.randn(8, 16, device=DEVICE).to(F16) * 4
        for model, optimizer, holder in ((ours_model, ours, scalers[0]), (their_model, theirs, scalers[1])):
            optimizer.zero_grad()
            holder.scale(model(x).float().square().sum()).backward()
            holder.step(optimizer)
            holder.update()
    assert scalers[0].get_scale() < 2.0**15
    for p, q in zip(ours_model.parameters(), their_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-3)


def test_gradients_keep_their_scale_where_torchs_fused_step_unscales_them() -> None:
    """The README's statement about `param.grad` after `scaler.step`."""
    left = []
    for optimizer_class, options in ((torch.optim.AdamW, {"fused": True}), (FusedDriftAdamW, {})):
        param = nn.Parameter(torch.ones(3, device=DEVICE))
        optimizer = optimizer_class([param], **options)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0)
        scaler.scale(param.sum()).backward()
        scaler.step(optimizer)
        left.append(param.grad.tolist())
    assert left == [[1.0] * 3, [8.0] * 3]

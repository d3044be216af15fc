"""The prior for any optimizer, all gradients together: GradientBias and bias_gradients_."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from biasing import (
    BACKENDS,
    BF16,
    DEVICE,
    F16,
    F32,
    FREE,
    SCALINGS,
    SHAPES,
    assert_same,
    coefficient,
    copies,
    grads_of,
    make_deltas,
    make_params,
    random_grads,
    watched_loads,
)
from checkpoints import text_weights, write_checkpoint
from torch import nn

from drift_kernels import (
    AlphaScheduler,
    FusedDriftAdamW,
    GradientBias,
    Prior,
    PriorError,
    PriorMismatchError,
    bias_gradients_,
    build_prior,
    linear_anneal,
)
from drift_kernels.prior.quantized import quantize

# GradientBias


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_it_is_the_method(backend: str, scaling: str, dtype: torch.dtype) -> None:
    """Within 2e-6 of the largest element of float64 results; in narrower dtypes, plus half an ulp of that element."""
    params, deltas = make_params(dtype), make_deltas()
    bias = GradientBias(params.items(), deltas, alpha=0.7, prior_scaling=scaling, backend=backend)
    half_ulp = 0.0 if dtype == F32 else torch.finfo(dtype).eps / 2
    for _ in range(2):
        grads = random_grads(params)
        figures = bias.apply_()
        assert sorted(figures.names) == sorted(SHAPES)
        assert torch.equal(params[FREE].grad, grads[FREE])
        for name, delta in deltas.items():
            c = coefficient(grads[name], delta, 0.7, scaling)
            expected = grads[name].double() - c * delta.double()
            error = (params[name].grad.double() - expected).abs()
            assert params[name].grad.dtype == dtype
            assert (error <= (2e-6 + half_ulp) * expected.abs().max()).all() if error.numel() else True, name
            if scaling == "absolute":
                assert figures.cosine is None
                assert figures.ratio is None
            elif error.numel():
                row = figures.names.index(name)
                g, d = grads[name].double().flatten(), delta.double().flatten()
                assert math.isclose(figures.cosine[row], g @ d / (g.norm() * d.norm()), abs_tol=1e-6)
                # The ratio is proportional to 1 + cosine, which may be almost zero.
                assert math.isclose(figures.ratio[row], c * d.norm() / g.norm(), rel_tol=1e-5, abs_tol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [*({"prior_scaling": s} for s in SCALINGS), {"prior_scaling": "absolute", "normalize_to_param": True}],
    ids=str,
)
def test_with_torch_adamw_it_is_fused_drift_adamw(backend: str, options: dict[str, Any]) -> None:
    """In float32, within 2e-6 of each tensor's largest element (or of 1) over 20 steps: the bound of the two
    optimizers without a prior, since a stored float32 gradient is what FusedDriftAdamW keeps in a register."""
    params, deltas = make_params(), make_deltas()
    others = copies(params)
    bias = GradientBias(params.items(), deltas, alpha=0.3, **options, backend=backend)
    theirs = torch.optim.AdamW(params.values(), lr=3e-3, weight_decay=0.05)
    ours = FusedDriftAdamW(
        others.items(), lr=3e-3, weight_decay=0.05, prior=deltas, alpha=0.3, **options, backend=backend
    )
    for _ in range(20):
        random_grads(params, others)
        bias.apply_()
        theirs.step()
        ours.step()
    for name, p in params.items():
        if p.numel():
            error = (p - others[name]).abs().max()
            assert error <= 2e-6 * p.abs().max().clamp(min=1.0), f"{name}: {error:.3g}"


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_with_muon() -> None:
    """`absolute` in float32 is one multiplication and one subtraction, so the trajectory is bitwise identical."""
    params, deltas = make_params(), make_deltas()
    others = copies(params)
    bias = GradientBias(params.items(), deltas, alpha=0.3, prior_scaling="absolute")
    matrices = [name for name, p in params.items() if p.dim() == 2 and p.numel()]
    muons = [torch.optim.Muon([model[name] for name in matrices], lr=1e-2) for model in (params, others)]
    for _ in range(5):
        random_grads(params, others)
        bias.apply_()
        for name, delta in deltas.items():
            others[name].grad.sub_(torch.tensor(0.3, device=DEVICE) * delta)
        for muon in muons:
            muon.step()
    for name in matrices:
        assert torch.equal(params[name], others[name])


def test_gradients_may_come_and_go() -> None:
    params, deltas = make_params(), make_deltas()
    bias = GradientBias(params.items(), deltas, prior_scaling="absolute")
    assert bias.apply_().names == []
    for missing in ("layers.0.weight", "norm.weight", None):
        grads = random_grads(params)
        if missing:
            params[missing].grad = None
        assert missing not in bias.apply_().names
        for name, p in params.items():
            delta = deltas.get(name, torch.zeros_like(p))
            assert p.grad is None if name == missing else torch.equal(p.grad, grads[name] - delta)


def test_gradients_may_have_any_strides() -> None:
    params, deltas = make_params(), make_deltas()
    contiguous = copies(params)
    random_grads(params, contiguous)
    weight = params["layers.0.weight"]
    weight.grad = weight.grad.t().contiguous().t()
    before = weight.grad.data_ptr()
    for model in (params, contiguous):
        GradientBias(model.items(), deltas).apply_()
    assert weight.grad.data_ptr() == before
    assert_same(grads_of(params), grads_of(contiguous))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_priors(backend: str, dtype: torch.dtype) -> None:
    """With bfloat16 gradients, codes are bitwise identical to their expanded values."""
    params = make_params(BF16)
    small = {name: quantize(delta, dtype) for name, delta in make_deltas().items() if delta.numel()}
    expected = copies(params)
    random_grads(params, expected)
    GradientBias(params.items(), small, backend=backend).apply_()
    GradientBias(expected.items(), {name: d.expand() for name, d in small.items()}, backend=backend).apply_()
    assert_same(grads_of(params), grads_of(expected))


def test_a_gradient_that_is_not_finite_is_left_where_it_is() -> None:
    params, deltas = make_params(), make_deltas()
    grads = random_grads(params)
    params["norm.weight"].grad[3] = grads["norm.weight"][3] = math.inf
    GradientBias(params.items(), deltas, prior_scaling="gradnorm").apply_()
    assert torch.equal(params["norm.weight"].grad, grads["norm.weight"])
    assert not torch.equal(params["layers.0.bias"].grad, grads["layers.0.bias"])


def test_autograd_sees_the_write() -> None:
    params, deltas = make_params(), make_deltas()
    random_grads(params)
    before = {name: p.grad._version for name, p in params.items()}
    GradientBias(params.items(), deltas).apply_()
    for name, p in params.items():
        assert (p.grad._version > before[name]) == (name in deltas)


def test_alpha_follows_a_schedule() -> None:
    params, deltas = make_params(), make_deltas()
    bias = GradientBias(params.items(), deltas, alpha=0.5, prior_scaling="absolute")
    schedule = AlphaScheduler(bias, linear_anneal(2))
    for alpha in (0.5, 0.25, 0.0):
        assert bias.alpha == alpha
        grads = random_grads(params)
        assert bool(bias.apply_().names) == (alpha != 0)
        for name, delta in deltas.items():
            assert torch.equal(params[name].grad, grads[name] - alpha * delta)
        schedule.step()
    bias.alpha = torch.tensor(-1.0, device=DEVICE)
    grads = random_grads(params)
    bias.apply_()
    assert torch.equal(params["norm.weight"].grad, grads["norm.weight"] + deltas["norm.weight"])


def test_the_folder_of_a_prior(tmp_path: Path) -> None:
    base = text_weights()
    expert = {name: w + 0.01 * torch.randn_like(w) for name, w in base.items()}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "expert", expert)
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    params = {name: nn.Parameter(w.float().to(DEVICE)) for name, w in base.items()}
    expected = copies(params)
    random_grads(params, expected)
    GradientBias(params.items(), tmp_path / "prior").apply_()
    figures = bias_gradients_(expected.items(), prior)
    assert len(figures.names) == len(prior)
    assert_same(grads_of(params), grads_of(expected))


# bias_gradients_


def test_the_function_loads_deltas_once(monkeypatch: pytest.MonkeyPatch) -> None:
    params, deltas = make_params(), make_deltas()
    prior = Prior.from_mapping(deltas)
    loaded = watched_loads(monkeypatch)
    for scaling, alpha in zip(SCALINGS, (0.1, 0.2, 0.3), strict=True):
        expected = copies(params)
        random_grads(params, expected)
        bias_gradients_(params.items(), prior, alpha, scaling)
        assert sorted(loaded[prior]) == sorted(deltas)
        GradientBias(expected.items(), deltas, alpha=alpha, prior_scaling=scaling).apply_()
        assert_same(grads_of(params), grads_of(expected))
    other = copies(params)
    random_grads(other)
    bias_gradients_(other.items(), prior)
    assert sorted(loaded[prior]) == sorted([*deltas, *deltas])


def test_what_the_function_keeps_goes_with_the_prior() -> None:
    params = make_params()
    prior = Prior.from_mapping(make_deltas())
    random_grads(params)
    bias_gradients_(params.items(), prior)
    gone = weakref.ref(prior)
    del prior
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("prior", ["folder", {"norm.weight": torch.ones(7)}], ids=["path", "mapping"])
def test_the_function_takes_what_is_loaded_once(prior: Any) -> None:
    with pytest.raises(TypeError, match=r"prior must be a Prior.*Prior\.open"):
        bias_gradients_(make_params().items(), prior)


# Wrong inputs


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda params: params.values(), PriorError, r"pass model\.named_parameters\(\)"),
        (
            lambda params: [*params.items(), ("twin", params["norm.weight"])],
            ValueError,
            "twin and norm.weight are one parameter",
        ),
        (
            lambda params: {**params, "norm.weight": nn.Parameter(torch.zeros(8))}.items(),
            PriorMismatchError,
            "another model",
        ),
        (lambda params: {**params, "norm.weight": nn.Parameter(torch.zeros(7).double())}.items(), TypeError, "float64"),
    ],
    ids=["unnamed", "twice", "shape", "float64"],
)
def test_parameters(spoil: Any, error: type[Exception], words: str) -> None:
    params, deltas = make_params(), make_deltas()
    before = random_grads(params)
    for make in (GradientBias, bias_gradients_):
        with pytest.raises(error, match=words):
            make(spoil(params), Prior.from_mapping(deltas))
    assert_same(grads_of(params), before)


@pytest.mark.parametrize("after_a_good_step", [False, True])
def test_a_sparse_gradient_changes_nothing(after_a_good_step: bool) -> None:
    params, deltas = make_params(), make_deltas()
    bias = GradientBias(params.items(), deltas)
    if after_a_good_step:
        random_grads(params)
        bias.apply_()
    random_grads(params)
    params["layers.0.weight"].grad = params["layers.0.weight"].grad.to_sparse()
    before = grads_of(params)
    with pytest.raises(TypeError, match=r"gradient of parameter layers\.0\.weight is sparse"):
        bias.apply_()
    assert_same({n: g.to_dense() for n, g in grads_of(params).items()}, {n: g.to_dense() for n, g in before.items()})
    params["layers.0.weight"].grad = None
    assert "layers.0.weight" not in bias.apply_().names


def test_an_alpha_spoiled_between_steps_changes_nothing() -> None:
    params, deltas = make_params(), make_deltas()
    bias = GradientBias(params.items(), deltas)
    before = random_grads(params)
    bias.alpha = math.inf
    with pytest.raises(ValueError, match="alpha must be finite"):
        bias.apply_()
    assert_same(grads_of(params), before)

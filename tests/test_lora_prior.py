"""Priors for PEFT's adapters: their pull, compared with PEFT's own forward; and rejected input."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from lora import adapted_model, deltas, gradients, loss_of, text_model, train, zero_gradients
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from drift_kernels import FusedDriftAdamW, GradientBias, Prior, PriorError, PriorMismatchError, build_prior
from drift_kernels.adapters import projected
from drift_kernels.integrations import named_groups
from drift_kernels.integrations.peft import lora_prior
from drift_kernels.kernels import backends
from drift_kernels.kernels.scalings import SCALINGS
from drift_kernels.prior import LowRankDelta, quantize

ALPHA = 0.7
CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "own ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 1}},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
}


def weight_by_forward(layer: Any) -> Tensor:
    """The weight that a PEFT layer applies, with autograd: its output for unit vectors, or for all tokens."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        return layer(torch.arange(base.num_embeddings))
    made = layer(torch.eye(layer.in_features, dtype=base.weight.dtype))
    made = made if getattr(base, "bias", None) is None else made - base.bias
    return made if isinstance(base, Conv1D) else made.T


def oracle(model: nn.Module, prior: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of -alpha <delta, W> in every trained parameter, in float64, through PEFT's forward."""
    model = copy.deepcopy(model).double().eval()
    pull = torch.zeros((), dtype=torch.float64)
    for name, delta in prior.items():
        module = model.get_submodule(f"base_model.model.{name.rpartition('.')[0]}")
        if hasattr(module, "get_base_layer") and name.endswith("weight"):
            pull = pull - ALPHA * (delta.double() * weight_by_forward(module)).sum()
    pull.backward()
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def add_pull(model: nn.Module, prior: Any) -> Any:
    bound = lora_prior(model, prior)
    return GradientBias(model.named_parameters(), bound, alpha=ALPHA, prior_scaling="absolute").apply_()


@pytest.mark.parametrize("variant", VARIANTS)
def test_absolute_is_the_gradient_of_the_pull(variant: str) -> None:
    """Deltas of the factors in float32, compared with PEFT's forward in float64."""
    model = adapted_model(**VARIANTS[variant])
    prior = deltas()
    expected = oracle(model, prior)
    zero_gradients(model)
    found = add_pull(model, prior)
    adapted = {name for name in expected if "magnitude" not in name}
    assert set(found.names) == adapted
    assert len(adapted) >= 6
    for name, param in model.named_parameters():
        if name in adapted:
            error = (param.grad.double() - expected[name]).abs().max()
            assert error <= 3e-6 * expected[name].abs().max(), name
        elif param.requires_grad:
            assert not param.grad.any(), "DoRA's magnitudes are not pulled"


def test_the_factors_are_exact_in_float64() -> None:
    model, prior = adapted_model(use_dora=True).double(), deltas()
    expected = oracle(model, prior)
    for adapter in lora_prior(model, prior).adapters:
        delta = prior[adapter.weight.removeprefix("base_model.model.")].double()
        for name, found in zip(adapter.names, projected(delta, adapter.factors()), strict=True):
            assert (found * -ALPHA - expected[name]).abs().max() <= 1e-12 * expected[name].abs().max()


def test_a_transposed_weight() -> None:
    """Sums of up to 14 products, scaled, in float32: each rounding is at most 2**-24 of the sum of their magnitudes."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"c_attn": Conv1D(9, 14)})])})
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True), model)
    model.layers[0].c_attn.lora_B["default"].weight.data.normal_()
    delta = torch.randn(14, 9)
    exact, sums = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(sums.parameters()).abs(), sums.parameters())
    for each, d in ((exact, delta), (sums, -delta.abs())):
        (ALPHA * (d.double() * -weight_by_forward(each.layers[0].c_attn)).sum()).backward()
    zero_gradients(model)
    add_pull(model, {"layers.0.c_attn.weight": delta})
    for name, grad in gradients(model).items():
        assert ((grad - gradients(exact)[name]).abs() <= 20 * 2**-24 * gradients(sums)[name]).all(), name


def test_what_is_trained_in_full_beside_adapters_has_its_delta_as_it_is() -> None:
    model = adapted_model(target_modules=["q_proj"], modules_to_save=["lm_head"], bias="lora_only")
    zero_gradients(model)
    prior = deltas() | {"model.layers.0.self_attn.q_proj.bias": torch.randn(40)}
    figures = add_pull(model, prior)
    names = {
        "base_model.model.lm_head.modules_to_save.default.weight": "lm_head.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias": "model.layers.0.self_attn.q_proj.bias",
    }
    assert names.keys() < set(figures.names)
    params = dict(model.named_parameters())
    for live, name in names.items():
        torch.testing.assert_close(params[live].grad, -ALPHA * prior[name])


def test_the_active_adapter_is_meant() -> None:
    model = adapted_model(target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    prior = deltas(which="q_proj.weight")
    for active in ("default", "second"):
        model.set_adapter(active)
        found = [name for adapter in lora_prior(model, prior).adapters for name in adapter.names]
        assert len(found) == 4
        assert all(f".{active}." in name for name in found)
    model.base_model.set_adapter(["default", "second"])
    zero_gradients(model)
    expected = oracle(model, prior)
    add_pull(model, prior)
    assert len(expected) == 8
    for name, grad in gradients(model).items():
        assert (grad.double() - expected[name]).abs().max() <= 3e-6 * expected[name].abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "float8", "low rank"])
def test_deltas_are_held_as_they_are_stored(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They pull like their expanded values; factors are never multiplied out."""

    def stored(delta: Tensor) -> Any:
        if kind == "low rank":
            return LowRankDelta(torch.randn(delta.shape[0], 2), torch.randn(2, delta.shape[1]))
        if kind == "bfloat16":
            return delta.bfloat16()
        return quantize(delta, torch.int8 if kind == "int8" else torch.float8_e4m3fn)

    model, prior = adapted_model(), {name: stored(delta) for name, delta in deltas(which="proj.weight").items()}
    expected = oracle(model, {name: d.float() if isinstance(d, Tensor) else d.expand() for name, d in prior.items()})
    if kind == "low rank":
        monkeypatch.delattr(LowRankDelta, "expand")
    zero_gradients(model)
    optimizer = FusedDriftAdamW(named_groups(model), prior=lora_prior(model, prior), prior_scaling="absolute")
    optimizer.step()
    held = [p.delta for p in optimizer._engine.binding.adapted._projections.values()]
    assert {type(delta) for delta in held} == {type(next(iter(prior.values())))}
    elements = sum(param.numel() for param in model.parameters() if param.requires_grad)
    source = sum(t.nbytes for d in held for t in ((d,) if isinstance(d, Tensor) else vars(d).values()))
    assert optimizer.memory_report()["prior"] == pytest.approx(4 + source / elements)
    zero_gradients(model)
    model.load_state_dict(adapted_model().state_dict())
    add_pull(model, prior)
    for name, grad in gradients(model).items():
        assert (grad.double() - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max()


@pytest.mark.parametrize("scaling", ["gradnorm", "adaptive_cosine"])
def test_norms_are_those_of_the_projected_deltas(scaling: str) -> None:
    model, prior = adapted_model(), deltas(which="proj.weight")
    towards = {name: -grad / ALPHA for name, grad in oracle(model, prior).items()}
    optimizer = FusedDriftAdamW(
        named_groups(model), prior=lora_prior(model, prior), prior_scaling=scaling, alpha=ALPHA, lr=0.0
    )
    loss_of(model, 0).backward()
    grads = gradients(model)
    optimizer.step()
    for name, cosine, ratio in zip(optimizer.prior_names, optimizer.prior_cosine, optimizer.prior_ratio, strict=True):
        delta, grad = towards[name].flatten(), grads[name].double().flatten()
        expected = torch.dot(delta, grad) / (delta.norm() * grad.norm())
        assert float(cosine) == pytest.approx(float(expected), abs=1e-5)
        share = 1.0 if scaling == "gradnorm" else (1 + float(expected)) / 2
        assert float(ratio) == pytest.approx(ALPHA * share, abs=1e-5)


def test_decoupled_merges_delta_into_the_span_of_a() -> None:
    model, prior = adapted_model(started=False), deltas(which="proj.weight")
    before = {name: weight_by_forward(m).detach() for name, m in layers_of(model)}
    zero_gradients(model)
    optimizer = FusedDriftAdamW(
        named_groups(model, 0.0), prior=lora_prior(model, prior), prior_scaling="decoupled", alpha=2.0, lr=0.25
    )
    optimizer.step()
    for name, layer in layers_of(model):
        a = layer.lora_A["default"].weight.detach()
        delta = prior[f"{name.removeprefix('base_model.model.')}.weight"]
        moved = weight_by_forward(layer).detach() - before[name]
        torch.testing.assert_close(moved, 0.5 * delta @ torch.linalg.pinv(a) @ a, rtol=1e-4, atol=1e-6)


def test_normalize_to_param_has_the_norms_of_the_weights() -> None:
    model, prior = adapted_model(), deltas(which="q_proj.weight")
    towards = oracle(model, prior)
    zero_gradients(model)
    GradientBias(
        model.named_parameters(),
        lora_prior(model, prior),
        alpha=ALPHA,
        prior_scaling="absolute",
        normalize_to_param=True,
    ).apply_()
    for name, grad in gradients(model).items():
        if "q_proj" in name:
            weight = f"{name.partition('.lora_')[0]}.weight".removeprefix("base_model.model.")
            base = model.get_submodule(name.partition(".lora_")[0]).base_layer.weight
            ratio = base.norm() / prior[weight].norm()
            torch.testing.assert_close(grad.double(), ratio * towards[name], rtol=1e-4, atol=1e-9)


def layers_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


@pytest.mark.parametrize("backend", [name for name in ("cpu", "triton") if not backends.load(name).unavailable(CPU)])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_backends_agree(scaling: str, backend: str) -> None:
    """Bitwise if no coefficient depends on sums, whose last bits differ between backends."""
    results = []
    for name in ("reference", backend):
        model = adapted_model(target_modules=["q_proj", "down_proj"])
        optimizer = FusedDriftAdamW(
            named_groups(model), prior=lora_prior(model, deltas()), prior_scaling=scaling, backend=name,
            alpha=20.0 if scaling == "decoupled" else 1.0,
        )  # fmt: skip
        results.append(train(model, optimizer, 0, 3))
    bound = 0.0 if scaling in ("absolute", "decoupled") else 1e-5
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=bound, atol=bound / 100)


def test_schedules_of_groups_and_alphas_by_pattern() -> None:
    model = adapted_model()
    zero_gradients(model)
    expected = oracle(model, {name: delta for name, delta in deltas().items() if "v_proj.weight" in name})
    GradientBias(
        model.named_parameters(), lora_prior(model, deltas()), alpha={"re:v_proj": ALPHA}, prior_scaling="absolute"
    ).apply_()
    for name, grad in gradients(model).items():
        if "v_proj" in name:
            assert (grad.double() - expected[name]).abs().max() <= 3e-6 * expected[name].abs().max()
        else:
            assert not grad.any()


def test_tokens_that_were_added_have_no_delta() -> None:
    model = adapted_model(target_modules=["embed_tokens"])
    prior = {"embed_tokens.weight": deltas()["model.embed_tokens.weight"][:50]}
    zero_gradients(model)
    padded = torch.cat([prior["embed_tokens.weight"], torch.zeros(11, 40)])
    expected = oracle(model, {"model.embed_tokens.weight": padded})
    add_pull(model, prior)
    for name, grad in gradients(model).items():
        assert (grad.double() - expected[name]).abs().max() <= 3e-6 * expected[name].abs().max()


def test_what_the_prior_acts_on_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted_model(target_modules=["q_proj", "v_proj"])
    with caplog.at_level(logging.INFO, "drift_kernels"):
        FusedDriftAdamW(named_groups(model), prior=lora_prior(model, deltas(which="q_proj.weight")))
    assert "the prior acts on 4 of 8 trainable parameters" in caplog.text


def test_an_adapter_of_another_kind_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.q_proj = nn.Conv2d(3, 4, 2), nn.Linear(4, 4)

    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv", "q_proj"]), Net())
    with caplog.at_level(logging.WARNING, "drift_kernels"):
        assert len(lora_prior(model, {"q_proj.weight": torch.randn(4, 4)}).adapters) == 1
    assert "does not act on 1 adapters: conv (Conv2d)" in caplog.text


def test_misuse_is_refused() -> None:
    prior = deltas()
    with pytest.raises(PriorError, match="no active LoRA adapter"):
        lora_prior(text_model(), prior)
    model = adapted_model()
    with pytest.raises(ValueError, match="refresh must be at least 1 step, got 0"):
        lora_prior(model, prior, refresh=0)
    for refresh in (1.5, True):
        with pytest.raises(TypeError, match=f"refresh must be an integer number of steps, got {refresh}"):
            lora_prior(model, prior, refresh=refresh)  # type: ignore[arg-type]
    with pytest.raises(PriorMismatchError, match=r"use drift_kernels\.integrations\.peft\.lora_prior"):
        FusedDriftAdamW(named_groups(model), prior=prior)
    shapes = {name: torch.randn(3, 3) for name in prior if "q_proj.weight" in name}
    with pytest.raises(PriorMismatchError, match=r"(?s)2 differ in shape: .*q_proj.weight \[40, 40\] vs\. \[3, 3\]"):
        FusedDriftAdamW(named_groups(model), prior=lora_prior(model, shapes))
    frozen = adapted_model().requires_grad_(False)
    with pytest.raises(PriorMismatchError, match="are frozen"):
        FusedDriftAdamW(frozen.named_parameters(), prior=lora_prior(frozen, prior))


def test_weights_in_place_of_deltas_are_noticed() -> None:
    model = adapted_model()
    expert = {name: 1.01 * param.detach() for name, param in text_model().named_parameters()}
    optimizer = FusedDriftAdamW(named_groups(model), prior=lora_prior(model, expert))
    loss_of(model, 0).backward()
    with pytest.raises(PriorError, match="look like weights"):
        optimizer.step()


def test_another_model_than_that_of_the_prior_is_noticed() -> None:
    model, other = adapted_model(), adapted_model()
    optimizer = FusedDriftAdamW(named_groups(model), prior=lora_prior(other, deltas()))
    loss_of(model, 0).backward()
    before = gradients(model)
    with pytest.raises(PriorError, match="not the current one of the model that lora_prior was called for"):
        optimizer.step()
    assert all(torch.equal(grad, before[name]) for name, grad in gradients(model).items())
    with pytest.raises(TypeError, match="call lora_prior again"):
        copy.deepcopy(optimizer)


def test_the_model_is_not_kept_alive() -> None:
    model = adapted_model()
    prior = lora_prior(model, deltas())
    del model
    gc.collect()
    with pytest.raises(PriorError, match="no longer exists"):
        prior.adapters[0].params()


def test_a_prior_of_a_folder_serves_full_and_adapted_models_alike(tmp_path: Any) -> None:
    base, expert = text_model(0).state_dict(), text_model(1).state_dict()
    for name, weights in (("base", base), ("expert", expert)):
        write_checkpoint(tmp_path / name, {key: value.contiguous() for key, value in weights.items()})
    build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", dtype=torch.float32)
    model = adapted_model()
    zero_gradients(model)
    expected = oracle(model, {name: expert[name] - base[name] for name in expert if "proj.weight" in name})
    add_pull(model, tmp_path / "prior")
    for name, grad in gradients(model).items():
        assert (grad.double() - expected[name]).abs().max() <= 3e-6 * expected[name].abs().max()
    assert Prior.open(tmp_path / "prior").fingerprint == lora_prior(model, tmp_path / "prior").prior.fingerprint

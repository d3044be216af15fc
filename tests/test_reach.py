"""What a prior acts on: logged once, an error if it acts on nothing, and deltas that are not differences."""

from __future__ import annotations

import copy
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from biasing import DEVICE, make_deltas, make_params, random_grads
from checkpoints import text_weights, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from drift_kernels import (
    FusedDriftAdamW,
    GradientBias,
    Prior,
    PriorError,
    PriorMismatchError,
    attach_prior,
    bias_gradients_,
    build_prior,
)
from drift_kernels.engine.binding import PriorBinding
from drift_kernels.prior.quantized import QuantizedDelta, quantize
from drift_kernels.sharding import Shard

ROOT = Path(__file__).parents[1]


class Model(nn.Module):
    """A model with a part that the prior covers, and another part."""

    def __init__(self, width: int = 64, tokens: int = 20) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(tokens, width, device=DEVICE)
        self.o_proj = nn.Linear(width, width, bias=False, device=DEVICE)
        self.adapter = nn.Linear(width, 4, bias=False, device=DEVICE)

    def backward(self) -> None:
        ids = torch.arange(len(self.embed_tokens.weight), device=DEVICE)
        self.adapter(self.o_proj(self.embed_tokens(ids))).square().sum().backward()


def optimizer(model: nn.Module, prior: Any, **options: Any) -> FusedDriftAdamW:
    return FusedDriftAdamW(model.named_parameters(), prior=prior, **options)


def gradient_bias(model: nn.Module, prior: Any, **options: Any) -> GradientBias:
    return GradientBias(model.named_parameters(), prior, **options)


def function(model: nn.Module, prior: Any, **options: Any) -> Any:
    return bias_gradients_(model.named_parameters(), Prior.of(prior), **options)


ENTRIES: dict[str, Callable[..., Any]] = {
    "FusedDriftAdamW": optimizer,
    "GradientBias": gradient_bias,
    "bias_gradients_": function,
    "attach_prior": attach_prior,
}
entries = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


def delta(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE) * 0.1


# Frozen parameters


@entries
def test_a_prior_of_frozen_parameters_is_refused(entry: Callable[..., Any]) -> None:
    model = Model()
    model.o_proj.requires_grad_(False)
    words = r"no effect: all 1 parameters that it covers are frozen \(o_proj\.weight\)\. Unfreeze"
    with pytest.raises(PriorMismatchError, match=words):
        entry(model, {"o_proj.weight": delta(64, 64)})


@entries
def test_partly_frozen_is_said(entry: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    model.embed_tokens.requires_grad_(False)
    entry(model, {"o_proj.weight": delta(64, 64), "embed_tokens.weight": delta(20, 64)})
    (record,) = [record for record in caplog.records if "acts on" in record.message]
    assert record.levelno == logging.WARNING
    assert record.message == (
        "the prior acts on 1 of 2 trainable parameters, 4,096 of 4,352 elements; "
        "1 parameters that it covers are frozen: embed_tokens.weight"
    )


def test_what_is_frozen_later_waits_its_turn(caplog: pytest.LogCaptureFixture) -> None:
    """Frozen after the optimizer is made, in a step with a new param group, and trained again: logged once."""
    model = Model()
    extra = nn.Parameter(torch.ones(3, device=DEVICE))
    drift = FusedDriftAdamW(model.named_parameters(), lr=1e-2, prior={"o_proj.weight": delta(64, 64)})
    model.o_proj.requires_grad_(False)
    for step in range(3):
        drift.zero_grad()
        model.backward()
        if step == 1:
            drift.add_param_group({"params": [("extra", extra)]})
        drift.step()
        assert drift.prior_names == []
    idle = [record for record in caplog.records if "no effect in this step" in record.message]
    assert [record.levelno for record in idle] == [logging.WARNING]
    model.o_proj.requires_grad_(True)
    model.backward()
    drift.step()
    assert drift.prior_names == ["o_proj.weight"]


def test_a_bias_without_gradients_says_so(caplog: pytest.LogCaptureFixture) -> None:
    params = make_params()
    bias = GradientBias(params.items(), make_deltas())
    for _ in range(3):
        bias.apply_()
    assert len([record for record in caplog.records if "the prior has no effect" in record.message]) == 1


def test_a_prior_of_zeros_that_was_built_before_is_refused() -> None:
    prior = Prior.from_mapping({"o_proj.weight": torch.zeros(64, 64), "other.weight": torch.ones(3)})
    with pytest.raises(PriorMismatchError, match="the deltas of all 1 parameters that it covers are zero"):
        optimizer(Model(), prior)


def test_adapters_alone_are_explained() -> None:
    """PEFT's trainable parameters, with the frozen ones not passed to the optimizer."""
    adapters = {
        f"layers.0.self_attn.q_proj.lora_{part}.default.weight": nn.Parameter(torch.ones(2, 2)) for part in "AB"
    }
    prior = {"layers.0.self_attn.q_proj.weight": delta(4, 4)}
    with pytest.raises(
        PriorMismatchError, match=r"(?s)no parameter matches the prior.*adapters \(LoRA\) have no deltas"
    ):
        GradientBias(adapters.items(), prior)


# What is logged


@entries
def test_a_binding_is_said_once(entry: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    made = entry(model, {"o_proj.weight": delta(64, 64)})
    copy.deepcopy(model)
    for _ in range(2):
        model.backward()
        if hasattr(made, "step"):
            copy.deepcopy(made).step()
            made.step()
    records = [record for record in caplog.records if "acts on" in record.message]
    assert [record.message for record in records] == [
        "the prior acts on 1 of 3 trainable parameters, 4,096 of 5,632 elements"
    ]
    assert records[0].levelno == logging.INFO


def test_good_news_are_said_by_the_first_rank_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every rank logs frozen parameters."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    model, prior = Model(), {"o_proj.weight": delta(64, 64), "adapter.weight": delta(4, 64)}
    gradient_bias(model, prior)
    assert not caplog.records
    model.adapter.requires_grad_(False)
    gradient_bias(model, prior)
    assert "1 parameters that it covers are frozen: adapter.weight" in caplog.text


SCRIPT = """
import logging, sys, torch
from drift_kernels import GradientBias
{}
GradientBias([("up_proj.weight", torch.nn.Parameter(torch.randn(9, 9)))], {{"up_proj.weight": torch.randn(9, 9)}})
"""
SAID = "the prior acts on 1 of 1 trainable parameters, 81 of 81 elements"


@pytest.mark.parametrize(
    ("set_up", "said"),
    [
        ("", [f"drift_kernels: {SAID}"]),
        ("logging.basicConfig(format='mine: %(message)s')", [f"mine: {SAID}"]),
        ("logging.getLogger('drift_kernels').setLevel(logging.WARNING)", []),
        ("import importlib; importlib.reload(sys.modules['drift_kernels'])", [f"drift_kernels: {SAID}"]),
    ],
    ids=["nothing", "root", "silenced", "reloaded"],
)
def test_it_reaches_the_terminal_whatever_logging_is_set_up(set_up: str, said: list[str]) -> None:
    command = [sys.executable, "-c", SCRIPT.format(set_up)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.splitlines() == said


# Weights instead of differences


@entries
@pytest.mark.parametrize("quantised", [False, True])
def test_weights_are_not_taken_for_deltas(entry: Callable[..., Any], quantised: bool) -> None:
    """An expert's state_dict: almost the same weights. It is rejected before anything has changed."""
    model = Model()
    expert = {name: w.detach() + 0.05 * torch.randn_like(w) for name, w in model.named_parameters()}
    prior = {name: quantize(w, torch.int8) if quantised else w for name, w in expert.items()}
    model.backward()
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}

    def run() -> None:
        made = entry(model, prior)
        getattr(made, "step", getattr(made, "apply_", model.backward))()

    words = r"these deltas look like weights, not differences of weights: .*weight has (?:0\.9|1\.)\d+ times"
    with pytest.raises(PriorError, match=words):
        run()
    for name, p in model.named_parameters() if entry is not attach_prior else ():
        assert torch.equal(p, before[name][0])
        assert torch.equal(p.grad, before[name][1])


@pytest.mark.parametrize("kind", ["small along W", "across W", "against W", "large"])
def test_differences_are_not_taken_for_weights(kind: str) -> None:
    model = Model()
    factors = {"small along W": (0.4, 0.0), "across W": (0.0, 1.0), "against W": (-1.0, 0.3), "large": (3.0, 0.0)}
    along, across = factors[kind]
    prior = {
        name: along * w.detach() + across * torch.randn_like(w) * w.detach().std()
        for name, w in model.named_parameters()
    }
    model.backward()
    optimizer(model, prior).step()


def test_a_sampled_comparison_looks_at_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most eight of many matrices."""
    from drift_kernels.engine import lookalikes

    looked_at: list[str] = []
    products = lookalikes._products
    monkeypatch.setattr(lookalikes, "_products", lambda c: looked_at.append(c.name) or products(c))
    params = {f"layers.{i}.up_proj.weight": nn.Parameter(torch.randn(20, 20)) for i in range(50)}
    random_grads(params)
    GradientBias(params.items(), {name: torch.randn(20, 20) for name in params}).apply_()
    assert 1 <= len(looked_at) <= 8


# Tokens that were added


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight"])
def test_added_tokens_have_no_bias(tmp_path: Path, name: str, dtype: torch.dtype, caplog: Any) -> None:
    """The common rows are biased bitwise as in a model without the tokens; also with a stored prior."""
    base = text_weights() | {"lm_head.weight": torch.randn(101, 31)}
    expert = {key: w + 0.01 * torch.randn_like(w) for key, w in base.items()}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "expert", expert)
    prior = build_prior(
        tmp_path / "expert", tmp_path / "base", tmp_path / "prior", modules=["embed", "head"], dtype=dtype
    )
    rows = {"grown": 113, "plain": 101}
    params = {key: {name: nn.Parameter(torch.randn(n, 31, device=DEVICE).bfloat16())} for key, n in rows.items()}
    grad = torch.randn(113, 31, device=DEVICE).bfloat16()
    for key, n in rows.items():
        params[key][name].grad = grad[:n].clone()
        GradientBias(params[key].items(), prior, prior_scaling="absolute").apply_()
    assert torch.equal(params["grown"][name].grad[:101], params["plain"][name].grad)
    assert torch.equal(params["grown"][name].grad[101:], grad[101:])
    assert not torch.equal(params["plain"][name].grad, grad[:101])
    assert f"tokens were added to {name}: the delta is zero for them" in caplog.text


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embed_tokens.weight", (19, 64)),
        ("embed_tokens.weight", (21, 65)),
        ("embed_tokens.weight", (21,)),
        ("layers.0.self_attn.o_proj.weight", (21, 64)),
    ],
)
def test_other_shapes_stay_errors(name: str, shape: tuple[int, ...]) -> None:
    params = {name: nn.Parameter(torch.zeros(shape)), "norm.weight": nn.Parameter(torch.zeros(3))}
    prior = {name: delta(20, 64), "norm.weight": delta(3)}
    with pytest.raises(PriorMismatchError, match=rf"parameter '{name}' has shape .*{shape[0]}.*\(20, 64\)"):
        GradientBias(params.items(), prior)


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    begin=st.integers(0, 9),
    size=st.integers(0, 9),
    columns=st.sampled_from([(0, 128), (0, 256), (128, 256), (5, 77)]),
    seed=st.integers(0, 2**32),
)
def test_shards_of_an_embedding_with_added_tokens(
    dtype: torch.dtype, begin: int, size: int, columns: tuple[int, int], seed: int
) -> None:
    """A rank's part, at every position around the end of the delta's 7 rows."""
    exact = torch.randn(7, 256, generator=torch.Generator().manual_seed(seed)) * 0.1
    stored: Tensor | QuantizedDelta = quantize(exact, dtype) if dtype == torch.int8 else exact.to(dtype)
    whole = torch.zeros(18, 256)
    whole[:7] = stored.expand() if isinstance(stored, QuantizedDelta) else stored.float()
    box = slice(begin, begin + size), slice(*columns)
    held = nn.Parameter(torch.zeros(size, columns[1] - columns[0], dtype=torch.bfloat16))
    binding = PriorBinding.of({"embed_tokens.weight": stored}, None)
    binding.check([("embed_tokens.weight", nn.Parameter(torch.zeros(18, 256)))])
    (bound,) = binding.bind([("embed_tokens.weight", held, Shard((18, 256), box, ()))])
    assert bound is not None
    found = bound.stored.expand() if isinstance(bound.stored, QuantizedDelta) else bound.stored.float()
    assert torch.equal(found, whole[box])
    assert math.isclose(bound.delta_norm, float(whole.double().norm()), rel_tol=1e-5)

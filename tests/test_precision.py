"""Stochastic rounding, master weights and one-byte states: their guarantees, and the optimizer that uses them."""

from __future__ import annotations

import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from drift_kernels import FusedDriftAdamW
from drift_kernels.engine.binding import PriorBinding
from drift_kernels.formats import blocks, philox, rounding
from drift_kernels.kernels import backends
from drift_kernels.prior import quantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [name for name in backends.NAMES if backends.load(name).unavailable(DEVICE) is None]
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
SHAPES = {"layers.0.weight": (67, 129), "layers.1.weight": (5001,), "norm.weight": (7,)}
MODES: list[dict[str, Any]] = [
    {"rounding": "stochastic"},
    {"rounding": "stochastic", "state_dtype": BF16},
    {"master_weights": True},
    {"master_weights": True, "state_dtype": BF16, "rounding": "stochastic"},
    {"state_dtype": "int8"},
    {"state_dtype": torch.int8, "rounding": "stochastic"},
    {"state_dtype": "int8", "master_weights": True},
]
Params = dict[str, nn.Parameter]


def make(dtype: torch.dtype = BF16) -> Params:
    return {name: nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for name, shape in SHAPES.items()}


def copies(params: Params, dtype: torch.dtype = BF16) -> Params:
    return {name: nn.Parameter(p.detach().clone().to(dtype)) for name, p in params.items()}


def random_grads(*models: Params) -> None:
    """Give every model the same fresh bfloat16 gradients."""
    for name in models[0]:
        grad = torch.randn(models[0][name].shape, device=DEVICE).to(BF16)
        for params in models:
            params[name].grad = grad.to(params[name].dtype, copy=True)


def int8_prior(params: Params) -> dict[str, Any]:
    return {name: quantize(torch.randn_like(p, dtype=F32) * 0.1, torch.int8) for name, p in params.items()}


# Random bits


def test_philox_gives_the_published_answers() -> None:
    """Random123's known answers for 4x32-7: counters and keys of all zeros, and of all ones."""
    for word, expected in (
        (0, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        (0xFFFFFFFF, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    ):
        words = philox.philox([torch.full((1,), word)] * 4, (word, word))
        assert [int(x) for x in words] == expected


@pytest.mark.parametrize("exponent", [-120, -30, -8, 0, 9, 100])
def test_stochastic_rounding_is_unbiased(exponent: int) -> None:
    """At any place between two bfloat16, the mean over all bits is the value. Of 100,000 drawn ones, as many round away
    from zero as they should, within Bernstein's bound for a chance of 1e-12."""
    n = 100_000
    for sign in (1.0, -1.0):
        x = torch.tensor([sign * (1.0 + float(torch.rand(()))) * 2.0**exponent], dtype=F32)
        every = rounding.round_stochastically(x.expand(2**16), torch.arange(2**16)).double()
        assert len(every.unique()) <= 2
        assert every.mean() == x.double()
        bits = philox.random_bits(int(torch.randint(2**62, ())), 7, philox.PARAM, torch.arange(n))
        away = (rounding.round_stochastically(x.expand(n), bits).abs() > x.abs()).sum()
        share, log = int(x.view(torch.int32) & 0xFFFF) / 2**16, math.log(2e12)
        bound = log / 3 + math.sqrt(log**2 / 9 + 2 * log * n * share * (1 - share))
        assert abs(int(away) - n * share) <= bound


def test_bits_differ_where_anything_differs_and_repeat_where_nothing_does() -> None:
    n = 4099
    base = philox.random_bits(5, 1, philox.PARAM, torch.arange(n))
    assert torch.equal(base, philox.random_bits(5, 1, philox.PARAM, torch.arange(n)))
    assert torch.equal(base[:1000], philox.random_bits(5, 1, philox.PARAM, torch.arange(1000)))
    assert base.min() >= 0
    assert base.max() < 2**16
    others = [(6, 1, 0), (5 + 2**32, 1, 0), (5, 2, 0), (5, 1, 1), (5, 1, 2)]
    for key, step, stream in others:
        equal = (philox.random_bits(key, step, stream, torch.arange(n)) == base).float().mean()
        assert equal < 0.01, (key, step, stream)
    assert len(base.unique()) > 0.9 * n


def test_equal_parameters_draw_bits_of_their_own() -> None:
    """In one group and in another, from values half way between two numbers: half of their elements agree, to
    eight standard deviations."""
    n = 10_000
    params = [nn.Parameter(torch.ones(n, device=DEVICE, dtype=BF16)) for _ in range(3)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = FusedDriftAdamW(groups, lr=2.0**-9, weight_decay=0.0, rounding="stochastic")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert int((params[one] == params[other]).sum()) == pytest.approx(n / 2, abs=8 * (n / 4) ** 0.5)


# Masters


def test_halves_join_to_what_was_split() -> None:
    bits = torch.randint(-(2**31), 2**31, (1_000_000,)).to(torch.int32)
    edges = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, 0])
    x = torch.cat([bits, edges.to(torch.int32), (edges | 0x80000000).to(torch.int32)]).view(F32)
    nearest, residual = rounding.split(x)
    joined = rounding.join(nearest, residual)
    assert torch.equal(joined.isnan(), x.isnan())
    assert torch.equal(nearest.isnan(), x.isnan()), "a NaN does not become a number such as -0"
    number = ~x.isnan()
    assert torch.equal(joined[number].view(torch.int32), x[number].view(torch.int32))
    usual = x.to(BF16)
    tie = x.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(nearest[number & ~tie].view(torch.int16), usual[number & ~tie].view(torch.int16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_master_goes_the_way_of_a_float32_parameter(backend: str, max_grad_norm: float | None) -> None:
    """Bitwise, with a prior, at a learning rate whose steps are too small for bfloat16."""
    params = make()
    wide = copies(params, F32)
    deltas = {name: torch.randn_like(p, dtype=F32).to(BF16) for name, p in params.items()}
    common = {"lr": 1e-5, "prior": deltas, "alpha": 0.3, "max_grad_norm": max_grad_norm, "backend": backend}
    ours = FusedDriftAdamW(params.items(), master_weights=True, **common)
    theirs = FusedDriftAdamW(wide.items(), **common)
    for _ in range(6):
        random_grads(params, wide)
        ours.step()
        theirs.step()
        for name, p in params.items():
            assert torch.equal(ours.master_weight(p), wide[name]), name
            assert (p.detach().float() - wide[name]).abs().le(wide[name].abs() * 2.0**-8).all()


def test_refreshed_masters_are_the_parameters_as_written() -> None:
    params = make()
    optimizer = FusedDriftAdamW(params.items(), lr=1e-2, master_weights=True)
    p = params["layers.0.weight"]
    assert torch.equal(optimizer.master_weight(p), p.float())
    random_grads(params)
    optimizer.step()
    assert not torch.equal(optimizer.master_weight(p), p.float())
    with torch.no_grad():
        p.mul_(0.5)
    optimizer.refresh_masters()
    assert torch.equal(optimizer.master_weight(p), p.float())
    with pytest.raises(KeyError, match="does not belong to this optimizer"):
        optimizer.master_weight(nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match="there are no master weights"):
        FusedDriftAdamW([nn.Parameter(torch.zeros(2))]).master_weight(p)


def test_small_steps_survive_unless_rounded_to_nearest() -> None:
    """Steps of a twentieth of an ulp, all in the same direction."""
    moved = {}
    for mode in ({}, {"rounding": "stochastic"}, {"master_weights": True}):
        param = nn.Parameter(torch.ones(10_000, device=DEVICE, dtype=BF16))
        optimizer = FusedDriftAdamW([param], lr=2.0**-8 / 20, weight_decay=0.0, **mode)
        for _ in range(40):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[str(mode)] = 1.0 - float(param.detach().float().mean())
    nearest, stochastic, master = moved.values()
    assert nearest == 0.0
    assert stochastic == pytest.approx(2.0**-7, rel=0.05)
    assert master == pytest.approx(2.0**-7, rel=0.01)


def test_small_tensors_have_float32_states_and_large_ones_codes() -> None:
    params = make()
    optimizer = FusedDriftAdamW(params.items(), state_dtype="int8")
    random_grads(params)
    optimizer.step()
    small, large = optimizer.state[params["norm.weight"]], optimizer.state[params["layers.1.weight"]]
    assert {key: value.dtype for key, value in small.items() if key != "step"} == {"exp_avg": F32, "exp_avg_sq": F32}
    assert (large["exp_avg_codes"].dtype, large["exp_avg_sq_codes"].dtype) == (torch.int8, torch.uint8)
    assert not large.keys() & {"exp_avg", "exp_avg_sq"}
    assert large["exp_avg_scale"].shape == large["exp_avg_sq_scale"].shape == (40,)
    for n, coded in ((4095, False), (4096, True)):
        assert ("exp_avg_codes" in optimizer.precision.new_state(torch.zeros(n))) == coded


# The optimizer


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("reference", "triton")])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_mode_leaves_the_reference_backends_bits(mode: dict[str, Any], backend: str) -> None:
    params = make()
    others = copies(params)
    prior = int8_prior(params)
    common = {"lr": 1e-2, "prior": prior, "prior_scaling": "absolute", "alpha": 0.5, "seed": 11, **mode}
    ours = FusedDriftAdamW(params.items(), backend=backend, **common)
    theirs = FusedDriftAdamW(others.items(), backend="reference", **common)
    for _ in range(4):
        random_grads(params, others)
        ours.step()
        theirs.step()
    for name, p in params.items():
        assert torch.equal(p, others[name]), name
        for key, value in ours.state[p].items():
            assert torch.equal(value, theirs.state[others[name]][key]), (name, key)


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(mode: dict[str, Any]) -> None:
    params = make()
    first = FusedDriftAdamW(params.items(), lr=1e-2, seed=123, **mode)
    for _ in range(2):
        random_grads(params)
        first.step()
    resumed = copies(params)
    second = FusedDriftAdamW(resumed.items(), lr=1e-2, seed=4, **mode)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert second.param_groups[0]["seed"] == 123
    for _ in range(2):
        random_grads(params, resumed)
        first.step()
        second.step()
    for name, p in params.items():
        assert torch.equal(p, resumed[name]), name


def test_states_go_from_one_precision_to_another_and_to_torch() -> None:
    params = make()
    coded = FusedDriftAdamW(params.items(), state_dtype="int8", master_weights=True)
    for _ in range(3):
        random_grads(params)
        coded.step()
    wide = copies(params, F32)
    saved = through_a_file(coded.state_dict(dtype=F32))
    for optimizer in (FusedDriftAdamW(wide.items()), torch.optim.AdamW(list(wide.values()))):
        optimizer.load_state_dict(copy.deepcopy(saved))
        for p, w in zip(params.values(), wide.values(), strict=True):
            mine, state = coded.state[p], optimizer.state[w]
            expected = (
                blocks.decode_state(mine["exp_avg_codes"], mine["exp_avg_scale"])
                if "exp_avg_codes" in mine
                else mine["exp_avg"]
            )
            assert torch.equal(state["exp_avg"], expected)
    again = FusedDriftAdamW(copies(params).items(), state_dtype="int8", master_weights=True)
    again.load_state_dict(saved)
    for p, q in zip(params.values(), again.param_groups[0]["params"], strict=True):
        for key, value in coded.state[p].items():
            assert torch.equal(value, again.state[q][key]), key


@pytest.mark.parametrize(
    ("options", "dtype", "error", "words"),
    [
        ({"rounding": "up"}, BF16, ValueError, "rounding must be one of nearest, stochastic, got 'up'"),
        (
            {"rounding": "stochastic"},
            F16,
            TypeError,
            "rounding='stochastic' supports bfloat16 and float32 parameters only",
        ),
        (
            {"master_weights": True},
            F16,
            TypeError,
            "master_weights=True .* parameter layers.0.weight has dtype .*float16",
        ),
        ({"state_dtype": "int8"}, F16, TypeError, "state_dtype=torch.int8 supports bfloat16 and float32 parameters"),
        ({"state_dtype": "int4"}, BF16, ValueError, "must be one of 'float32', .*'bf16', 'int8', .* got 'int4'"),
        ({"state_dtype": torch.float16}, BF16, ValueError, "or the torch.dtype of one, got torch.float16"),
        ({"state_dtype": None}, BF16, ValueError, "state_dtype must be one of .* got None"),
        ({"seed": -1}, BF16, ValueError, r"seed must be in \[0, 2\^32\), got seed=-1"),
        ({"seed": 1.5}, BF16, TypeError, "seed must be an integer"),
        ({"prior": {"norm.weight": torch.ones(7)}, "prior_device": "cuda"}, BF16, ValueError, "prior_device must be"),
    ],
)
def test_bad_options(options: dict[str, Any], dtype: torch.dtype, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        FusedDriftAdamW(make(dtype).items(), **options)


def test_states_that_lose_their_updates_are_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FusedDriftAdamW(make().items(), state_dtype=BF16, rounding="stochastic")
    with pytest.warns(UserWarning, match="bfloat16 states rounded to nearest lose small updates"):
        FusedDriftAdamW(make().items(), state_dtype=BF16)


def test_a_small_prior_acts_on_parameters_of_every_dtype() -> None:
    """As codes for bfloat16, expanded for the others; from host memory as from device memory."""
    for dtype in (BF16, F32, torch.float16):
        params = make(dtype)
        others = copies(params, dtype)
        prior = int8_prior(params)
        dense = {name: delta.expand() for name, delta in prior.items()}
        common = {"prior_scaling": "gradnorm", "alpha": 0.5}
        ours = FusedDriftAdamW(params.items(), prior=prior, prior_device="cpu", **common)
        theirs = FusedDriftAdamW(others.items(), prior=dense, **common)
        for _ in range(2):
            random_grads(params, others)
            ours.step()
            theirs.step()
        for name, p in params.items():
            torch.testing.assert_close(p, others[name], rtol=2.0**-8 if dtype != F32 else 1e-5, atol=1e-6)


@pytest.mark.parametrize(("prior_device", "expected"), [(None, "meta"), ("cpu", "cpu")])
def test_deltas_stay_in_host_memory_if_asked(prior_device: str | None, expected: str) -> None:
    binding = PriorBinding.of({"w": torch.ones(3)}, prior_device)
    assert binding._device_for(torch.empty(3, device="meta")).type == expected


def test_memory_is_reported_as_it_is_allocated() -> None:
    """The smallest mode: 2 bytes of param, 1 of each state, 1 of the prior, and their scales."""
    param = nn.Parameter(torch.randn(1 << 16, device=DEVICE).to(BF16))
    prior = {"w": quantize(torch.randn(1 << 16), torch.int8)}
    optimizer = FusedDriftAdamW([("w", param)], prior=prior, rounding="stochastic", state_dtype="int8")
    assert optimizer.memory_report() == {}
    param.grad = torch.randn_like(param)
    optimizer.step()
    report = optimizer.memory_report()
    assert report == {
        "param": 2.0, "states": 2.0, "scales": 3 * 4 / 128, "param_residual": 0.0, "prior": 1.0, "total": 5.09375,
    }  # fmt: skip
    assert report["total"] <= 5.2

"""Low-rank deltas in memory: compared with the product of their factors, in a prior, and bound to parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_global_settings import SETTINGS
from torch import Tensor, nn

from drift_kernels import FusedDriftAdamW, GradientBias, Prior, PriorError
from drift_kernels.engine.binding import PriorBinding
from drift_kernels.prior import LowRankDelta, quantize
from drift_kernels.prior.deltas import Delta, expanded, norm_of, tensors_of, with_rows
from drift_kernels.sharding import Shard

BF16, F32 = torch.bfloat16, torch.float32
UP, DOWN, NORM = "layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight", "norm.weight"

both_dtypes = pytest.mark.parametrize("dtype", [BF16, F32], ids=str)


def factors(rows: int, columns: int, rank: int, dtype: torch.dtype = BF16) -> LowRankDelta:
    return LowRankDelta(torch.randn(rows, rank).to(dtype), torch.randn(rank, columns).to(dtype))


def product(delta: LowRankDelta) -> Tensor:
    return delta.left.double() @ delta.right.double()


@both_dtypes
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (33, 70, 5), (7, 3, 9), (5, 0, 2), (0, 4, 1), (4, 6, 0), (700, 1200, 8)], ids=str
)
def test_expansion_and_norm_are_those_of_the_product(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Rounded once: within half an ulp of float32. In several tiles if it is large."""
    delta, exact = factors(*shape, dtype), None
    exact = product(delta)
    assert (delta.shape, delta.rank, delta.dtype, delta.device) == (exact.shape, shape[2], dtype, torch.device("cpu"))
    found = delta.expand()
    assert found.dtype == F32
    assert bool(((found.double() - exact).abs() <= 2**-24 * exact.abs() + 1e-300 + 1e-13).all())
    assert delta.norm() == pytest.approx(exact.norm().item(), rel=1e-12, abs=1e-300)
    assert delta.norm() == pytest.approx(found.double().norm().item(), rel=1e-6)


@both_dtypes
def test_the_norm_survives_factors_that_cancel(dtype: torch.dtype) -> None:
    """As with two adapters, one subtracted from the other."""
    one = factors(300, 200, 4, dtype)
    nearly = (one.right.float() * (1 + 2**-6)).to(dtype)
    delta = LowRankDelta(torch.cat([one.left, -one.left], 1), torch.cat([one.right, nearly]))
    assert delta.norm() == pytest.approx(product(delta).norm().item(), rel=1e-9)


@both_dtypes
@pytest.mark.parametrize(
    "box", [(0, 33, 0, 70), (3, 9, 11, 12), (30, 33, 0, 70), (5, 5, 2, 9), (0, 33, 69, 70)], ids=str
)
def test_a_part_is_that_part_of_the_product(box: tuple[int, ...], dtype: torch.dtype) -> None:
    delta, cut = factors(33, 70, 5, dtype), (slice(*box[:2]), slice(*box[2:]))
    part = delta.part(cut)
    assert (part.rank, part.shape) == (5, delta.expand()[cut].shape)
    assert torch.equal(part.expand(), delta.expand()[cut])


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_changes_it(setting: str) -> None:
    delta = factors(33, 70, 5)
    expected, size = delta.expand(), delta.norm()
    with SETTINGS[setting]():
        assert torch.equal(delta.expand(), expected)
        assert delta.norm() == size
        assert delta.part((slice(3, 9), slice(1, 70))).expand().dtype == F32


def test_moving_copies_only_where_asked() -> None:
    delta = factors(5, 7, 2)
    same, other = delta.to("cpu"), delta.to("cpu", copy=True)
    assert same.left.data_ptr() == delta.left.data_ptr()
    assert {other.left.data_ptr(), other.right.data_ptr()}.isdisjoint({delta.left.data_ptr(), delta.right.data_ptr()})
    assert torch.equal(other.expand(), delta.expand())
    assert delta.to("meta").device.type == "meta"


@pytest.mark.parametrize(
    ("left", "right", "words"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 4), r"must be \[m, r\] and \[r, n\], got \[3, 2\] and \[3, 4\]"),
        (torch.zeros(3), torch.zeros(3, 4), r"got \[3\] and \[3, 4\]"),
        (torch.zeros(3, 2), torch.zeros(2, 4).bfloat16(), r"got torch.float32 on cpu and torch.bfloat16 on cpu"),
        (torch.zeros(3, 2).half(), torch.zeros(2, 4).half(), "both bfloat16 or both float32"),
        (torch.zeros(3, 2), torch.zeros(2, 4, device="meta"), "on meta"),
        (torch.zeros(2, 3).t(), torch.zeros(2, 4), "contiguous"),
    ],
)
def test_factors_that_do_not_fit(left: Tensor, right: Tensor, words: str) -> None:
    with pytest.raises(PriorError, match=words):
        LowRankDelta(left, right)


# Operations on every kind of delta

KINDS: dict[str, Callable[[], Delta]] = {
    "float32": lambda: torch.randn(3, 256),
    "bfloat16": lambda: torch.randn(3, 256).to(BF16),
    "int8": lambda: quantize(torch.randn(3, 256), torch.int8),
    "low rank": lambda: factors(3, 256, 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_below(kind: str) -> None:
    delta = KINDS[kind]()
    longer = with_rows(delta, 5)
    assert type(longer) is type(delta)
    assert torch.equal(expanded(longer)[:3], expanded(delta))
    assert not expanded(longer)[3:].any()
    assert norm_of(longer) == pytest.approx(norm_of(delta), rel=3e-6)  # of short tensors: prior/norms.py


# In a prior


@both_dtypes
def test_in_a_mapping(dtype: torch.dtype) -> None:
    delta = factors(33, 70, 5, dtype)
    prior = Prior.from_mapping({f"model.{UP}": delta, NORM: torch.randn(7)})
    info = prior.info(UP)
    assert (info.dtype, info.shape, info.rank, info.kept_energy) == (dtype, (33, 70), 5, None)
    assert prior.numel == 33 * 70 + 7
    assert info.delta_norm == pytest.approx(product(delta).norm().item(), rel=1e-6)
    assert torch.equal(prior.load(UP), delta.expand())
    stored = prior.load_stored(UP, "cpu", copy=False)
    assert isinstance(stored, LowRankDelta)
    assert stored.left.data_ptr() == delta.left.data_ptr()
    assert prior.load_stored(UP).left.data_ptr() != delta.left.data_ptr()
    part = prior.load_stored(UP, box=(slice(2, 30), slice(7, 9)))
    assert isinstance(part, LowRankDelta)
    assert torch.equal(part.expand(), delta.expand()[2:30, 7:9])


def test_fingerprints_follow_the_factors() -> None:
    delta = factors(33, 70, 5)
    changed = [copy.deepcopy(delta) for _ in range(2)]
    for other, side in zip(changed, ("left", "right"), strict=True):
        getattr(other, side)[-1, -1] += 1
    deltas = [delta, *changed, delta.expand()]
    assert len({Prior.from_mapping({UP: d}).fingerprint for d in deltas}) == 4
    again = LowRankDelta(*(t.clone() for t in tensors_of(delta)))
    assert Prior.from_mapping({UP: again}).fingerprint == Prior.from_mapping({UP: delta}).fingerprint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_nan_and_inf_are_refused(side: str, value: float) -> None:
    delta = factors(33, 70, 5)
    getattr(delta, side)[3, 2] = value
    with pytest.raises(PriorError, match=f"the delta of {UP} contains NaN or Inf"):
        Prior.from_mapping({UP: delta})


def test_factors_that_require_grad_are_taken_as_they_are() -> None:
    delta = LowRankDelta(nn.Parameter(torch.randn(33, 5)), nn.Parameter(torch.randn(5, 70)))
    assert not Prior.from_mapping({UP: delta}).load(UP).requires_grad


# Bound to full parameters


def mapping() -> dict[str, LowRankDelta | Tensor]:
    return {UP: factors(33, 70, 5), DOWN: factors(70, 33, 3, F32), NORM: torch.randn(7)}


@pytest.mark.parametrize("scaling", ["absolute", "adaptive_cosine"])
@both_dtypes
def test_steps_are_those_with_the_expanded_deltas(dtype: torch.dtype, scaling: str) -> None:
    """Bitwise: in bfloat16 for bfloat16 parameters, in float32 for others."""
    low_rank = mapping()
    full = {name: d.expand().to(dtype) if isinstance(d, LowRankDelta) else d for name, d in low_rank.items()}
    weights = {name: torch.randn(d.shape).to(dtype) for name, d in low_rank.items()}
    results, moments = [], []
    for prior in (low_rank, full):
        params = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
        optimizer = FusedDriftAdamW(params.items(), lr=1e-2, prior=prior, alpha=0.5, prior_scaling=scaling)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for param in params.values():
                param.grad = torch.randn(param.shape, generator=generator).to(dtype)
            optimizer.step()
        results.append([param.detach() for param in params.values()])
        moments.append([optimizer.state[param]["exp_avg"] for param in params.values()])
    if scaling == "absolute":  # does not use norms, which are those of the unrounded factors
        assert all(map(torch.equal, *results))
    # Rounding a delta to bfloat16 changes its norm by at most 2^-9, and so a bias. The mean of the biased gradients is
    # linear in the bias; the step is not: where a bias cancels a gradient, its sign may change.
    for one, other in zip(*moments, strict=True):
        assert (one - other).abs().max() <= (1e-5 if dtype == F32 else 2**-8) * other.abs().max()


@both_dtypes
def test_gradients_are_biased_by_the_expanded_delta(dtype: torch.dtype) -> None:
    delta = factors(33, 70, 5)
    param = nn.Parameter(torch.zeros(33, 70, dtype=dtype))
    bias = GradientBias([(UP, param)], {UP: delta}, alpha=1.0, prior_scaling="absolute")
    param.grad = torch.zeros_like(param)
    bias.apply_()
    assert torch.equal(param.grad, -delta.expand().to(dtype))


@both_dtypes
@pytest.mark.parametrize(
    "box", [(0, 18, 0, 70), (0, 9, 0, 70), (3, 18, 0, 70), (7, 18, 0, 70), (10, 12, 4, 8), (2, 9, 5, 70)], ids=str
)
def test_a_shard_is_made_of_its_part_of_the_factors(box: tuple[int, ...], dtype: torch.dtype) -> None:
    """For an embedding with more tokens than the delta's 7 rows. The norm is that of the factors, although the rounded
    delta, with so few elements, has another norm."""
    delta, cut = factors(7, 70, 5), (slice(*box[:2]), slice(*box[2:]))
    whole = torch.zeros(18, 70)
    whole[:7] = delta.expand()
    name = "embed_tokens.weight"
    binding = PriorBinding.of({name: delta}, None)
    binding.check([(name, nn.Parameter(torch.zeros(18, 70)))])
    held = nn.Parameter(torch.zeros(whole[cut].shape, dtype=dtype))
    (bound,) = binding.bind([(name, held, Shard((18, 70), cut, ()))])
    assert bound is not None
    assert bound.delta.dtype == (dtype if box[0] < 7 else BF16)
    assert torch.equal(bound.delta, whole[cut].to(bound.delta.dtype))
    assert bound.delta_norm == delta.norm()


@both_dtypes
def test_single_experts_are_joined_expanded(dtype: torch.dtype) -> None:
    parts = {f"layers.0.mlp.experts.{e}.{p}_proj.weight": factors(48, 32, 4) for e in range(4) for p in ("gate", "up")}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    param = nn.Parameter(torch.zeros(4, 96, 32, dtype=dtype))
    binding = PriorBinding.of(parts, None)
    binding.check([(name, param)])
    (bound,) = binding.bind([(name, param, None)])
    single = [
        torch.cat([parts[f"layers.0.mlp.experts.{e}.{p}_proj.weight"].expand() for p in ("gate", "up")])
        for e in range(4)
    ]
    assert bound is not None
    assert bound.delta.dtype == dtype
    assert torch.equal(bound.delta, torch.stack(single).to(dtype))
    info = binding.prior.info(binding.prior.coverage([(name, param)]).sources[name])
    assert (info.shape, info.dtype, info.rank) == ((4, 96, 32), BF16, None)
    assert bound.delta_norm == pytest.approx(torch.stack(single).double().norm().item(), rel=1e-6)


def test_weights_in_factors_are_noticed() -> None:
    weight = factors(33, 70, 5)
    param = nn.Parameter(weight.expand())
    optimizer = FusedDriftAdamW([(UP, param)], prior={UP: weight}, alpha=0.1)
    param.grad = torch.ones_like(param)
    with pytest.raises(PriorError, match="look like weights"):
        optimizer.step()

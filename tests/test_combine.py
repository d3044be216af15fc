"""Combining priors: compared with the papers' formulas in float64, for every stored dtype."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from checkpoints import flip_bit, tuned, write_checkpoint
from merges import EVERYTHING, Family, elected, linear, trimmed
from torch import Tensor

from drift_kernels import FusedDriftAdamW, Prior, PriorError, PriorFormatError, build_prior, combine_priors
from drift_kernels.prior import quantize, runs

UP = "layers.1.mlp.up_proj.weight"
HALF_ULP = torch.finfo(torch.float32).eps / 2


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family.write(tmp_path)


def check(combined: Prior, expected: dict[str, Tensor], inputs: list[Prior], weights: list[float], gain: float) -> None:
    """`gain`: how much larger an element may be than the sum of the weighted ones. For each prior, a weight, a product,
    a sum, a weight in the divisor and the quotient are rounded: at most 2 + 3 n half units of the sum of magnitudes."""
    for name in combined.names:
        size = sum(abs(w) * p.load(name).double().abs() for w, p in zip(weights, inputs, strict=True)) * gain
        error = (combined.load(name).double() - expected[name]).abs()
        assert (error <= (2 + 3 * len(inputs)) * HALF_ULP * size).all(), name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("normalize", [None, True])
def test_linear(family: Family, stored: torch.dtype, normalize: bool | None) -> None:
    priors, weights = [family.prior("a"), family.prior("b", stored), family.prior("c", stored)], [0.7, 0.3, -0.5]
    combined = combine_priors(
        priors, family.folder / "out", weights=weights, normalize=normalize, dtype=torch.float32, max_shard_bytes=9999
    )
    assert set(combined.names) == set(priors[0].names)
    expected = {n: linear([p.load(n) for p in priors], weights, bool(normalize)) for n in combined.names}
    check(combined, expected, priors, weights, 1 / sum(weights) if normalize else 1)
    assert combined.verify().intact
    assert combined.verify().by_checksum == len(combined)


@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize("density", [0.2, [0.5, 1.0, 0.01]])
def test_ties(family: Family, density: float | list[float], normalize: bool | None) -> None:
    priors, weights = [family.prior(name) for name in "abc"], [0.7, 0.3, 1.5]
    combined = combine_priors(
        priors,
        family.folder / "out",
        weights=weights,
        method="ties",
        density=density,
        normalize=normalize,
        dtype=torch.float32,
    )
    densities = density if isinstance(density, list) else [density] * 3
    expected = {}
    for name in combined.names:
        kept = [trimmed(p.load(name), d) for p, d in zip(priors, densities, strict=True)]
        expected[name] = elected(kept, weights, normalize is not False, combined.load(name))
        assert (combined.load(name) == 0).equal(expected[name] == 0)
    check(combined, expected, priors, weights, 1 / min(weights))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8])
def test_ties_keeps_all_that_equal_the_smallest_kept(family: Family, stored: torch.dtype) -> None:
    """Deltas of few bits have many equal magnitudes."""
    prior = family.prior("a", stored)
    combined = combine_priors(
        [prior], family.folder / "out", weights=[1], method="ties", density=0.3, dtype=torch.float32
    )
    for name in prior.names:
        assert torch.equal(combined.load(name), trimmed(prior.load(name).float(), 0.3))


def test_a_sum_of_zero_elects_the_positive_sign(tmp_path: Path) -> None:
    priors = [{UP: torch.tensor([2.0, -1.0, 0.0])}, {UP: torch.tensor([-2.0, 1.0, 0.0])}]
    combined = combine_priors(
        priors, tmp_path / "out", weights=[1, 1], method="ties", density=1, normalize=False, dtype=torch.float32
    )
    assert combined.load(UP).tolist() == [2, 1, 0]


def dropped(family: Family, name: str, which: int, seed: int, density: float = 0.3) -> Tensor:
    """The part of a delta that dare keeps of the prior at a position, found by setting the other weights to zero."""
    combined = combine_priors(
        [family.folder / f"prior-{expert}" for expert in "ab"],
        family.folder / "alone",
        weights=[which == 0, which == 1],
        method="dare",
        density=density,
        seed=seed,
        dtype=torch.float32,
        overwrite=True,
    )
    return combined.load(name) != 0


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_dare(family: Family, method: str) -> None:
    """Given the elements that it keeps, the rest is arithmetic."""
    priors, weights, density = [family.prior(name) for name in "ab"], [0.7, 0.3], 0.3
    options = {"weights": weights, "method": method, "density": density, "seed": 5, "dtype": torch.float32}
    combined = combine_priors(priors, family.folder / "out", **options)
    expected = {}
    for name in (UP, "embed_tokens.weight"):
        kept = [p.load(name).double() * dropped(family, name, i, 5) / density for i, p in enumerate(priors)]
        found = combined.load(name)
        expected[name] = linear(kept, weights) if method == "dare" else elected(kept, weights, False, found)
    for name in expected:
        size = sum(w * p.load(name).double().abs() for w, p in zip(weights, priors, strict=True)) / density
        assert ((combined.load(name).double() - expected[name]).abs() <= 6 * HALF_ULP * size).all()


def test_dare_drops_at_random_and_by_the_seed_alone(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares and correlations within 5 standard deviations."""
    for expert in "ab":
        family.prior(expert)
    name, other = "layers.0.mlp.up_proj.weight", UP
    masks = [dropped(family, name, 0, 1), dropped(family, name, 1, 1), dropped(family, other, 0, 1)]
    masks.append(dropped(family, name, 0, 2))
    n = masks[0].numel()
    for mask in masks:
        assert abs(mask.double().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / n)
    for i, one in enumerate(masks):
        for two in masks[:i]:
            assert abs((one & two).double().mean() - 0.09) < 5 * math.sqrt(0.09 * 0.91 / n)
    assert torch.equal(masks[0], dropped(family, name, 0, 1))
    tall = "layers.1.mlp.down_proj.weight"
    whole = dropped(family, tall, 0, 1)
    monkeypatch.setattr(runs, "CHUNK", 1)  # the smallest possible pieces
    assert torch.equal(whole, dropped(family, tall, 0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_the_pieces_do_not_matter(
    family: Family, monkeypatch: pytest.MonkeyPatch, method: str, dtype: torch.dtype
) -> None:
    priors = [family.prior("a"), family.prior("b", torch.int8)]
    found = []
    for chunk in (1 << 19, 1):
        monkeypatch.setattr(runs, "CHUNK", chunk)
        density = None if method == "linear" else 0.4
        out = family.folder / f"out-{chunk}"
        found.append(combine_priors(priors, out, weights=[1, 0.5], method=method, density=density, dtype=dtype))
    one, other = found
    assert one.fingerprint == other.fingerprint
    for name in one.names:
        assert torch.equal(one.load(name), other.load(name))
        assert one.info(name).delta_norm == pytest.approx(other.info(name).delta_norm, rel=1e-6)


def test_one_prior_alone_and_the_same_twice(family: Family, caplog: pytest.LogCaptureFixture) -> None:
    prior = family.prior("a")
    caplog.clear()
    alone = combine_priors([prior], family.folder / "alone", weights=[1], dtype=torch.float32)
    assert all(torch.equal(alone.load(name), prior.load(name)) for name in prior.names)
    assert caplog.messages == []
    twice = combine_priors([prior, prior], family.folder / "twice", weights=[0.5, 0.5], dtype=torch.float32)
    assert all(torch.equal(twice.load(name), prior.load(name)) for name in prior.names)
    assert caplog.messages == ["prior 1 and prior 2 are the same"]
    with pytest.raises(PriorError, match="cancel out: all deltas of their combination are zero"):
        combine_priors([prior, prior], family.folder / "none", weights=[1, -1])
    assert not list(family.folder.glob("none*"))


def test_a_delta_that_one_prior_lacks_is_zero_there(family: Family) -> None:
    priors = [family.prior("a", modules=("attn",)), family.prior("b", modules=("attn", "mlp"))]
    combined = combine_priors(priors, family.folder / "out", weights=[0.5, 0.25], dtype=torch.float32)
    assert combined.names == priors[1].names
    assert torch.equal(combined.load(UP), 0.25 * priors[1].load(UP))
    *_, warning = combined.record["warnings"]
    assert warning.startswith("9 of 24 deltas are not in prior 1, and count as zero: layers.0.mlp.down_proj.weight")
    assert combined.info(UP).param_norm == priors[1].info(UP).param_norm
    assert combined.record["modules"] == ["attn", "mlp"]


def test_priors_of_different_bases_are_told_apart(family: Family) -> None:
    prior, other_base = family.prior("a"), tuned(family.weights["base"])
    write_checkpoint(family.folder / "other", other_base)
    other = build_prior(family.folder / "b", family.folder / "other", family.folder / "p", modules=EVERYTHING)
    combined = combine_priors([prior, other], family.folder / "out", weights=[1, 1])
    *_, warning = combined.record["warnings"]
    # A norm may be equal by chance.
    pairs = [(prior.info(name).param_norm, other.info(name).param_norm) for name in prior.names]
    differing = sum(not math.isclose(one, another, rel_tol=1e-6) for one, another in pairs)
    expected = f"the priors are of different bases: of 29 weights of the base that they share, {differing} have"
    assert differing > 20
    assert warning.startswith(expected)
    assert combined.info(UP).param_norm is None
    assert "base" not in combined.record["sources"]


def test_norms_that_are_not_known_are_those_of_the_parameters(family: Family) -> None:
    """normalize_to_param with a prior combined over two bases."""
    weights = family.weights["base"]
    prior = Prior.from_mapping({UP: torch.randn(63, 31)})
    combined = combine_priors([prior, family.prior("a")], family.folder / "out", weights=[1, 1], dtype=torch.float32)
    assert combined.info(UP).param_norm is None
    assert combined.info("embed_tokens.weight").param_norm is not None
    param = torch.nn.Parameter(weights[f"model.{UP}"].clone())
    param.grad = torch.zeros_like(param)
    optimizer = FusedDriftAdamW(
        [(UP, param)],
        lr=1.0,
        weight_decay=0,
        betas=(0.0, 0.0),
        prior=combined,
        prior_scaling="absolute",
        normalize_to_param=True,
    )
    optimizer.step()
    delta = combined.load(UP)
    expected = -delta * (weights[f"model.{UP}"].norm() / delta.norm())
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], expected, rtol=1e-5, atol=0)


def test_priors_that_do_not_fit(family: Family) -> None:
    prior, out = family.prior("a"), family.folder / "out"
    other = Prior.from_mapping({UP: torch.ones(3, 5)})
    with pytest.raises(PriorError, match=rf"{UP} has shape \[63, 31\] in prior 1, \[3, 5\] in prior 2"):
        combine_priors([prior, other], out, weights=[1, 1])
    single = {
        f"layers.0.mlp.experts.{e}.{leaf}.weight": torch.ones(4, 6) for e in (0, 1) for leaf in ("gate_proj", "up_proj")
    }
    fused = {"layers.0.mlp.experts.gate_up_proj": torch.ones(2, 8, 6)}
    for pair in ([single, fused], [fused, single]):
        with pytest.raises(PriorError, match="the same weights"):
            combine_priors(pair, out, weights=[1, 1])
    with pytest.raises(PriorError, match=r"layers\.0\.x\.weight overflows"):
        combine_priors([{"layers.0.x.weight": torch.full((3,), 3e38)}] * 2, out, weights=[1, 1])
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1]}, "expected a weight for each of the 2 priors, got 1"),
        ({"weights": [0, 0]}, "all weights are zero"),
        ({"weights": [1, math.nan]}, "weights must be finite, got 1 nan"),
        ({"weights": [1, -1], "normalize": True}, "the weights, but 1 -1 add up to zero"),
        ({"weights": [1, 1], "method": "slerp"}, "method must be one of linear, ties, dare, dare_ties, got 'slerp'"),
        ({"weights": [1, 1], "method": "dare"}, "dare needs a density"),
        ({"weights": [1, 1], "density": 0.5}, "linear keeps every element"),
        ({"weights": [1, 1], "method": "ties", "density": 0.0}, "above 0 and at most 1, got 0"),
        ({"weights": [1, 1], "method": "ties", "density": math.nan}, "above 0 and at most 1, got nan"),
        ({"weights": [1, 1], "method": "ties", "density": [0.1] * 3}, "one for each of the 2 priors, got 3"),
        ({"weights": [1, 1], "method": "dare", "density": 0.5, "seed": -1}, "seed must be"),
        ({"weights": [1, 1], "dtype": torch.float16}, "dtype must be one of"),
    ],
)
def test_numbers_out_of_range(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine_priors([{"layers.0.x.weight": torch.ones(3)}] * 2, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_prior_with_a_flipped_bit_is_named(family: Family, dtype: torch.dtype) -> None:
    family.prior("a", dtype)
    flip_bit(family.folder / "prior-a", "norm.weight")
    with pytest.raises(PriorFormatError, match=r"prior-a.*norm\.weight is damaged: its checksum"):
        combine_priors([family.folder / "prior-a"], family.folder / "out", weights=[1])
    assert not list(family.folder.glob("out*"))


def test_in_place(family: Family) -> None:
    """The output replaces one of the priors."""
    a, b = (family.prior(name).load(UP) for name in "ab")
    place = family.folder / "prior-a"
    with pytest.raises(PriorError, match="already exists"):
        combine_priors([place, family.folder / "prior-b"], place, weights=[1, 1])
    combine_priors([place, family.folder / "prior-b"], place, weights=[1, 1], overwrite=True, dtype=torch.float32)
    assert torch.equal(Prior.open(place).load(UP), a + b)


def test_quantised_scalars_and_empty_ones(tmp_path: Path) -> None:
    first = {"layers.0.a": torch.tensor(2.0), "layers.0.b": torch.ones(0, 4), "layers.0.c": torch.ones(3, 130)}
    second = {**first, "layers.0.c": quantize(torch.ones(3, 130), torch.int8)}
    for method, density in (("linear", None), ("ties", 0.5)):
        out = tmp_path / method
        combined = combine_priors([first, second], out, weights=[1, 1], method=method, density=density, normalize=False)
        assert combined.load("layers.0.a") == 4
        assert combined.load("layers.0.b").shape == (0, 4)
        assert torch.equal(combined.load("layers.0.c").float(), torch.full((3, 130), 2.0))

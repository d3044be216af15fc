"""8-bit deltas, compared with their formulas element by element, and in a prior in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drift_kernels import Prior, PriorError
from drift_kernels.prior import BLOCK, QuantizedDelta, quantize
from drift_kernels.prior.norms import CHUNK

DTYPES = [torch.int8, torch.float8_e4m3fn]
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}
TINY = torch.finfo(torch.float32).tiny
UP, NORM = "layers.0.mlp.up_proj.weight", "norm.weight"

both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def nearest_code(quotient: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The nearest code, ties to even, found by distance in float64; the bytes of the code."""
    if dtype == torch.int8:
        return np.rint(quotient).astype(np.int8).view(np.uint8)
    values = torch.arange(127, dtype=torch.uint8).view(dtype).double().numpy()  # byte 127 is NaN
    size = np.abs(quotient.astype(np.float64))
    above = np.searchsorted(values, size).clip(1, 126)
    low, high = size - values[above - 1], values[above] - size
    code = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
    return (code | np.where(np.signbit(quotient) & (quotient != 0), 128, 0)).astype(np.uint8)


def quantize_by_block(delta: Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The formulas of docs/method.md, block by block: bytes of the codes, and scales."""
    flat, codes, scales = delta.float().flatten().numpy(), [], []
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        scale = np.abs(block).max() / np.float32(LARGEST[dtype])
        scale = scale if scale >= TINY else np.float32(0)
        codes.append(nearest_code(block / scale if scale else np.zeros_like(block), dtype))
        scales.append(scale)
    return np.concatenate([np.zeros(0, np.uint8), *codes]), np.array(scales, np.float32)


@both_dtypes
@pytest.mark.parametrize(
    "shape", [(), (0,), (0, 4), (1,), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (3, 5, 7), (33, BLOCK), (257, 31)], ids=str
)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e30, 3e-37])
def test_codes_scales_and_expansion_are_the_formulas(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> None:
    """Bitwise. At 3e-37 some scales are subnormal and become 0."""
    delta = torch.randn(shape) * scale * 10 ** torch.empty(shape).uniform_(-2, 0)
    quantized = quantize(delta, dtype)
    codes, scales = quantize_by_block(delta, dtype)
    assert (quantized.dtype, quantized.shape, quantized.device) == (dtype, delta.shape, delta.device)
    assert quantized.codes.is_contiguous()
    assert np.array_equal(quantized.codes.view(torch.uint8).flatten().numpy(), codes)
    assert np.array_equal(quantized.scales.numpy(), scales)
    expected = quantized.codes.float().flatten().numpy() * scales.repeat(BLOCK)[: delta.numel()]
    expanded = quantized.expand()
    assert expanded.dtype == torch.float32
    assert expanded.shape == delta.shape
    assert np.array_equal(expanded.flatten().numpy(), expected)
    assert quantized.norm() == pytest.approx(float(np.linalg.norm(expected.astype(np.float64))), rel=1e-6)


@both_dtypes
def test_ties_go_to_the_even_code(dtype: torch.dtype) -> None:
    ties = (
        torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5]) if dtype == torch.int8 else torch.tensor([17.0, 19.0, -17.0])
    )
    even = torch.tensor([0.0, 2, 2, 0, -2, 126]) if dtype == torch.int8 else torch.tensor([16.0, 20.0, -16.0])
    delta = torch.cat([torch.tensor([float(LARGEST[dtype])]), ties])
    quantized = quantize(delta, dtype)
    assert quantized.scales.tolist() == [1.0]
    assert torch.equal(quantized.codes.float()[1:], even)


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=300)
@given(values=st.lists(numbers, max_size=300), dtype=st.sampled_from(DTYPES))
def test_no_element_is_off_by_more_than_its_code_allows(values: list[float], dtype: torch.dtype) -> None:
    """int8: half a scale. fp8: half an ulp, or half the smallest code. Up to float32 rounding, for any values."""
    delta = torch.tensor(values, dtype=torch.float32)
    quantized = quantize(delta, dtype)
    scales = quantized.scales.double().repeat_interleave(BLOCK)[: len(values)]
    assert torch.equal(quantized.codes.double().abs() <= LARGEST[dtype], torch.ones(len(values), dtype=torch.bool))
    error = (quantized.codes.double() * scales - delta.double()).abs()
    bound = scales / 2 if dtype == torch.int8 else torch.maximum(delta.double().abs() / 16, scales / 1024)
    lost = delta.double().abs() * (scales == 0)
    assert bool((error <= bound * (1 + 1e-5) + lost).all())
    assert bool((lost < TINY * LARGEST[dtype]).all())
    assert bool(((scales == 0) | (scales >= TINY)).all())


@both_dtypes
@pytest.mark.parametrize("zero", [0.0, -0.0, 1e-45, -1e-38, TINY])
def test_blocks_too_small_for_a_scale_are_zero(zero: float, dtype: torch.dtype) -> None:
    delta = torch.cat([torch.full((BLOCK,), zero), torch.ones(3)])
    quantized = quantize(delta, dtype)
    assert not quantized.codes.view(torch.uint8)[:BLOCK].any()
    assert quantized.scales[0] == 0
    assert quantized.expand().tolist() == [0.0] * BLOCK + [1.0] * 3


@both_dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_show_in_the_scale_of_their_block_alone(value: float, dtype: torch.dtype) -> None:
    delta = torch.randn(2 * BLOCK + 5)
    delta[BLOCK + 3] = value
    quantized = quantize(delta, dtype)
    assert quantized.scales.isfinite().tolist() == [True, False, True]
    assert quantized.expand()[:BLOCK].isfinite().all()
    assert not torch.tensor(quantized.norm()).isfinite()
    with pytest.raises(PriorError, match="scales must be finite and not negative"):
        quantized.check_scales()
    with pytest.raises(PriorError, match=f"the delta of {UP}: scales must be finite"):
        Prior.from_mapping({UP: quantized})


def test_norm_over_many_pieces() -> None:
    quantized = quantize(torch.randn(3, CHUNK // 2 + 77), torch.int8)
    assert quantized.norm() == pytest.approx(quantized.expand().double().norm().item(), rel=1e-6)


def test_moving_copies_only_where_asked() -> None:
    quantized = quantize(torch.randn(3, 77), torch.int8)
    same, other = quantized.to("cpu"), quantized.to("cpu", copy=True)
    assert same.codes.data_ptr() == quantized.codes.data_ptr()
    assert other.codes.data_ptr() != quantized.codes.data_ptr()
    assert other.scales.data_ptr() != quantized.scales.data_ptr()
    assert torch.equal(other.expand(), quantized.expand())
    assert quantized.to("meta").device.type == "meta"


@pytest.mark.parametrize(
    ("codes", "scales", "words"),
    [
        (torch.zeros(3, 50), torch.zeros(2), r"codes must be int8 or float8_e4m3fn .* got torch.float32 \[3, 50\]"),
        (torch.zeros(3, 50, dtype=torch.int8).t(), torch.zeros(2), "got non-contiguous torch.int8"),
        (torch.zeros(3, 50, dtype=torch.int8), torch.zeros(3), r"expected .* \[2\] on cpu, got torch.float32 \[3\]"),
        (torch.zeros(3, 50, dtype=torch.int8), torch.zeros(2).double(), r"got torch.float64 \[2\]"),
        (torch.zeros(3, 50, dtype=torch.int8), torch.zeros(4)[::2], r"got non-contiguous torch.float32 \[2\]"),
        (torch.zeros(3, 50, dtype=torch.int8), torch.zeros(2, device="meta"), r"on meta"),
    ],
)
def test_codes_and_scales_that_do_not_fit(codes: Tensor, scales: Tensor, words: str) -> None:
    with pytest.raises(PriorError, match=words):
        QuantizedDelta(codes, scales)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype must be torch.int8 or torch.float8_e4m3fn, got torch.uint8"):
        quantize(torch.ones(3), torch.uint8)


@both_dtypes
def test_in_a_mapping(dtype: torch.dtype) -> None:
    quantized, numel = quantize(torch.randn(1 << 10, (1 << 10) + 3), dtype), 2**20 + 3 * 2**10
    prior = Prior.from_mapping({f"model.{UP}": quantized, NORM: torch.randn(7)})
    info = prior.info(UP)
    assert (info.dtype, info.shape, info.stored_cosine) == (dtype, (1024, 1027), None)
    assert prior.numel == numel + 7
    assert info.delta_norm == pytest.approx(quantized.expand().double().norm().item(), rel=1e-6)
    assert torch.equal(prior.load(UP), quantized.expand())
    stored = prior.load_stored(UP, "cpu", copy=False)
    assert isinstance(stored, QuantizedDelta)
    assert stored.codes.data_ptr() == quantized.codes.data_ptr()
    assert prior.load_stored(UP).codes.data_ptr() != quantized.codes.data_ptr()
    assert isinstance(prior.load_stored(NORM), Tensor)

    again = QuantizedDelta(quantized.codes.clone(), quantized.scales.clone())
    assert Prior.from_mapping({UP: again}).fingerprint == Prior.from_mapping({UP: quantized}).fingerprint
    codes = quantized.codes.view(torch.uint8).flatten().clone()
    codes[-1] ^= 0x80  # the sign: the lowest bit would turn fp8's largest code, 448, into a NaN
    changed = [
        QuantizedDelta(codes.view(dtype).view(quantized.shape), quantized.scales),
        QuantizedDelta(quantized.codes, quantized.scales * 2),
    ]
    assert len({Prior.from_mapping({UP: delta}).fingerprint for delta in [quantized, *changed]}) == 3


def test_the_fingerprint_tells_dtypes_apart_whose_bytes_are_the_same() -> None:
    codes, scales = torch.randint(100, (300,), dtype=torch.uint8), torch.rand(3)
    deltas = [QuantizedDelta(codes.view(dtype), scales) for dtype in DTYPES]
    assert len({Prior.from_mapping({UP: delta}).fingerprint for delta in deltas}) == len(DTYPES)


@both_dtypes
def test_the_last_rows_stay_in_codes_though_their_last_block_is_short(dtype: torch.dtype) -> None:
    whole, box = quantize(torch.randn(40, 100), dtype), (slice(32, 40), slice(0, 100))
    part = whole.part(box)
    assert isinstance(part, QuantizedDelta)
    assert torch.equal(part.expand(), whole.expand()[box])

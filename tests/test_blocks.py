"""One-byte codes: their accuracy, and their guarantees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_kernels.formats import blocks
from drift_kernels.formats.blocks import BLOCK

SMALLEST = 2.0**-149  # the smallest subnormal number of float32
SMALLEST_ROOT = 2.0**-74.5


@given(numel=st.integers(0, 700), exponent=st.floats(-45, 15), seed=st.integers(0, 2**32))
def test_codes_are_the_nearest_and_a_variance_stays_above_zero(numel: int, exponent: float, seed: int) -> None:
    """Down to moments so small that a scale of them would be subnormal, and to those that are subnormal themselves."""
    scale, generator = 10**exponent, torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) ** 3 * scale
    x = torch.where(torch.rand(numel, generator=generator) < 0.1, 0.0, x)
    for values, dtype, largest in ((x, blocks.MOMENT, 127), (x.square(), blocks.VARIANCE, 255)):
        coded, scales = blocks.encode_state(values, dtype)
        decoded = blocks.decode_state(coded, scales)
        assert scales.shape == (blocks.blocks_of(numel),)
        root, of_each = values.abs().sqrt().double(), blocks.spread(scales, values).double()
        of_each = of_each.sqrt() if dtype == blocks.MOMENT else of_each
        raised = (dtype == blocks.VARIANCE) & (coded == 1) & (values > 0)
        off = (decoded.abs().double().sqrt() - root).abs()
        assert (raised | (off <= 0.5001 * of_each + 1e-7 * root + SMALLEST_ROOT)).all()
        # The smallest number, at 1.41 to 1.5 steps, gets code 1, whose square may round to zero.
        vanished = (dtype == blocks.VARIANCE) & (coded == 1) & (values == SMALLEST) & (decoded == 0)
        assert (vanished | (decoded.sign() == values.sign()))[coded != 0].all()
        assert (coded.int().abs() <= largest).all()
        if dtype == blocks.VARIANCE:
            assert torch.equal(coded == 0, values == 0)


@pytest.mark.parametrize("dtype", [blocks.MOMENT, blocks.VARIANCE], ids=str)
@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000], ids=["positive", "negative"])
def test_a_nan_takes_its_block_with_it_and_no_other(dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(2 * BLOCK + 44).abs()
    x.view(torch.int32)[BLOCK + 2] = bits
    coded, scales = blocks.encode_state(x, dtype)
    decoded = blocks.decode_state(coded, scales)
    assert decoded[BLOCK : 2 * BLOCK].isnan().all()
    assert decoded[:BLOCK].isfinite().all()
    assert decoded[2 * BLOCK :].isfinite().all()

"""The CUDA kernels of bitmap_int8_linear against the reference, to the bit."""

import pytest
import torch
from bitmaps import damaged, inside, int8_bitmap, mask_of
from device import DEVICE, EMULATED, assert_same, on, on_device
from shapes import LINEARS

from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.bitmap_int8_linear import bitmap_int8_linear

pytestmark = on_device
reference = REFERENCES["bitmap_int8_linear"]


def activations(*shape):
    x = torch.randn(shape)
    return torch.where(torch.rand(*shape[:-1], 1) < 0.3, x.sign() * 3, x)  # rows of only -127 and 127, too


def check(x, bitmap, *more):
    assert_same([bitmap_int8_linear(*on(x, *bitmap, *more))], [reference(x, *bitmap, *more)])


@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_every_shape_and_dtype(shape):
    m, n, k = shape
    bitmap = int8_bitmap(mask_of(n, k))
    for dtype, bias in zip(FLOAT_DTYPES, (None, torch.randn(n), torch.randn(n).half()), strict=True):
        if m < 100 or dtype == torch.bfloat16:
            check(activations(m, k).to(dtype), bitmap, bias)


# Aligned rows of one and several stages; parts of the summed dimension for 1, 2 and 4 warps; each tail.
@pytest.mark.parametrize("k", [32, 512, 1056, 2100])
def test_stages_and_slices(k):
    for n in (3, 150, 300 if k < 1000 else 40):
        bitmap = int8_bitmap(mask_of(n, k))
        for m in (1, 9, 16) if n < 100 else (2,):
            check(activations(m, k), bitmap)


# Tiles of 64, 128 and 256 rows of x; several tiles; parts of the summed dimension; rows of the mask not on words. And
# the same where there is no wgmma.
@pytest.mark.parametrize("capability", ["9.0", "8.0"] if EMULATED else ["the card's"])
@pytest.mark.parametrize("shape", [(64, 150, 300), (150, 130, 1032), (300, 20, 1030), (40, 140, 4200), (129, 9, 9216)])
def test_tiles_and_parts(shape, capability, monkeypatch):
    monkeypatch.setenv("ENGINE_EMULATED_CAPABILITY", capability)
    m, n, k = shape
    for density in (0.5, 0.1, 1.0):
        check(activations(m, k), int8_bitmap(mask_of(n, k, density)), torch.randn(n))


@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_densities(density):
    bitmap = int8_bitmap(torch.rand(20, 700) < density)
    for m in (2, 17):
        check(activations(m, 700), bitmap)


def test_static_scale_and_leading_dimensions():
    bitmap = int8_bitmap(mask_of(9, 70))
    for scale in (0.02, 0.0, torch.nan, torch.inf, 1e-45):
        check(activations(2, 3, 70), bitmap, None, torch.tensor(scale))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_scale_for_each_channel(dtype):
    for m, k in ((3, 70), (17, 700)):
        bitmap, channels = int8_bitmap(mask_of(9, k)), torch.rand(2 * k)[::2] / 20 + 1e-3  # not contiguous
        x = activations(m, k).to(dtype)
        check(x, bitmap, torch.randn(9), channels)
        x[1, 3], x[2, 5] = torch.nan, -torch.inf
        check(x, bitmap, None, channels)
        for scale in (1e-30, 3e38, 0.0, -1.0, torch.nan, torch.inf, 1e-45):  # from the third on, one is enough for NaN
            check(x, bitmap, None, channels.index_fill(0, torch.tensor(k - 1), scale))


def test_refuses_scales_that_fit_no_channels():
    bitmap, x = on(*int8_bitmap(mask_of(9, 70))), torch.randn(3, 70).to(DEVICE)
    for bad in (torch.ones(69), torch.ones(1, 70), torch.ones(70).half()):
        with pytest.raises(RuntimeError, match="bitmap_int8_linear: input_scale: expected float32"):
            torch.ops.engine.bitmap_int8_linear(x, *bitmap, None, bad.to(DEVICE))


@pytest.mark.parametrize("m", [4, 40])
def test_rows_that_are_not_finite(m):
    x = activations(m, 70)
    x[1, 3], x[2, 5] = torch.nan, -torch.inf
    check(x, int8_bitmap(mask_of(9, 70)), torch.randn(9))


@pytest.mark.parametrize("m, k", [(1, 133000), (17, 34000), (17, 133000)])
def test_sums_that_are_widened_on_the_way_are_exact(m, k):
    mask = torch.ones(2, k, dtype=torch.bool)
    bitmask, offsets, values, scale = int8_bitmap(mask)
    values[:k] = -128
    check(torch.ones(m, k), (bitmask, offsets, values, scale))


@pytest.mark.parametrize("m, k", [(3, 213), (20, 213), (20, 4101)])  # the last in parts
def test_views_and_bitmaps_that_lie(m, k):
    bitmask, offsets, values, scale = int8_bitmap(mask_of(40, k))
    values, x = inside(values), activations(m, k)
    want = reference(x, bitmask, offsets, values, scale)
    x, values, scale = x.to(DEVICE), inside(values.to(DEVICE)), scale.to(DEVICE)
    assert_same([bitmap_int8_linear(x, bitmask.to(DEVICE), offsets.to(DEVICE), values, scale)], [want])
    for mask, rows, bad in damaged(bitmask, offsets, k):
        expected = want.clone()
        expected[:, bad] = torch.nan
        # Through the op itself: the public function is the same, there is no error for it to explain.
        got = torch.ops.engine.bitmap_int8_linear(x, mask.to(DEVICE), rows.to(DEVICE), values, scale)
        assert_same([got], [expected])

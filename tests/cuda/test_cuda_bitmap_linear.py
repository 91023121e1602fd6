"""The CUDA kernels of bitmap_linear against float64."""

import pytest
import torch
from bitmaps import damaged, inside, mask_of, offsets_of
from device import DEVICE, EMULATED, on, on_device
from shapes import LINEARS
from tolerance import assert_as_good_as_torch

from engine.ops._bitmap import bitmap_mask, pack_mask
from engine.ops._check import FLOAT_DTYPES
from engine.ops.bitmap_linear import bitmap_linear

pytestmark = on_device


def case(n, k, dtype, density=0.5):
    """A bitmap, and its dense weight in float64."""
    mask, dense = mask_of(n, k, density), torch.randn(n, k).to(dtype)
    return (pack_mask(mask), offsets_of(mask), dense[mask]), dense.double() * mask


def check(x, bitmap, dense, bias=None):
    truth = x.double() @ dense.t() + (0 if bias is None else bias.double())
    truth = torch.where(x.isfinite().all(-1, keepdim=True), truth, torch.nan)
    own = torch.nn.functional.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    assert_as_good_as_torch(bitmap_linear(*on(x, *bitmap, bias)).cpu(), truth, own)


@pytest.mark.parametrize("values", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_every_shape_and_pair_of_dtypes(shape, values):
    m, n, k = shape
    bitmap, dense = case(n, k, values)
    for dtype, bias in zip(FLOAT_DTYPES, (None, torch.randn(n), torch.randn(n).half()), strict=True):
        if (dtype == values and m < 100) or k <= 129 or dtype == values == torch.bfloat16:
            check(torch.randn(m, k).to(dtype), bitmap, dense, bias)


# Aligned rows of one and several stages; parts of the summed dimension for 1, 2 and 4 warps; each tail.
@pytest.mark.parametrize("k", [16, 256, 528, 1100])
def test_stages_and_slices(k):
    for n in (3, 150, 300 if k < 1000 else 40):
        bitmap, dense = case(n, k, torch.bfloat16)
        for m in (1, 9, 16) if n < 100 else (2,):
            check(torch.randn(m, k).bfloat16(), bitmap, dense)


# Tiles of 64, 128 and 256 rows of x; several tiles; parts of the summed dimension; rows of the mask not on words. And
# the same where there is no wgmma.
@pytest.mark.parametrize("capability", ["9.0", "8.0"] if EMULATED else ["the card's"])
@pytest.mark.parametrize("shape", [(64, 150, 300), (150, 130, 1032), (300, 20, 1030), (40, 140, 2200), (129, 9, 4608)])
def test_tiles_and_parts(shape, capability, monkeypatch):
    monkeypatch.setenv("ENGINE_EMULATED_CAPABILITY", capability)
    m, n, k = shape
    for density in (0.5, 0.1, 1.0):
        check(torch.randn(m, k).bfloat16(), *case(n, k, torch.bfloat16, density), torch.randn(n))


@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_densities(density):
    for dtype in FLOAT_DTYPES:
        bitmap, dense = case(20, 300, dtype, density)
        for m in (2, 17):
            check(torch.randn(m, 300).to(dtype), bitmap, dense)


@pytest.mark.parametrize("m", [4, 40])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_rows_that_are_not_finite(m, dtype):
    x = torch.randn(m, 70).to(dtype)
    x[1, 3], x[2, 5] = torch.nan, -torch.inf
    check(x, *case(9, 70, dtype), torch.randn(9))


@pytest.mark.parametrize("m, k", [(3, 213), (20, 213), (20, 2105)])  # the last in parts
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_views_leading_dimensions_and_bitmaps_that_lie(m, k, dtype):
    (bitmask, offsets, values), dense = case(40, k, dtype)
    storage = torch.randint(-8, 9, (m * k + 1,)).to(dtype)  # small integers: sums are exact
    dense = dense.mul(16).round().clamp(-8, 8)
    values = dense[bitmap_mask(bitmask, k)].to(dtype)
    want = (storage[1:].view(m, k).double() @ dense.t()).to(dtype)
    x, values = storage.to(DEVICE)[1:].view(m, 1, k), inside(values.to(DEVICE))
    assert torch.equal(bitmap_linear(x, bitmask.to(DEVICE), offsets.to(DEVICE), values).cpu().squeeze(1), want)
    for mask, rows, bad in damaged(bitmask, offsets, k):
        got = torch.ops.engine.bitmap_linear(x, mask.to(DEVICE), rows.to(DEVICE), values).cpu().squeeze(1)
        good = [i for i in range(40) if i not in bad]
        assert got[:, bad].isnan().all() and torch.equal(got[:, good], want[:, good])

"""The CUDA kernels of the 2:4 linear ops: int8 against the reference to the bit, floats against float64."""

import pytest
import torch
from device import DEVICE, EMULATED, assert_same, on, on_device
from shapes import LINEARS
from tolerance import assert_as_good_as_torch

from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops._semi_structured import group_count, pack_places, spread
from engine.ops.semi_structured_int8_linear import semi_structured_int8_linear
from engine.ops.semi_structured_linear import semi_structured_linear

pytestmark = on_device
PAIRS = torch.tensor([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])


def weight_of(n, k, dtype):
    """Any two places of each group, int8 values of the whole range, 0 beyond column K."""
    places = PAIRS[torch.randint(0, 6, (n, group_count(k)))]
    columns = torch.arange(group_count(k)).unsqueeze(-1) * 4 + places
    values = torch.randint(-128, 128, columns.shape) if dtype == torch.int8 else torch.randn(columns.shape)
    return torch.where(columns < k, values, 0).to(dtype).reshape(n, 2 * group_count(k)), pack_places(places)


def activations(*shape):
    x = torch.randn(shape)
    return torch.where(torch.rand(*shape[:-1], 1) < 0.3, x.sign() * 3, x)  # rows of only -127 and 127, too


def check_int8(x, weight, *more):
    scale = torch.rand(weight[0].shape[0]) / 100 + 1e-3
    want = REFERENCES["semi_structured_int8_linear"](x, *weight, scale, *more)
    assert_same([semi_structured_int8_linear(*on(x, *weight, scale, *more))], [want])


def check_float(x, weight, bias=None):
    dense = spread(*weight)[:, : x.shape[-1]].double()
    truth = x.double() @ dense.t() + (0 if bias is None else bias.double())
    truth = torch.where(x.isfinite().all(-1, keepdim=True), truth, torch.nan)
    own = torch.nn.functional.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    assert_as_good_as_torch(semi_structured_linear(*on(x, *weight, bias)).cpu(), truth, own)


@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_int8_every_shape_and_dtype(shape):
    m, n, k = shape
    weight = weight_of(n, k, torch.int8)
    for dtype, bias in zip(FLOAT_DTYPES, (None, torch.randn(n), torch.randn(n).half()), strict=True):
        if m < 100 or dtype == torch.bfloat16:
            check_int8(activations(m, k).to(dtype), weight, bias)


@pytest.mark.parametrize("values", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_float_every_shape_and_pair_of_dtypes(shape, values):
    m, n, k = shape
    weight = weight_of(n, k, values)
    for dtype, bias in zip(FLOAT_DTYPES, (None, torch.randn(n), torch.randn(n).half()), strict=True):
        if (dtype == values and m < 100) or k <= 129 or dtype == values == torch.bfloat16:
            check_float(torch.randn(m, k).to(dtype), weight, bias)


# Aligned rows of one and several steps, with the last one whole and not.
@pytest.mark.parametrize("k", [32, 128, 256, 544])
def test_aligned_rows(k):
    for m, n in ((3, 16), (18, 70)):
        check_int8(activations(m, k), weight_of(n, k, torch.int8))
        check_float(torch.randn(m, k).half(), weight_of(n, k, torch.float16))


@pytest.mark.parametrize("m, k", [(1, 33000), pytest.param(17, 33000, marks=pytest.mark.slow)])
def test_sums_that_are_widened_on_the_way_are_exact(m, k):
    values, metadata = weight_of(2, k, torch.int8)
    values[0] = -128
    check_int8(torch.ones(m, k), (values, metadata))


@pytest.mark.parametrize("m", [4, 20])
def test_rows_that_are_not_finite_and_static_scales(m):
    x = activations(m, 70)
    check_int8(x, weight_of(9, 70, torch.int8), None, torch.tensor(0.02))
    x[1, 3], x[2, 5] = torch.nan, -torch.inf
    check_int8(x, weight_of(9, 70, torch.int8), torch.randn(9))
    for dtype in FLOAT_DTYPES:
        check_float(x.to(dtype), weight_of(9, 70, dtype), torch.randn(9))


@pytest.mark.parametrize("m", [4, 20])
def test_a_scale_for_each_channel(m):
    x, channels = activations(m, 70), torch.rand(2 * 70)[::2] / 20 + 1e-3  # not contiguous
    weight = weight_of(9, 70, torch.int8)
    check_int8(x, weight, torch.randn(9), channels)
    x[1, 3] = torch.nan
    check_int8(x.half(), weight, None, channels)
    for unusable in (0.0, torch.inf):  # every row of y becomes NaN
        check_int8(x, weight, None, channels.index_fill(0, torch.tensor(69), unusable))
    with pytest.raises(ValueError, match="input_scale: expected one element or shape"):
        semi_structured_int8_linear(*on(x, *weight, torch.ones(9), None, channels[:69]))


def test_views_and_leading_dimensions():
    values, metadata = weight_of(20, 64, torch.int8)
    scale, x = torch.rand(20), torch.randn(2, 3, 64)
    want = REFERENCES["semi_structured_int8_linear"](x, values, metadata, scale)
    memory = torch.full((20 * 32 + 2,), 77, dtype=torch.int8)
    memory[1:-1] = values.reshape(-1)
    shifted = memory.to(DEVICE)[1:-1].view(20, 32)  # not aligned
    assert_same([semi_structured_int8_linear(x.to(DEVICE), shifted, metadata.to(DEVICE), scale.to(DEVICE))], [want])


# Whole steps of K: tiles of 64, 128 and 256 rows of x, whole ones and not, as many as blocks or more, and as many steps
# as there are stages or more.
WHOLE_STEPS = [
    (3, 200, 896),
    (17, 8, 128),
    (20, 72, 1792),
    (65, 129, 256),
    (128, 300, 128),
    (250, 500, 640),
    (500, 497, 128),
]
if not EMULATED:  # on a card these have the largest tiles, and several for each multiprocessor
    WHOLE_STEPS += [(640, 3392, 640), (2600, 4200, 256)]


@pytest.mark.parametrize("capability", ["9.0", "8.0"] if EMULATED else ["the card's"])
@pytest.mark.parametrize("m, n, k", WHOLE_STEPS)
def test_whole_steps(m, n, k, capability, monkeypatch):
    monkeypatch.setenv("ENGINE_EMULATED_CAPABILITY", capability)
    for dtype, bias in zip(FLOAT_DTYPES, (None, torch.randn(n), torch.randn(n).half()), strict=True):
        if m > 100 and dtype != torch.bfloat16:
            continue
        x = torch.randn(m, k).to(dtype)
        x[m // 2, 3] = torch.inf
        check_int8(x, weight_of(n, k, torch.int8), bias)
        if dtype != torch.float32:
            check_float(x, weight_of(n, k, dtype), bias)

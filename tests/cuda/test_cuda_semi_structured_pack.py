"""The CUDA kernels of prune_to_semi_structured and semi_structured_to_dense against their references, to the bit."""

import itertools

import pytest
import torch
from bitmaps import inside
from device import DEVICE, assert_same, on, on_device
from shapes import MATRICES

from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.prune_to_semi_structured import prune_to_semi_structured
from engine.ops.semi_structured_to_dense import semi_structured_to_dense

pytestmark = on_device
prune = REFERENCES["prune_to_semi_structured"]
DTYPES = [*FLOAT_DTYPES, torch.int8]


def kept(rows, columns, dtype):
    values, metadata = prune(torch.randint(-128, 128, (rows, columns)).float())
    return values.to(dtype), metadata


def every_order(dtype):
    """Groups with every order of four values, equal ones and NaN among them."""
    pool = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, torch.inf, torch.nan], dtype=dtype)
    return torch.stack([torch.stack(group) for group in itertools.product(pool, repeat=4)])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_keeps_what_the_reference_keeps(dtype):
    for rows, columns in (*MATRICES, (33, 256), (3, 4104), *((3, columns) for columns in range(1, 10))):
        weight = torch.randint(-2, 3, (rows, columns)) if columns % 2 else torch.randn(rows, columns)
        assert_same(prune_to_semi_structured(weight.to(dtype).to(DEVICE)), prune(weight.to(dtype)))
    order = every_order(dtype)
    for weight in (order.view(7, -1), torch.cat([order, order.flip(0)]).view(14, -1), torch.randn(20, 3).to(dtype).t()):
        assert_same(prune_to_semi_structured(weight.to(DEVICE)), prune(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_spreads_every_shape(dtype):
    for rows, columns in (*MATRICES, (33, 256), (3, 4104), *((3, columns) for columns in range(1, 10))):
        values, metadata = kept(rows, columns, dtype)
        want = REFERENCES["semi_structured_to_dense"](values, metadata, columns)
        for aligned in (True, False):
            given, places = on(values, metadata)
            given = given if aligned else inside(given)
            assert_same([semi_structured_to_dense(given, places, columns)], [want])


def test_metadata_that_lies():
    for columns in (50, 48):
        values, metadata = on(*kept(5, columns, torch.int8))
        wrong = [(2, 1, 0b0100_0000), (3, 0, 0b1110_0001), (4, 5, 0b0100_0111)]
        for row, byte, places in wrong + [(1, 6, 0b0100_1011), (4, 6, 0b1000_0100)] * (columns == 50):
            damaged = metadata.clone()
            damaged[row, byte] = places
            with pytest.raises(ValueError, match="semi_structured_to_dense: metadata"):
                semi_structured_to_dense(values, damaged, columns)
            with pytest.raises(RuntimeError, match="semi_structured_to_dense: metadata: expected places"):
                torch.ops.engine.semi_structured_to_dense(values, damaged, columns)
    values, metadata = on(*kept(5, 50, torch.float32))
    metadata[0, 6], values[0, 25] = 0b0100_1100, -0.0  # the second value of the last group at column 51
    assert semi_structured_to_dense(values, metadata, 50).shape == (5, 50)
    values[0, 25] = 1
    with pytest.raises(ValueError, match="semi_structured_to_dense"):
        semi_structured_to_dense(values, metadata, 50)

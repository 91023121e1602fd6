"""The CUDA kernels of bitmap_to_dense and bitmap_gather against their references, to the bit."""

import pytest
import torch
from bitmaps import damaged, inside, mask_of, offsets_of
from device import assert_same, on, on_device
from shapes import MATRICES

from engine.ops._bitmap import pack_mask
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.bitmap_to_dense import bitmap_to_dense

pytestmark = on_device


def case(mask, dtype):
    values = torch.randint(-128, 128, (int(mask.sum()),)).to(dtype)
    return pack_mask(mask), offsets_of(mask), values


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.int8])
def test_every_shape(dtype):
    shapes = [(37, 1000), (3, 20000), (129, 264), *MATRICES, (4097, 16)]
    for rows, columns in shapes[: None if dtype == torch.float16 else -2]:
        bitmap = case(mask_of(rows, columns), dtype)
        want = REFERENCES["bitmap_to_dense"](*bitmap, columns)
        bitmask, offsets, values = on(*bitmap)
        assert_same([bitmap_to_dense(bitmask, offsets, inside(values), columns)], [want])
        if dtype != torch.int8:
            gathered = torch.ops.engine.bitmap_gather(*on(want, *bitmap[:2]), values.numel())
            assert_same([gathered], [bitmap[2]])


@pytest.mark.parametrize("columns", [213, 216, 8200])
def test_bitmaps_that_lie(columns):
    bitmask, offsets, values = case(mask_of(40, columns), torch.float32)
    for mask, rows, _ in damaged(bitmask, offsets, columns):
        if torch.equal(mask, bitmask) and torch.equal(rows, offsets):  # the bit was set before
            continue
        mask, rows, kept, dense = on(mask, rows, values, torch.randn(40, columns))
        with pytest.raises(ValueError, match="bitmap_to_dense"):
            bitmap_to_dense(mask, rows, inside(kept), columns)
        with pytest.raises(RuntimeError, match="bitmap_gather: bitmask: row"):
            torch.ops.engine.bitmap_gather(dense, mask, rows, values.numel())
    with pytest.raises(ValueError, match="row_offsets"):
        bitmap_to_dense(*on(bitmask[:0], torch.ones(1, dtype=torch.int64), values[:0]), columns)

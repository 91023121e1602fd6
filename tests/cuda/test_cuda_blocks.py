"""The CUDA kernels of prune_to_block and block_to_dense against their references, to the bit."""

import pytest
import torch
from bitmaps import inside
from device import DEVICE, assert_same, on, on_device

from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.block_to_dense import block_to_dense

pytestmark = on_device
DTYPES = [*FLOAT_DTYPES, torch.int8]
CASES = [  # rows, columns, block shape
    (0, 8, (16, 16)),
    (3, 0, (16, 16)),
    (1, 1, (16, 16)),
    (130, 1027, (32, 32)),
    (70, 130, (48, 16)),
    (300, 260, (256, 256)),
    (64, 96, (16, 48)),
    (20, 9000, (16, 16)),
]


def blocks(rows, columns, shape, dtype, fraction=0.5):
    weight = torch.randint(-128, 128, (rows, columns)).to(dtype)
    keep = torch.rand(-(-rows // shape[0]), -(-columns // shape[1])) < fraction
    return weight, keep, REFERENCES["prune_to_block"](weight, keep, *shape)


def check(rows, columns, shape, dtype, fraction=0.5):
    weight, keep, kept = blocks(rows, columns, shape, dtype, fraction)
    assert_same(torch.ops.engine.prune_to_block(*on(weight, keep), *shape), kept)
    want = REFERENCES["block_to_dense"](*kept, rows, columns)
    crow, col, values = on(*kept)
    assert_same([block_to_dense(crow, col, values, rows, columns)], [want])
    assert_same([block_to_dense(crow, col, inside(values), rows, columns)], [want])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape(dtype):
    for case in CASES:
        check(*case, dtype)
    for fraction in (0.0, 1.0):
        check(40, 5000, (16, 16), dtype, fraction)


def test_rows_off_the_alignment():
    storage, keep = torch.randn(64 * 64 + 1), torch.tensor([[True, False], [False, True]])
    want = REFERENCES["prune_to_block"](storage[1:].view(64, 64), keep, 32, 32)
    assert_same(torch.ops.engine.prune_to_block(storage.to(DEVICE)[1:].view(64, 64), keep.to(DEVICE), 32, 32), want)


def test_indices_that_lie():
    _, _, (crow, col, values) = blocks(64, 64, (16, 16), torch.float32, 1.0)
    for where, index, value in (
        (crow, 0, 1),
        (crow, 1, 2**30),
        (crow, 2, 3),
        (crow, 4, 15),
        (crow, 4, 2**31 - 1),
        (col, 3, 4),
        (col, 4, -1),
        (col, 1, 0),
    ):
        damaged = where.clone()
        damaged[index] = value
        indices = on(*((damaged, col) if where is crow else (crow, damaged)))
        with pytest.raises(ValueError, match="block_to_dense"):
            block_to_dense(*indices, inside(values.to(DEVICE)), 64, 64)
        with pytest.raises(RuntimeError, match="block_to_dense: expected indices"):
            torch.ops.engine.block_to_dense(*indices, values.to(DEVICE), 64, 64)
    with pytest.raises(ValueError, match="block_to_dense"):
        block_to_dense(*on(crow[:1] + 1, col[:0], values[:0]), 0, 64)


def test_refuses_shapes_and_types():
    _, keep, (crow, col, values) = blocks(64, 64, (16, 16), torch.float32, 1.0)
    weight = torch.zeros(64, 64)
    for args in ((weight.double(), keep, 16, 16), (weight, keep, 16, 8), (weight, keep[:1], 16, 16)):
        with pytest.raises(RuntimeError, match="prune_to_block: "):
            torch.ops.engine.prune_to_block(*on(*args))
    for args in ((crow.long(), col, values), (crow, col, values.double()), (crow, col[:3], values)):
        with pytest.raises(RuntimeError, match="block_to_dense: "):
            torch.ops.engine.block_to_dense(*on(*args), 64, 64)

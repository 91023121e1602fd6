"""block_to_dense: blocks at their places, the gradient, and indices that lie."""

import pytest
import torch
from shapes import MATRICES

from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.block_to_dense import block_to_dense
from engine.ops.prune_to_block import prune_to_block

reference = REFERENCES["block_to_dense"]
SHAPES = [(16, 16), (32, 32), (48, 80), (16, 256)]


def kept_blocks(rows, columns, high=32, wide=32, dtype=torch.float32):
    """A random half of the blocks of a random weight, the weight, and where it was kept."""
    weight = (torch.randn(rows, columns) * 30).to(dtype)
    keep = torch.rand(-(-rows // high), -(-columns // wide)) < 0.5
    inside = keep.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:rows, :columns]
    return prune_to_block(weight, block_shape=(high, wide), keep=keep), weight, inside


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.int8])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_native_is_reference_to_the_bit(variant, shape, dtype):
    for high, wide in SHAPES:
        blocks, weight, inside = kept_blocks(*shape, high, wide, dtype)
        dense = block_to_dense(*blocks, *shape)
        assert dense.dtype == dtype and torch.equal(dense, torch.where(inside, weight, 0))
        assert torch.equal(dense, reference(*blocks, *shape))


def test_gradient_opcheck_and_compile():
    (crow, col, values), _, inside = kept_blocks(40, 70)
    values.requires_grad_()
    torch.library.opcheck(torch.ops.engine.block_to_dense.default, (crow, col, values, 40, 70))
    grad = torch.randn(40, 70)
    block_to_dense(crow, col, values, 40, 70).backward(grad)
    assert torch.equal(block_to_dense(crow, col, values.grad, 40, 70), torch.where(inside, grad, 0))
    compiled = torch.compile(lambda v: block_to_dense(crow, col, v, 40, 70), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values), block_to_dense(crow, col, values, 40, 70))


def test_indices_that_lie_are_refused(variant):
    keep = torch.ones(2, 3, dtype=torch.bool)
    crow, col, values = prune_to_block(torch.randn(40, 70), keep=keep)
    for lie in ([0, 5, 4], [1, 3, 6], [0, 3, 7], [0, -1, 6]):
        with pytest.raises(ValueError, match="crow_indices"):
            block_to_dense(torch.tensor(lie, dtype=torch.int32), col, values, 40, 70)
    for lie in ([0, 2, 1, 0, 1, 2], [0, 1, 1, 0, 1, 2], [0, 1, 3, 0, 1, 2], [-1, 1, 2, 0, 1, 2]):
        with pytest.raises(ValueError, match="col_indices"):
            block_to_dense(crow, torch.tensor(lie, dtype=torch.int32), values, 40, 70)


def test_errors():
    crow, col, values = prune_to_block(torch.randn(40, 70), keep=torch.ones(2, 3, dtype=torch.bool))
    for arguments, error, message in (
        ((crow, col, values, 70, 70), ValueError, "crow_indices: expected shape"),
        ((crow, col, values, 40, 32), ValueError, "col_indices: expected columns of blocks"),
        ((crow.long(), col, values, 40, 70), TypeError, "crow_indices: expected a"),
        ((crow, col, values.double(), 40, 70), TypeError, "values: expected a"),
        ((crow, col, values, 40.0, 70), TypeError, "rows: expected an int, got float"),
        ((crow, col, values, 40, None), TypeError, "columns: expected an int, got NoneType"),
        ((crow, col, values, 2**40, 70), ValueError, "crow_indices: expected shape"),
        ((crow, col, values, 40, -1), ValueError, "columns: expected at least 0, got -1"),
    ):
        with pytest.raises(error, match=message):
            block_to_dense(*arguments)

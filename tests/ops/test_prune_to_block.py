"""prune_to_block: norms and thresholds, edges, the way back, errors."""

import pytest
import torch
from shapes import MATRICES

from engine.ops._block import block_norms
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.block_to_dense import block_to_dense
from engine.ops.prune_to_block import prune_to_block

SHAPES = [(16, 16), (32, 32), (48, 80), (16, 256)]


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.int8])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_native_is_reference_to_the_bit(variant, shape, dtype):
    weight = (torch.randn(shape) * 30).to(dtype)
    for high, wide in SHAPES:
        keep = torch.rand(-(-shape[0] // high), -(-shape[1] // wide)) < 0.5
        got = prune_to_block(weight.t().contiguous().t(), block_shape=(high, wide), keep=keep)
        for one, other in zip(got, REFERENCES["prune_to_block"](weight, keep, high, wide), strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype
        dense = block_to_dense(*got, *shape)
        inside = keep.repeat_interleave(high, 0).repeat_interleave(wide, 1)[: shape[0], : shape[1]]
        assert torch.equal(dense, torch.where(inside, weight, 0))


def test_norms_are_root_mean_squares():
    weight = torch.randn(70, 130)
    norms = block_norms(weight, (32, 48))
    for i in range(3):
        for j in range(3):
            block = weight[32 * i : 32 * i + 32, 48 * j : 48 * j + 48].double()
            torch.testing.assert_close(norms[i, j].double(), block.square().mean().sqrt(), rtol=1e-6, atol=0)
    crow, col, values = prune_to_block(weight, 1.0, (32, 48))
    assert torch.equal(crow.diff().long(), (norms > 1.0).sum(1))
    assert torch.equal(col.long(), (norms > 1.0).nonzero()[:, 1]) and values.shape == (len(col), 32, 48)
    by_row = norms.median(1, keepdim=True).values
    assert torch.equal(prune_to_block(weight, by_row, (32, 48))[0].diff(), torch.ones(3, dtype=torch.int32))
    weight[0, 0] = torch.nan
    assert prune_to_block(weight, 1e9)[1].tolist() == [0]  # a block with a NaN is kept


def test_opcheck_and_compile():
    weight, keep = torch.randn(40, 70), torch.rand(2, 3) < 0.6
    torch.library.opcheck(torch.ops.engine.prune_to_block.default, (weight, keep, 32, 32))
    compiled = torch.compile(lambda w: prune_to_block(w, 1.0), fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(weight), prune_to_block(weight, 1.0), strict=True):
        assert torch.equal(one, other)


def test_errors():
    weight, keep = torch.randn(40, 70), torch.ones(2, 3, dtype=torch.bool)
    for arguments, error, message in (
        ((weight,), ValueError, "threshold: expected either a threshold or keep"),
        ((weight, 0.5, (32, 32), keep), ValueError, "threshold: expected either a threshold or keep"),
        ((weight, 0.5, (8, 32)), ValueError, "block_shape: expected multiples of 16 from 16 to 256, got 8x32"),
        ((weight, 0.5, (32, 512)), ValueError, "block_shape"),
        ((weight, 0.5, 32), TypeError, "block_shape: expected two ints, got 32"),
        ((weight, 0.5, (32, 32, 32)), TypeError, "block_shape: expected two ints"),
        ((weight, None, (32.0, 32.0), keep), TypeError, "block_shape: expected two ints"),
        ((weight, None, (32, 32), keep.int()), TypeError, "keep: expected a bool tensor"),
        ((weight, None, (32, 32), keep[:1]), ValueError, "keep: expected shape"),
        ((weight.double(), 0.5), TypeError, "weight: expected a float32"),
        ((weight[0], 0.5), ValueError, "weight: expected shape"),
        ((weight, torch.ones(5)), ValueError, "threshold: expected a shape that broadcasts"),
    ):
        with pytest.raises(error, match=message):
            prune_to_block(*arguments)

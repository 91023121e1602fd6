"""block_int8_linear: indices that lie, and densities; what all int8 linear ops must do is in test_int8_linears.py."""

import pytest
import torch
from stored import activations, assert_same, int8_values

import engine
from engine.ops._library import REFERENCES
from engine.ops.block_int8_linear import block_int8_linear

reference = REFERENCES["block_int8_linear"]


def weights(n, k, shape=None, density=0.5):
    high, wide = shape or [(16, 16), (32, 32), (48, 80), (128, 64), (16, 256)][torch.randint(5, ())]
    keep = torch.rand(-(-n // high), -(-k // wide)) < density
    packed = engine.ops.prune_to_block(int8_values(n, k), block_shape=(high, wide), keep=keep)
    return *packed, torch.rand(n) / 100 + 1e-3


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_densities(variant, density):
    weight, x = weights(100, 700, (32, 32), density), activations(20, 700)
    want = reference(x, *weight)
    for m in (1, 4, 20):
        assert_same(block_int8_linear(x[:m], *weight), want[:m])


@pytest.mark.parametrize("shape", [(16, 16), (32, 32), (48, 80), (64, 64), (80, 48), (128, 16)])
def test_rows_of_activations_in_groups(variant, shape):
    """Half a vector of 8, one or two of 16, and rests of each; outputs by every tile."""
    weight, x = weights(150, 333, shape), activations(75, 333)
    want = reference(x, *weight)
    for m in (7, 8, 9, 16, 17, 24, 25, 32, 33, 41, 64, 75):
        assert_same(block_int8_linear(x[:m], *weight), want[:m])


def test_sums_beyond_32_bits(variant):
    n, k = 40, 140_000
    values = torch.full((n, k), 127, dtype=torch.int8)
    values[::3] = -127
    packed = engine.ops.prune_to_block(values, block_shape=(16, 64), keep=torch.ones(3, -(-k // 64), dtype=torch.bool))
    x, scale = torch.ones(35, k), torch.rand(n)
    x[1] = -1
    for m in (8, 12, 35):
        assert_same(block_int8_linear(x[:m], *packed, scale), reference(x[:m], *packed, scale))


def test_what_lies_beyond_the_matrix_does_not_count(variant):
    crow, col, values, scale = weights(40, 70, (32, 32), 1.0)
    x = activations(20, 70)
    want = block_int8_linear(x, crow, col, values, scale)
    values = values.clone()
    values[2::3, :, 6:] = 77
    values[3:, 8:] = 77
    for m in (1, 20):
        assert_same(block_int8_linear(x[:m], crow, col, values, scale), want[:m])


def test_errors(variant):
    x, (crow, col, values, scale) = torch.randn(3, 70), weights(70, 70, (32, 32), 1.0)
    descending, outside, rising = col.clone(), col.clone(), crow.clone()
    descending[1], outside[2], rising[1] = 0, 3, 99
    for arguments, error, message in (
        ((x.double(), crow, col, values, scale), TypeError, "x: expected a float32"),
        ((x[:, :9], crow, col, values, scale), ValueError, r"col_indices: expected columns of blocks in \[0, 1\)"),
        ((x, crow, col, values.float(), scale), TypeError, "values: expected a int8"),
        ((x, crow.long(), col, values, scale), TypeError, "crow_indices: expected a int32"),
        ((x, crow[:-1], col, values, scale), ValueError, "crow_indices: expected shape"),
        ((x, crow, col[:-1], values, scale), ValueError, "col_indices: expected shape"),
        ((x, crow, col, values[:, :8], scale), ValueError, "block_shape: expected multiples of 16"),
        ((x, crow, col, values, scale, torch.randn(3)), ValueError, "bias: expected shape"),
        ((x, crow, descending, values, scale), ValueError, "col_indices: expected to ascend"),
        ((x, crow, outside, values, scale), ValueError, "col_indices: expected columns of blocks"),
        ((x, crow, -outside, values, scale), ValueError, "col_indices: expected columns of blocks"),
        ((x, rising, col, values, scale), ValueError, "crow_indices: expected never to decrease"),
        ((x, crow + 1, col, values, scale), ValueError, "crow_indices: expected to begin with 0"),
    ):
        with pytest.raises(error, match=message):
            block_int8_linear(*arguments)

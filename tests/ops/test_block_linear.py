"""block_linear: what is its own; what all linear ops of float weights must do is in test_float_linears.py."""

import pytest
import torch

import engine
from engine.ops.block_linear import block_linear


def test_what_lies_beyond_the_matrix_does_not_count(variant):
    keep = torch.ones(2, 3, dtype=torch.bool)
    crow, col, values = engine.ops.prune_to_block(torch.randn(40, 70), keep=keep)
    x = torch.randn(20, 70)
    want = block_linear(x, crow, col, values, 40)
    values = values.clone()
    values[2::3, :, 6:], values[3:, 8:] = torch.nan, torch.inf
    assert torch.equal(block_linear(x, crow, col, values, 40), want)


def test_a_bias_in_the_place_of_rows_is_told():
    crow, col, values = engine.ops.prune_to_block(torch.randn(32, 64), 0.0)
    with pytest.raises(TypeError, match="block_linear: rows: expected an int, got a tensor"):
        block_linear(torch.randn(2, 64), crow, col, values, torch.zeros(32))

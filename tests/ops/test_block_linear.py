"""block_linear: what is its own; what all linear ops of float weights must do is in test_float_linears.py."""

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

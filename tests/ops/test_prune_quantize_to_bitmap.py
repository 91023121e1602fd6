"""prune_quantize_to_bitmap: its int8 values and scales; what all such ops must do is in test_prune_to_formats.py."""

import numpy as np
import pytest
import torch
from stored import assert_same

from engine.ops._bitmap import bitmap_mask, check_bitmap, check_bitmap_metadata
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.bitmap_to_dense import bitmap_to_dense
from engine.ops.prune_quantize_to_bitmap import prune_quantize_to_bitmap


def reference(weight, threshold):
    return REFERENCES["prune_quantize_to_bitmap"](weight, torch.tensor(threshold))


def assert_all_same(got, want):
    for one, other in zip(got, want, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_matches_float64(dtype):
    weight = (torch.randn(20, 333) * torch.rand(20, 1).exp()).to(dtype)
    bitmask, row_offsets, values, scale = reference(weight, 0.5)
    check_bitmap_metadata("test", bitmask, row_offsets, values, 333)
    check_bitmap("test", bitmask, row_offsets, values, 333)
    kept = weight.double().abs() > 0.5
    assert_same(bitmap_mask(bitmask, 333), kept)
    truth = weight.double() * kept
    step = truth.abs().amax(-1) / 127
    assert_same(scale, step.float())
    dense = bitmap_to_dense(bitmask, row_offsets, values, 333)
    assert (dense.double() - truth / step[:, None]).abs().max() <= 0.5 + 1e-4


def test_reference_is_prune_then_quantize():
    weight = torch.randn(30, 100)
    bitmask, row_offsets, kept = REFERENCES["prune_to_bitmap"](weight, torch.tensor(0.5))
    q, scale = zip(*(REFERENCES["int8_quantize"](row) for row in kept.split(row_offsets.diff().tolist())), strict=True)
    assert_all_same(reference(weight, 0.5), (bitmask, row_offsets, torch.cat(q), torch.stack(scale)))


def test_kept_weights_that_round_to_zero_stay(variant):
    weight = torch.full((2, 130), 0.001)
    weight[:, 7] = 1.0
    bitmask, row_offsets, values, _ = prune_quantize_to_bitmap(weight, 0.0)
    assert row_offsets.tolist() == [0, 130, 260] and bitmap_mask(bitmask, 130).all()
    assert values.view(2, 130)[:, 7].tolist() == [127, 127] and values.count_nonzero() == 2


def test_half_to_even(variant):
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5] * 10])
    assert prune_quantize_to_bitmap(weight, 0.0)[2].tolist() == [127, 0, 2, 2, 0, -2, -2] * 10


def test_rows_that_are_not_numbers_or_empty_do_not_leak(variant):
    weight = torch.randn(6, 100)
    weight[1, 50], weight[2, 3], weight[4] = torch.nan, -torch.inf, 1e-3
    bitmask, row_offsets, values, scale = prune_quantize_to_bitmap(weight, 0.1)
    assert_all_same((bitmask, row_offsets, values, scale), reference(weight, 0.1))
    assert scale.isnan().tolist() == [False, True, True, False, False, False]
    assert scale[4] == 1 and row_offsets[4] == row_offsets[5]
    assert not values[row_offsets[1] : row_offsets[3]].any()


def test_scale_is_of_the_kept_alone(variant):
    weight, threshold = torch.ones(1, 70), torch.zeros(1, 70)
    weight[0, 3], threshold[0, 3] = 100.0, 200.0  # the largest is pruned
    weight[0, 9], threshold[0, 9] = torch.inf, torch.inf
    _, _, values, scale = prune_quantize_to_bitmap(weight, threshold)
    assert values.tolist() == [127] * 68 and scale.item() == float(np.float32(1) / np.float32(127))


def test_tiny_rows_count_as_zero(variant):
    weight = torch.tensor([[2.0**-101, 0.0], [2.0**-100, 0.0], [1e-45, 0.0]])
    _, _, values, scale = prune_quantize_to_bitmap(weight, 0.0)
    assert values.tolist() == [0, 127, 0] and scale[[0, 2]].tolist() == [1.0, 1.0]

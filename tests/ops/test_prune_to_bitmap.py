"""prune_to_bitmap: what is its own; what all such ops must do is in test_prune_to_formats.py."""

import numpy as np
import pytest
import torch
from stored import assert_same

from engine.ops._bitmap import bitmap_mask, check_bitmap, check_bitmap_metadata
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.bitmap_to_dense import bitmap_to_dense
from engine.ops.prune_to_bitmap import prune_to_bitmap


def test_compiles_there_and_back():
    def there_and_back(weight):
        return bitmap_to_dense(*prune_to_bitmap(weight, 0.5), weight.shape[1])

    weight = torch.randn(5, 65)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert_same(compiled(weight), there_and_back(weight))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_keeps_what_is_above(dtype):
    weight = torch.randn(7, 45).to(dtype)
    bitmask, row_offsets, values = REFERENCES["prune_to_bitmap"](weight, torch.tensor(0.5))
    kept = [[abs(w) > 0.5 for w in row] for row in weight.double().tolist()]
    assert bitmap_mask(bitmask, 45).tolist() == kept
    assert row_offsets.tolist() == [0, *np.cumsum([sum(row) for row in kept])]
    assert_same(values, weight[torch.tensor(kept)])
    check_bitmap_metadata("test", bitmask, row_offsets, values, 45)
    check_bitmap("test", bitmask, row_offsets, values, 45)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_round_trip(variant, dtype):
    weight = torch.randn(33, 200).to(dtype)
    bitmap = prune_to_bitmap(weight, 0.6)
    want = torch.where(weight.float().abs() > 0.6, weight, 0.0)
    assert_same(bitmap_to_dense(*bitmap, 200), want)

"""prune_to_csr: beside PyTorch's own, index dtypes; what all such ops must do is in test_prune_to_formats.py."""

import pytest
import torch
from stored import assert_same
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.prune_to_csr import prune_to_csr


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_is_what_torch_makes_of_the_pruned_weight(dtype):
    weight = torch.randn(7, 45).to(dtype)
    want = torch.where(weight.abs() > 0.5, weight, 0.0).to_sparse_csr()
    crow_indices, col_indices, values = REFERENCES["prune_to_csr"](weight, torch.tensor(0.5))
    assert_same(crow_indices, want.crow_indices().int())
    assert_same(col_indices, want.col_indices().int())
    assert_same(values, want.values().to(dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_torch_takes_the_result(variant, dtype):
    weight = torch.randn(33, 200).to(dtype)
    csr = torch.sparse_csr_tensor(*prune_to_csr(weight, 0.6), weight.shape, check_invariants=True)
    assert_same(csr.to_dense(), torch.where(weight.float().abs() > 0.6, weight, 0.0))


def test_indices_are_wide_where_the_weight_is_large():
    with FakeTensorMode(shape_env=ShapeEnv()):
        for rows, dtype in ((2**20, torch.int32), (2**20 + 1, torch.int64)):
            crow_indices, col_indices, values = prune_to_csr(torch.empty(rows, 2047 + rows % 2), 0.5)
            assert crow_indices.dtype == col_indices.dtype == dtype and values.dtype == torch.float32


@pytest.mark.slow
def test_more_elements_than_int32_counts():
    weight = torch.zeros(2, 2**30, dtype=torch.bfloat16)
    places = torch.tensor([[5, 2**30 - 1], [0, 2**30 - 17]])
    weight.scatter_(1, places, 1.0)
    crow_indices, col_indices, values = prune_to_csr(weight, 0.5)
    assert crow_indices.dtype == col_indices.dtype == torch.int64
    assert crow_indices.tolist() == [0, 2, 4] and col_indices.tolist() == places.flatten().tolist()
    assert values.tolist() == [1.0] * 4

"""prune_to_csr: reference against torch's own, native against reference to the bit, thresholds, edges, errors."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import MATRICES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import engine
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.prune_to_csr import prune_to_csr


def reference(weight, threshold):
    return REFERENCES["prune_to_csr"](weight, torch.as_tensor(threshold, dtype=torch.float32))


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_is_what_torch_makes_of_the_pruned_weight(dtype):
    weight = torch.randn(7, 45).to(dtype)
    want = torch.where(weight.abs() > 0.5, weight, 0.0).to_sparse_csr()
    assert_same(reference(weight, 0.5), (want.crow_indices().int(), want.col_indices().int(), want.values().to(dtype)))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_native_is_reference_to_the_bit(variant, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    for threshold in (0.0, 0.1, 0.67, 2.0, torch.inf):
        assert_same(prune_to_csr(weight, threshold), reference(weight, threshold))


def test_thresholds_broadcast(variant):
    weight = torch.randn(9, 150)
    for shape in ((), (1,), (150,), (1, 1), (1, 150), (9, 1), (9, 150)):
        threshold = torch.rand(shape) * 2
        assert_same(prune_to_csr(weight, threshold), reference(weight, threshold))
    strided = torch.rand(150, 9).T
    assert_same(prune_to_csr(weight, strided), reference(weight, strided))


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(0, 140)), elements=st.floats(width=32)),
    st.floats(width=32),
)
def test_any_values(weight, threshold):
    weight = torch.from_numpy(weight)
    want = reference(weight, threshold)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            assert_same(prune_to_csr(weight, threshold), want)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_ties_signs_and_what_is_no_number(variant, dtype):
    weight = torch.tensor([[0.5, -0.5, 0.75, -0.75, 0.0, -0.0, torch.nan, torch.inf, -torch.inf, 2.0**-24]]).to(dtype)

    def kept(threshold):
        return prune_to_csr(weight, threshold)[1].tolist()

    assert kept(0.5) == [2, 3, 6, 7, 8]
    assert kept(0.0) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert kept(-1.0) == list(range(10))
    assert kept(torch.inf) == [6]
    assert kept(torch.nan) == list(range(10))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("columns", [8, 333, 1024])
def test_threads_agree_and_clobber_nothing(variant, columns, dtype):
    weight = torch.randn(1500, columns).to(dtype)
    weight[::3] *= 0.01  # rows with nothing, next to full ones
    want, before = reference(weight, 0.4), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same(prune_to_csr(weight, 0.4), want)
    finally:
        torch.set_num_threads(before)


def test_strides(variant):
    weight = torch.randn(70, 20).T
    assert_same(prune_to_csr(weight, 0.4), reference(weight, 0.4))
    assert_same(prune_to_csr(torch.randn(1, 8).expand(5, 8), -1.0)[:1], [torch.arange(0, 48, 8).int()])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_torch_takes_the_result(variant, dtype):
    weight = torch.randn(33, 200).to(dtype)
    csr = torch.sparse_csr_tensor(*prune_to_csr(weight, 0.6), weight.shape, check_invariants=True)
    assert_same([csr.to_dense()], [torch.where(weight.float().abs() > 0.6, weight, 0.0)])


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


def test_opcheck():
    for threshold in (torch.tensor(0.5), torch.rand(3, 1), torch.rand(21)):
        torch.library.opcheck(torch.ops.engine.prune_to_csr.default, (torch.randn(3, 21), threshold))


def test_compiles():
    weight = torch.randn(5, 65)
    compiled = torch.compile(lambda weight: prune_to_csr(weight, 0.5), fullgraph=True, backend="aot_eager")
    assert_same(compiled(weight), reference(weight, 0.5))


def test_gradient_is_refused():
    values = prune_to_csr(torch.randn(3, 5, requires_grad=True), 0.1)[2]
    with pytest.raises(RuntimeError, match="prune_to_csr has no gradient"):
        values.sum().backward()


def test_errors():
    with pytest.raises(TypeError, match=r"prune_to_csr: weight: expected a float32.*got torch.float64"):
        prune_to_csr(torch.randn(3, 4, dtype=torch.float64), 0.1)
    with pytest.raises(ValueError, match=r"prune_to_csr: weight: expected shape \[N, K\], got \[3\]"):
        prune_to_csr(torch.randn(3), 0.1)
    for shape in ((3,), (2, 1), (1, 3, 4), (4, 3)):
        with pytest.raises(ValueError, match=r"prune_to_csr: threshold: .*got"):
            prune_to_csr(torch.randn(3, 4), torch.rand(shape))
        with pytest.raises((RuntimeError, ValueError), match="prune_to_csr: threshold"):
            torch.ops.engine.prune_to_csr(torch.randn(3, 4), torch.rand(shape))
    with pytest.raises((RuntimeError, TypeError), match="prune_to_csr: threshold"):
        torch.ops.engine.prune_to_csr(torch.randn(3, 4), torch.rand(4, dtype=torch.float64))

"""csr_linear: long rows, index dtypes, indices that lie; what all such ops must do is in test_float_linears.py."""

import pytest
import torch
import torch.nn.functional as F
from shapes import LINEARS
from stored import FORMS
from tolerance import assert_as_good_as_torch

from engine.ops._check import FLOAT_DTYPES
from engine.ops.csr_linear import csr_linear

INDEX_DTYPES = (torch.int32, torch.int64)
store, restore, _ = FORMS["csr"]


def random_csr(n, k, dtype=torch.float32):
    """Rows of any density, all kept and none kept among them."""
    kept = torch.tensor([0.0, 0.02, 0.05, 0.3, 1.0])[torch.randint(0, 5, (n, 1))]
    return store(torch.randn(n, k).to(dtype), torch.rand(n, k) < kept)


def dense_of(weight, k):
    return restore(*weight, weight[0].shape[0] - 1, k)


def assert_right(x, weight, bias=None):
    dense = dense_of(weight, x.shape[-1])
    truth = F.linear(x.double(), dense.double(), None if bias is None else bias.double())
    own = F.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    assert_as_good_as_torch(csr_linear(x, *weight, bias), truth, own)


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_sparse_rows_and_index_dtypes(variant, shape, index_dtype):
    m, n, k = shape
    for dtype, bias in zip(FLOAT_DTYPES, (None, torch.randn(n), torch.randn(n).half()), strict=True):
        crow_indices, col_indices, values = random_csr(n, k, dtype)
        assert_right(torch.randn(m, k), (crow_indices.to(index_dtype), col_indices.to(index_dtype), values), bias)


# Long rows, where too few partial sums lose more than PyTorch does.
@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("k", [4096, 16384])
def test_long_rows(variant, m, k):
    for density in (0.05, 1.0):
        assert_right(torch.randn(m, k), store(torch.randn(64, k), torch.rand(64, k) < density))


# Small integers, so that every sum is exact: every number of rows and of values a row has its tails.
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_rows_of_every_length(variant, dtype):
    n, k = 70, 90
    keep = torch.arange(k).expand(n, k) < torch.arange(n)[:, None]  # row r holds r values
    weight = store(torch.randint(-128, 128, (n, k)).to(dtype), keep[:, torch.randperm(k)])
    x = torch.randint(-8, 9, (50, k)).float()
    want = x @ dense_of(weight, k).float().t()
    for m in range(51):
        assert torch.equal(csr_linear(x[:m], *weight), want[:m])
        assert torch.equal(csr_linear(x[:m].to(dtype), *weight), want[:m].to(dtype))


def test_columns_in_any_order_and_twice(variant):
    crow_indices, col_indices = torch.tensor([0, 4, 4, 7]), torch.tensor([3, 0, 3, 1, 2, 2, 2])
    weight = (crow_indices, col_indices, torch.arange(1.0, 8.0))
    for m in (1, 5):
        x = torch.randint(-8, 9, (m, 5)).float()
        assert torch.equal(csr_linear(x, *weight), x @ dense_of(weight, 5).t())


def test_no_values_give_the_bias(variant):
    bias = torch.randn(7)
    for k in (0, 9):
        for m in (1, 2, 30):
            empty = torch.zeros(8, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0)
            assert torch.equal(csr_linear(torch.randn(m, k), *empty, bias), bias.expand(m, 7))


def test_gradients_go_through_many_blocks(monkeypatch):
    monkeypatch.setattr("engine.ops._csr.DENSE_AT_ONCE", 100)
    x, (crow_indices, col_indices, values) = torch.randn(3, 40, requires_grad=True), random_csr(23, 40)
    values.requires_grad_()
    csr_linear(x, crow_indices, col_indices, values).square().sum().backward()
    dense = dense_of((crow_indices, col_indices, values.detach().double()), 40)
    grad = 2 * x.detach().double() @ dense.t()
    rows = torch.arange(23).repeat_interleave(crow_indices.diff())
    torch.testing.assert_close(x.grad, (grad @ dense).float(), rtol=1e-4, atol=1e-4)
    want = (grad.t() @ x.detach().double())[rows, col_indices.long()]
    torch.testing.assert_close(values.grad, want.float(), rtol=1e-4, atol=1e-4)


def damaged():
    """Indices of a weight [3, 50] with 40 values, by what is said of each."""
    crow = torch.tensor([0, 10, 30, 40])
    columns = torch.arange(40)

    def changed(t, at, value):
        t = t.clone()
        t[at] = value
        return t

    far = [changed(columns, at, bad) for at in (0, 9, 17, 39) for bad in (50, 2**31 - 1, -1, -(2**31))]
    return {
        "crow_indices": [
            (changed(crow, 0, 1), columns),
            (changed(crow, 3, 39), columns),
            (changed(crow, 3, 41), columns),
            (changed(crow, 1, 31), columns),
            (changed(crow, 1, -5), columns),
            (changed(crow, 2, 2**31 - 1), columns),
        ],
        "col_indices": [(crow, t) for t in far],
    }


@pytest.mark.parametrize("argument", damaged())
@pytest.mark.parametrize("m", [1, 2, 20])
def test_damaged_indices_are_refused(variant, m, argument):
    x, values = torch.randn(m, 50), torch.randn(40)
    for crow_indices, col_indices in damaged()[argument]:
        for index_dtype in INDEX_DTYPES:
            weight = crow_indices.to(index_dtype), col_indices.to(index_dtype), values
            with pytest.raises(ValueError, match=rf"csr_linear: {argument}: expected"):
                csr_linear(x, *weight)
            with pytest.raises(RuntimeError, match=argument):
                torch.ops.engine.csr_linear(x, *weight)
    wide = torch.arange(40)
    wide[20] += 2**32  # within range were it cut to 32 bits
    with pytest.raises(ValueError, match=r"csr_linear: col_indices"):
        csr_linear(x, torch.tensor([0, 10, 30, 40]), wide, values)


def test_errors():
    x, (crow_indices, col_indices, values) = torch.randn(3, 4), random_csr(6, 4)
    with pytest.raises(TypeError, match=r"csr_linear: x: expected a float32.*got torch.float64"):
        csr_linear(x.double(), crow_indices, col_indices, values)
    with pytest.raises(TypeError, match=r"csr_linear: values: expected a float32.*got torch.int8"):
        csr_linear(x, crow_indices, col_indices, values.to(torch.int8))
    with pytest.raises(TypeError, match=r"csr_linear: col_indices: expected a int32 tensor, got torch.int64"):
        csr_linear(x, crow_indices, col_indices.long(), values)
    with pytest.raises(TypeError, match=r"csr_linear: crow_indices: expected a int32 or int64 tensor"):
        csr_linear(x, crow_indices.float(), col_indices, values)
    with pytest.raises(ValueError, match=r"csr_linear: x: "):
        csr_linear(torch.tensor(1.0), crow_indices, col_indices, values)
    with pytest.raises(ValueError, match=r"csr_linear: col_indices: expected shape"):
        csr_linear(x, crow_indices, torch.cat([col_indices, col_indices[:1]]), values)
    with pytest.raises(ValueError, match=r"csr_linear: crow_indices: "):
        csr_linear(x, crow_indices[:0], col_indices[:0], values[:0])
    with pytest.raises(ValueError, match=r"csr_linear: bias: expected shape \[6\], got \[5\]"):
        csr_linear(x, crow_indices, col_indices, values, torch.randn(5))
    with pytest.raises(TypeError, match=r"csr_linear: bias: "):
        csr_linear(x, crow_indices, col_indices, values, torch.arange(6))
    for wrong in ((x, crow_indices, col_indices.long(), values), (x, crow_indices, col_indices, values[:0])):
        with pytest.raises(RuntimeError):
            torch.ops.engine.csr_linear(*wrong)


def test_to_dense_is_an_op_with_a_gradient():
    crow_indices, col_indices, values = random_csr(20, 33, torch.float16)
    to_dense, values = torch.ops.engine.csr_to_dense, values.requires_grad_()
    torch.library.opcheck(to_dense.default, (crow_indices, col_indices, values, 33))
    grad = torch.randn(20, 33)
    to_dense(crow_indices, col_indices, values, 33).backward(grad)
    rows = torch.arange(20).repeat_interleave(crow_indices.diff())
    assert torch.equal(values.grad, grad[rows, col_indices].half())
    with pytest.raises(ValueError, match=r"ops\.csr_to_dense: col_indices"):
        to_dense(crow_indices, col_indices, values, 1)

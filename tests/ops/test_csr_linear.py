"""csr_linear: reference and native against float64, edges, gradients, damaged indices, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import LINEARS
from tolerance import assert_as_good_as_torch

import engine
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.csr_linear import csr_linear

reference = REFERENCES["csr_linear"]
INDEX_DTYPES = (torch.int32, torch.int64)


def csr_of(dense, mask, index_dtype=torch.int32):
    crow_indices = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return crow_indices.to(index_dtype), mask.nonzero()[:, 1].to(index_dtype), dense[mask]


def random_csr(n, k, dtype=torch.float32, index_dtype=torch.int32):
    """Rows of any density, all kept and none kept among them."""
    kept = torch.tensor([0.0, 0.02, 0.05, 0.3, 1.0])[torch.randint(0, 5, (n, 1))]
    return csr_of(torch.randn(n, k).to(dtype), torch.rand(n, k) < kept, index_dtype)


def dense_of(crow_indices, col_indices, values, k):
    rows = torch.arange(crow_indices.shape[0] - 1).repeat_interleave(crow_indices.diff())
    dense = torch.zeros(crow_indices.shape[0] - 1, k, dtype=torch.float64)
    return dense.index_put((rows, col_indices.long()), values.double(), accumulate=True)


def truth_of(x, crow_indices, col_indices, values, bias=None):
    """The result in float64, and PyTorch's own in the dtype of x."""
    dense = dense_of(crow_indices, col_indices, values, x.shape[-1])
    y = x.double() @ dense.t() + (0 if bias is None else bias.double())
    own = torch.nn.functional.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return torch.where(x.isfinite().all(-1, keepdim=True), y, torch.nan), own


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_matches_float64(dtype):
    x, weight, bias = torch.randn(20, 300).to(dtype), random_csr(40, 300), torch.randn(40)
    assert_as_good_as_torch(reference(x, *weight, bias), *truth_of(x, *weight, bias))


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_native_is_as_good_as_torch(variant, shape, index_dtype):
    m, n, k = shape
    for dtype, bias in zip(FLOAT_DTYPES, (None, torch.randn(n), torch.randn(n).half()), strict=True):
        for values_dtype in FLOAT_DTYPES:
            weight = random_csr(n, k, values_dtype, index_dtype)
            x = torch.randn(m, k).to(dtype)
            assert_as_good_as_torch(csr_linear(x, *weight, bias), *truth_of(x, *weight, bias))


# Long rows, where too few partial sums lose more than PyTorch does.
@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("k", [4096, 16384])
def test_long_rows(variant, m, k):
    for density in (0.05, 1.0):
        weight = csr_of(torch.randn(64, k), torch.rand(64, k) < density)
        x = torch.randn(m, k)
        assert_as_good_as_torch(csr_linear(x, *weight), *truth_of(x, *weight))


# Small integers, so that every sum is exact: every number of rows and of values a row has its tails.
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_tails(variant, dtype):
    n, k = 70, 90
    mask = torch.arange(k).expand(n, k) < torch.arange(n)[:, None]  # row r holds r values
    mask = mask[:, torch.randperm(k)]
    dense = torch.randint(-128, 128, (n, k)).to(dtype)
    x = torch.randint(-8, 9, (50, k)).float()
    want = x @ (dense.float() * mask).t()
    weight = csr_of(dense, mask)
    for m in range(51):
        assert torch.equal(csr_linear(x[:m], *weight), want[:m])
        assert torch.equal(csr_linear(x[:m].to(dtype), *weight), want[:m].to(dtype))


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 40),
    st.integers(0, 60),
    st.integers(0, 300),
    st.sampled_from(FLOAT_DTYPES),
    st.sampled_from(FLOAT_DTYPES),
    st.sampled_from(INDEX_DTYPES),
    st.floats(0, 1),
)
def test_any_shape(m, n, k, dtype, values_dtype, index_dtype, density):
    x = torch.randint(-8, 9, (m, k)).to(dtype)
    weight = csr_of(torch.randint(-128, 128, (n, k)).to(values_dtype), torch.rand(n, k) < density, index_dtype)
    want = reference(x, *weight)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            assert torch.equal(csr_linear(x, *weight), want)


@pytest.mark.parametrize("m", [1, 4, 40])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_rows_that_are_not_numbers_do_not_leak(variant, m, dtype):
    x, mask, bias = torch.randn(m, 300).to(dtype), torch.rand(30, 300) < 0.1, torch.randn(30)
    mask[:, 3] = False  # an infinity that meets no weight
    weight = csr_of(torch.randn(30, 300), mask)
    clean = csr_linear(x, *weight, bias)
    x[0, 3] = -torch.inf
    x[-1, 290] = torch.nan
    y = csr_linear(x, *weight, bias)
    assert y[0].isnan().all() and y[-1].isnan().all()
    assert torch.equal(y[1:-1], clean[1:-1])


@pytest.mark.parametrize("m", [1, 3, 20])
def test_values_that_are_not_numbers_stay_in_their_output(variant, m):
    x, mask = torch.rand(m, 300) + 1, torch.rand(9, 300) < 0.1
    mask[4, :3] = True
    dense = torch.randn(9, 300)
    dense[4, 0], dense[4, 2] = torch.inf, torch.nan
    y = csr_linear(x, *csr_of(dense, mask))
    assert y[:, 4].isnan().all() and y.isfinite().sum() == 8 * m


def test_columns_in_any_order_and_twice(variant):
    crow_indices, col_indices = torch.tensor([0, 4, 4, 7]), torch.tensor([3, 0, 3, 1, 2, 2, 2])
    weight = (crow_indices, col_indices, torch.arange(1.0, 8.0))
    for m in (1, 5):
        x = torch.randint(-8, 9, (m, 5)).float()
        assert torch.equal(csr_linear(x, *weight), (x.double() @ dense_of(*weight, 5).t()).float())


def test_no_values_give_the_bias(variant):
    bias = torch.randn(7)
    for k in (0, 9):
        for m in (1, 2, 30):
            empty = torch.zeros(8, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0)
            assert torch.equal(csr_linear(torch.randn(m, k), *empty, bias), bias.expand(m, 7))


def test_leading_dimensions_and_strides(variant):
    x, weight = torch.randn(3, 40, 2).transpose(1, 2), random_csr(60, 40)
    assert_as_good_as_torch(csr_linear(x, *weight), *truth_of(x, *weight))
    assert csr_linear(x[0, 0], *weight).shape == (60,)
    assert csr_linear(x[:0], *weight).shape == (0, 2, 60)
    spread = [torch.stack([t, torch.zeros_like(t)], -1)[..., 0] for t in weight]
    assert not spread[0].is_contiguous()
    assert_as_good_as_torch(csr_linear(x, *spread), *truth_of(x, *weight))


@pytest.mark.parametrize("m", [1, 3, 100])
def test_threads_give_the_same_bits(variant, m):
    x, weight = torch.randn(m, 2000), random_csr(900, 2000)
    y = csr_linear(x, *weight)
    try:
        torch.set_num_threads(1)
        assert torch.equal(csr_linear(x, *weight), y)
    finally:
        torch.set_num_threads(2)
    assert_as_good_as_torch(y, *truth_of(x, *weight))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gradients(dtype):
    crow_indices, col_indices, values = random_csr(23, 40, dtype)
    x, bias = torch.randn(2, 3, 40).to(dtype).requires_grad_(), torch.randn(23, requires_grad=True)
    values.requires_grad_()
    grad = torch.randn(2, 3, 23).to(dtype)
    csr_linear(x, crow_indices, col_indices, values, bias).backward(grad)

    dense = dense_of(crow_indices, col_indices, values.detach(), 40).requires_grad_()
    x_truth, bias_truth = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    torch.nn.functional.linear(x_truth, dense, bias_truth).backward(grad.double())
    rows = torch.arange(23).repeat_interleave(crow_indices.diff())
    tolerance = {"rtol": 1e-2, "atol": 5e-2} if dtype != torch.float32 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(x.grad.double(), x_truth.grad, **tolerance)
    torch.testing.assert_close(values.grad.double(), dense.grad[rows, col_indices.long()], **tolerance)
    torch.testing.assert_close(bias.grad.double(), bias_truth.grad, rtol=1e-5, atol=1e-4)
    assert x.grad.dtype == dtype and values.grad.dtype == dtype


def test_gradients_go_through_many_blocks(monkeypatch):
    monkeypatch.setattr("engine.ops._csr.BLOCK_ELEMENTS", 100)
    x, (crow_indices, col_indices, values) = torch.randn(3, 40, requires_grad=True), random_csr(23, 40)
    values.requires_grad_()
    csr_linear(x, crow_indices, col_indices, values).square().sum().backward()
    dense = dense_of(crow_indices, col_indices, values.detach(), 40)
    grad = 2 * x.detach().double() @ dense.t()
    rows = torch.arange(23).repeat_interleave(crow_indices.diff())
    torch.testing.assert_close(x.grad, (grad @ dense).float(), rtol=1e-4, atol=1e-4)
    want = (grad.t() @ x.detach().double())[rows, col_indices.long()]
    torch.testing.assert_close(values.grad, want.float(), rtol=1e-4, atol=1e-4)


def test_opcheck():
    crow_indices, col_indices, values = random_csr(7, 21)
    bias = torch.randn(7)
    op = torch.ops.engine.csr_linear.default
    torch.library.opcheck(op, (torch.randn(3, 21), crow_indices, col_indices, values))
    arguments = [t.clone().requires_grad_() for t in (torch.randn(3, 21), values, bias)]
    torch.library.opcheck(op, (arguments[0], crow_indices, col_indices, arguments[1], arguments[2]))


def test_compiles():
    x, (crow_indices, col_indices, values) = torch.randn(5, 65, requires_grad=True), random_csr(9, 65)
    values.requires_grad_()
    compiled = torch.compile(
        lambda x, values: csr_linear(x, crow_indices, col_indices, values), fullgraph=True, backend="aot_eager"
    )
    y = compiled(x, values)
    want = csr_linear(x, crow_indices, col_indices, values)
    assert torch.equal(y, want)
    for got, expected in zip(
        torch.autograd.grad(y.sum(), (x, values)), torch.autograd.grad(want.sum(), (x, values)), strict=True
    ):
        assert torch.equal(got, expected)


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

"""block_linear: as good as PyTorch's own product, edges, gradients, rows that are no numbers."""

import pytest
import torch
import torch.nn.functional as F
from shapes import LINEARS, few_outputs
from tolerance import assert_as_good_as_torch

import engine
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.block_linear import block_linear

reference = REFERENCES["block_linear"]


def weights(n, k, dtype=torch.float32):
    shape = [(16, 16), (32, 32), (48, 80), (128, 64), (16, 256)][torch.randint(5, ())]
    keep = torch.rand(-(-n // shape[0]), -(-k // shape[1])) < 0.6
    return *engine.ops.prune_to_block(torch.randn(n, k).to(dtype), block_shape=shape, keep=keep), n


def dense_of(weight, k):
    return engine.ops.block_to_dense(*weight, k)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_matches_float64(dtype):
    x, weight, bias = torch.randn(20, 300).to(dtype), weights(40, 300, dtype), torch.randn(40).to(dtype)
    dense = dense_of(weight, 300)
    truth = F.linear(x.double(), dense.double(), bias.double())
    assert_as_good_as_torch(reference(x, *weight, bias), truth, F.linear(x, dense, bias))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_native_is_as_good_as_torch(variant, shape, dtype):
    m, n, k = shape
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    for values_dtype in {dtype, torch.bfloat16}:
        weight = weights(n, k, values_dtype)
        dense = dense_of(weight, k).to(dtype)
        for b in (None, bias):
            truth = F.linear(x.double(), dense_of(weight, k).double(), None if b is None else b.double())
            assert_as_good_as_torch(block_linear(x, *weight, b), truth, F.linear(x, dense, b))


def test_sums_of_few_outputs(variant):
    for m, n, k in few_outputs(60):
        x, dense = torch.randn(m, k), torch.randn(n, k)
        weight = engine.ops.prune_to_block(dense, 0.0, [(16, 16), (32, 48), (16, 256)][m % 3])
        assert_as_good_as_torch(block_linear(x, *weight, n), F.linear(x.double(), dense.double()), F.linear(x, dense))


@pytest.mark.parametrize("k", [1, 7, 33, 65, 130, 513])
def test_tails(variant, k):
    weight, x = weights(37, k), torch.randn(11, k)
    truth = F.linear(x.double(), dense_of(weight, k).double())
    for m in range(1, 12):
        torch.testing.assert_close(block_linear(x[:m], *weight).double(), truth[:m], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("m", [4, 12])
def test_rows_that_are_not_numbers_do_not_leak(variant, m):
    x, weight, bias = torch.randn(m, 100), weights(30, 100), torch.randn(30)
    clean = block_linear(x, *weight, bias)
    x[1, 50], x[2, 3] = torch.nan, -torch.inf
    y = block_linear(x, *weight, bias)
    assert y[1:3].isnan().all() and torch.equal(y[0], clean[0]) and torch.equal(y[3:], clean[3:])


def test_leading_dimensions_strides_and_threads(variant):
    x, weight = torch.randn(3, 400, 2).transpose(1, 2), weights(600, 400)
    want = block_linear(x.contiguous(), *weight)
    assert torch.equal(block_linear(x, *weight), want)
    assert block_linear(x[0, 0], *weight).shape == (600,) and block_linear(x[:0], *weight).shape == (0, 2, 600)
    try:
        torch.set_num_threads(1)
        assert torch.equal(block_linear(x, *weight), want)
    finally:
        torch.set_num_threads(2)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gradients(dtype):
    weight = list(weights(20, 30, dtype))
    weight[2] = weight[2].requires_grad_()
    x, bias = torch.randn(2, 5, 30).to(dtype).requires_grad_(), torch.randn(20, requires_grad=True)
    grad = torch.randn(2, 5, 20).to(dtype)
    block_linear(x, *weight, bias).backward(grad)
    dense = dense_of(weight, 30)
    wanted = torch.autograd.grad(
        dense, weight[2], (grad.reshape(10, 20).float().t() @ x.reshape(10, 30).float()).to(dtype)
    )
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-4 if dtype == torch.float32 else 2e-2}
    torch.testing.assert_close(x.grad, (grad.float() @ dense.float()).to(dtype), **close)
    torch.testing.assert_close(weight[2].grad, wanted[0], **close)
    torch.testing.assert_close(bias.grad, grad.float().sum((0, 1)))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_and_compile(grad):
    weight = list(weights(4, 24))
    weight[2] = weight[2].requires_grad_(grad)
    x, bias = torch.randn(3, 24, requires_grad=grad), torch.randn(4, requires_grad=grad)
    for arguments in ((x, *weight), (x, *weight, bias)):
        torch.library.opcheck(torch.ops.engine.block_linear.default, arguments)
    compiled = torch.compile(lambda x: block_linear(x, *weight, bias), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block_linear(x, *weight, bias))


def test_errors():
    x, weight = torch.randn(3, 24), weights(5, 24)
    with pytest.raises(TypeError, match="x: expected a float32"):
        block_linear(x.double(), *weight)
    with pytest.raises(ValueError, match="x: expected shape"):
        block_linear(torch.tensor(1.0), *weight)
    with pytest.raises(ValueError, match="bias: expected shape"):
        block_linear(x, *weight, torch.randn(3))


def test_what_lies_beyond_the_matrix_does_not_count(variant):
    keep = torch.ones(2, 3, dtype=torch.bool)
    crow, col, values = engine.ops.prune_to_block(torch.randn(40, 70), keep=keep)
    x = torch.randn(20, 70)
    want = block_linear(x, crow, col, values, 40)
    values = values.clone()
    values[2::3, :, 6:], values[3:, 8:] = torch.nan, torch.inf
    assert torch.equal(block_linear(x, crow, col, values, 40), want)

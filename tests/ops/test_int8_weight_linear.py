"""int8_weight_linear: reference and native against float64, edges, gradients, errors."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import LINEARS, few_outputs
from tolerance import assert_as_good_as_torch

import engine
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES, reference_mode
from engine.ops.int8_weight_linear import int8_weight_linear

reference = REFERENCES["int8_weight_linear"]


def weights(n, k):
    return torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n) / 100 + 1e-3


def truth_of(x, weight, scale, bias=None):
    """The result in float64, and PyTorch's own in the dtype of x."""
    dense = weight.double() * scale.double().unsqueeze(-1)
    y = x.double() @ dense.t() + (0 if bias is None else bias.double())
    own = torch.nn.functional.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return torch.where(x.isfinite().all(-1, keepdim=True), y, torch.nan), own


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_matches_float64(dtype):
    x, (weight, scale), bias = torch.randn(20, 300).to(dtype), weights(40, 300), torch.randn(40)
    assert_as_good_as_torch(reference(x, weight, scale, bias), *truth_of(x, weight, scale, bias))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_native_is_as_good_as_torch(variant, shape, dtype):
    m, n, k = shape
    x, (weight, scale) = torch.randn(m, k).to(dtype), weights(n, k)
    for bias in (None, torch.randn(n), torch.randn(n).bfloat16(), torch.randn(n).half()):
        assert_as_good_as_torch(int8_weight_linear(x, weight, scale, bias), *truth_of(x, weight, scale, bias))


def test_sums_of_few_outputs(variant):
    for m, n, k in few_outputs(60):
        x, (weight, scale) = torch.randn(m, k), weights(n, k)
        assert_as_good_as_torch(int8_weight_linear(x, weight, scale), *truth_of(x, weight, scale))


# Small integers, so that every sum is exact: each tile of every kernel with each tail, on one and on several
# stretches of K.
@pytest.mark.parametrize("k", [1, 7, 8, 15, 33, 255, 256, 257, 600])
def test_tails(variant, k):
    weight, scale = torch.randint(-128, 128, (115, k), dtype=torch.int8), torch.ones(115)
    x = torch.randint(-8, 9, (35, k)).float()
    want = x @ weight.float().t()
    for m in (*range(1, 10), 15, 16, 17, 24, 25, 31, 32, 33, 35):
        assert torch.equal(int8_weight_linear(x[:m], weight, scale), want[:m])
    for n in (*range(1, 17), 28, 29, 95, 96, 97, 98, 99):
        for m in (1, 2, 20):
            assert torch.equal(int8_weight_linear(x[:m], weight[:n], scale[:n]), want[:m, :n])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 40), st.integers(0, 140), st.integers(0, 700), st.sampled_from(FLOAT_DTYPES), st.booleans())
def test_any_shape(m, n, k, dtype, has_bias):
    x, weight = torch.randint(-8, 9, (m, k)).to(dtype), torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale, bias = torch.full((n,), 2.0**-5), torch.randint(-9, 9, (n,)).float() if has_bias else None
    want = reference(x, weight, scale, bias)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            assert torch.equal(int8_weight_linear(x, weight, scale, bias), want)


@pytest.mark.parametrize("m", [4, 40])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_rows_that_are_not_numbers_do_not_leak(variant, m, dtype):
    x, (weight, scale), bias = torch.randn(m, 300).to(dtype), weights(30, 300), torch.randn(30)
    weight[:, 3] = 0  # infinity by 0 alone would not show
    clean = int8_weight_linear(x, weight, scale, bias)
    x[1, 290], x[2, 3] = torch.nan, -torch.inf
    y = int8_weight_linear(x, weight, scale, bias)
    assert y[1:3].isnan().all()
    assert torch.equal(y[0], clean[0]) and torch.equal(y[3:], clean[3:])


def test_large_finite_values_are_no_infinities(variant):
    x, weight = torch.full((20, 40), 6e4).half(), torch.ones(3, 40, dtype=torch.int8)
    assert (int8_weight_linear(x, weight, torch.full((3,), 1e-2)) == 24000).all()
    assert (int8_weight_linear(x, weight, torch.ones(3)) == torch.inf).all()


def test_no_inputs_give_the_bias(variant):
    bias = torch.randn(7)
    for m in (2, 30):
        y = int8_weight_linear(torch.empty(m, 0), torch.empty(7, 0, dtype=torch.int8), torch.ones(7), bias)
        assert torch.equal(y, bias.expand(m, 7))


def test_leading_dimensions_and_strides(variant):
    x, (weight, scale) = torch.randn(3, 40, 2).transpose(1, 2), weights(60, 40)
    assert_as_good_as_torch(int8_weight_linear(x, weight, scale), *truth_of(x, weight, scale))
    assert int8_weight_linear(x[0, 0], weight, scale).shape == (60,)
    assert int8_weight_linear(x[:0], weight, scale).shape == (0, 2, 60)
    thin = torch.rand(60, 2)
    arguments = (x[..., ::2], weight[:, ::2], thin[:, 0], thin[:, 1])
    assert_as_good_as_torch(int8_weight_linear(*arguments), *truth_of(*arguments))


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 100, 700])
def test_threads_give_the_same_bits(variant, m):
    x, (weight, scale) = torch.randn(m, 500), weights(253, 500)
    y = int8_weight_linear(x, weight, scale)
    try:
        torch.set_num_threads(1)
        assert torch.equal(int8_weight_linear(x, weight, scale), y)
    finally:
        torch.set_num_threads(2)
    assert_as_good_as_torch(y, *truth_of(x, weight, scale))


def test_few_outputs_are_cut_along_the_rows(variant):
    x, (weight, scale) = torch.randn(600, 700), weights(5, 700)
    assert_as_good_as_torch(int8_weight_linear(x, weight, scale), *truth_of(x, weight, scale))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gradients_are_those_of_the_dense_formula(dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["engine.ops.int8_weight_linear"], "DENSE_AT_ONCE", 7 * 30)  # several blocks
    x, (weight, scale) = torch.randn(2, 5, 30).to(dtype).requires_grad_(), weights(20, 30)
    bias, grad = torch.randn(20).to(dtype).requires_grad_(), torch.randn(2, 5, 20).to(dtype)
    int8_weight_linear(x, weight, scale, bias).backward(grad)
    dense = weight.double() * scale.double().unsqueeze(-1)
    assert_as_good_as_torch(x.grad, grad.double() @ dense, grad @ dense.to(dtype))
    assert_as_good_as_torch(bias.grad, grad.double().sum((0, 1)), grad.sum((0, 1)))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x, (weight, scale) = torch.randn(3, 5, requires_grad=grad), weights(4, 5)
    bias = torch.randn(4, requires_grad=grad)
    torch.library.opcheck(torch.ops.engine.int8_weight_linear.default, (x, weight, scale))
    torch.library.opcheck(torch.ops.engine.int8_weight_linear.default, (x, weight, scale, bias))
    backward = torch.ops.engine.int8_weight_linear_backward_input.default
    torch.library.opcheck(backward, (torch.randn(2, 3, 4), weight, scale))


def test_compiles_with_its_gradient():
    x, (weight, scale), bias = torch.randn(3, 65, requires_grad=True), weights(10, 65), torch.randn(10)
    compiled = torch.compile(lambda x: int8_weight_linear(x, weight, scale, bias), fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, int8_weight_linear(x, weight, scale, bias))
    y.sum().backward()
    torch.testing.assert_close(x.grad, (weight * scale.unsqueeze(-1)).sum(0).expand(3, 65))


def test_reference_mode():
    x, (weight, scale) = torch.randn(3, 65), weights(10, 65)
    with reference_mode():
        assert torch.equal(int8_weight_linear(x, weight, scale), reference(x, weight, scale))


def test_errors():
    x, (weight, scale), bias = torch.randn(3, 5), weights(4, 5), torch.randn(4)
    wrong = {
        r"x: expected a float32.*got torch.float64": (TypeError, (x.double(), weight, scale)),
        r"x: expected shape \[\.\.\., 5\], got \[3, 4\]": (ValueError, (x[:, 1:], weight, scale)),
        r"x: expected shape \[\.\.\., 5\], got \[\]": (ValueError, (torch.tensor(1.0), weight, scale)),
        r"weight: expected a int8 tensor, got torch.uint8": (TypeError, (x, weight.to(torch.uint8), scale)),
        r"weight: expected shape \[N, K\], got \[5\]": (ValueError, (x, weight[0], scale)),
        r"scale: expected a float32 tensor, got torch.float16": (TypeError, (x, weight, scale.half())),
        r"scale: expected shape \[4\], got \[3\]": (ValueError, (x, weight, scale[1:])),
        r"bias: expected a float32.*got torch.int64": (TypeError, (x, weight, scale, bias.long())),
        r"bias: expected shape \[4\], got \[5\]": (ValueError, (x, weight, scale, torch.randn(5))),
    }
    for message, (error, arguments) in wrong.items():
        with pytest.raises(error, match="int8_weight_linear: " + message):
            int8_weight_linear(*arguments)

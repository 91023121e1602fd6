"""semi_structured_int8_linear: to the bit what int8_linear makes of the dense weight, edges, gradients, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import LINEARS

import engine
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.semi_structured_int8_linear import semi_structured_int8_linear

reference = REFERENCES["semi_structured_int8_linear"]


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def activations(*shape):
    x = torch.randn(shape)
    return torch.where(torch.rand(*shape[:-1], 1) < 0.3, x.sign() * 3, x)  # rows of only -127 and 127, too


def int8_values(shape):
    """Every int8 value, the extremes often."""
    values = torch.randint(-128, 128, shape, dtype=torch.int8)
    extreme = torch.tensor([-128, 127], dtype=torch.int8)[torch.randint(0, 2, values.shape)]
    return torch.where(torch.rand(values.shape) < 0.2, extreme, values)


def weights(n, k):
    packed, metadata = engine.ops.prune_to_semi_structured(torch.randn(n, k))
    # Zeros stay: beyond column K there are some.
    return torch.where(packed == 0, 0, int8_values(packed.shape)), metadata, torch.rand(n) / 100 + 1e-3


def dense_of(weight, k):
    return engine.ops.semi_structured_to_dense(weight[0], weight[1], k)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_native_is_reference_to_the_bit(variant, shape, dtype):
    m, n, k = shape
    x, weight = activations(m, k).to(dtype), weights(n, k)
    for bias in (None, torch.randn(n), torch.randn(n).bfloat16()):
        assert_same(semi_structured_int8_linear(x, *weight, bias), reference(x, *weight, bias))
    input_scale = torch.tensor(0.02)
    assert_same(semi_structured_int8_linear(x, *weight, bias, input_scale), reference(x, *weight, bias, input_scale))


# Each row tile of every kernel with each tail, on one and on several stretches of K.
@pytest.mark.parametrize("k", [1, 63, 65, 127, 129, 385, 1030])
def test_tails(variant, k):
    weight, x = weights(37, k), activations(19, k)
    want = reference(x, *weight)
    for m in (1, 2, 3, 4, 5, 6, 16, 17, 19):
        assert_same(semi_structured_int8_linear(x[:m], *weight), want[:m])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 20), st.integers(0, 70), st.integers(0, 700), st.sampled_from(FLOAT_DTYPES))
def test_any_shape(m, n, k, dtype):
    x, weight = activations(m, k).to(dtype), weights(n, k)
    want = reference(x, *weight)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            assert_same(semi_structured_int8_linear(x, *weight), want)


@pytest.mark.parametrize("m", [1, 3, 20])
def test_sums_beyond_int32_are_exact(variant, m):
    k = 140000
    weight = weights(5, k)
    weight[0].fill_(-128)
    x = torch.ones(m, k)
    assert_same(semi_structured_int8_linear(x, *weight), reference(x, *weight))
    assert_same(semi_structured_int8_linear(-x, *weight), -semi_structured_int8_linear(x, *weight))


@pytest.mark.parametrize("m", [4, 10, 40])
@pytest.mark.parametrize("input_scale", [None, 0.05])
def test_rows_that_are_not_numbers_do_not_leak(variant, m, input_scale):
    x, weight, bias = torch.randn(m, 100), weights(30, 100), torch.randn(30)
    clean = semi_structured_int8_linear(x, *weight, bias, input_scale)
    x[1, 50], x[2, 3] = torch.nan, -torch.inf
    y = semi_structured_int8_linear(x, *weight, bias, input_scale)
    assert y[1:3].isnan().all()
    assert_same(y[0], clean[0])
    assert_same(y[3:], clean[3:])


def test_leading_dimensions_strides_and_threads(variant):
    x, weight = torch.randn(3, 400, 2).transpose(1, 2), weights(600, 400)
    want = reference(x, *weight)
    assert_same(semi_structured_int8_linear(x, *weight), want)
    assert semi_structured_int8_linear(x[0, 0], *weight).shape == (600,)
    assert semi_structured_int8_linear(x[:0], *weight).shape == (0, 2, 600)
    spread = tuple(t.repeat_interleave(2, 0)[::2] for t in weight)
    assert_same(semi_structured_int8_linear(x, *spread), want)
    try:
        torch.set_num_threads(1)
        assert_same(semi_structured_int8_linear(x, *weight), want)
    finally:
        torch.set_num_threads(2)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gradient_goes_straight_through(dtype):
    x, weight = torch.randn(2, 5, 30).to(dtype).requires_grad_(), weights(20, 30)
    bias = torch.randn(20, requires_grad=True)
    grad = torch.randn(2, 5, 20).to(dtype)
    semi_structured_int8_linear(x, *weight, bias).backward(grad)
    assert_same(x.grad, (grad.float() @ (dense_of(weight, 30) * weight[-1].unsqueeze(-1))).to(dtype))
    torch.testing.assert_close(bias.grad, grad.float().sum((0, 1)))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x, weight = torch.randn(3, 21, requires_grad=grad), weights(4, 21)
    bias = torch.randn(4, requires_grad=grad)
    for arguments in ((x, *weight), (x, *weight, bias, torch.tensor(0.02))):
        torch.library.opcheck(torch.ops.engine.semi_structured_int8_linear.default, arguments)


def test_compiles():
    x, weight, bias = torch.randn(3, 65), weights(10, 65), torch.randn(10)
    compiled = torch.compile(
        lambda x: semi_structured_int8_linear(x, *weight, bias, 0.02), fullgraph=True, backend="aot_eager"
    )
    assert_same(compiled(x), semi_structured_int8_linear(x, *weight, bias, 0.02))


def test_equals_int8_linear_of_the_dense_weight():
    x, weight = activations(9, 130), weights(33, 130)
    assert_same(semi_structured_int8_linear(x, *weight), engine.ops.int8_linear(x, dense_of(weight, 130), weight[-1]))


def test_errors():
    x, (values, metadata, scale) = torch.randn(3, 14), weights(5, 14)
    for arguments, error, message in (
        ((x.double(), values, metadata, scale), TypeError, "x: expected a float32"),
        ((x[:, :9], values, metadata, scale), ValueError, r"values: expected shape \[N, 6\]"),
        ((x, values.float(), metadata, scale), TypeError, "values: expected a int8"),
        ((x, values, metadata[:, :1], scale), ValueError, "metadata: expected shape"),
        ((x, values, metadata[:2], scale), ValueError, "metadata: expected shape"),
        ((x, values, metadata, scale[:2]), ValueError, "scale: expected shape"),
        ((x, values, metadata, scale, torch.randn(3)), ValueError, "bias: expected shape"),
    ):
        with pytest.raises(error, match=message):
            semi_structured_int8_linear(*arguments)


def test_metadata_that_lies_stays_within_bounds(variant):
    values, metadata, scale = weights(9, 200)
    for m in (1, 5, 20):  # whatever it gives: AddressSanitizer looks on
        assert (
            semi_structured_int8_linear(torch.randn(m, 200), values, torch.full_like(metadata, 255), scale)
            .isfinite()
            .all()
        )

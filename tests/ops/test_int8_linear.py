"""int8_linear: reference against exact integers, native against reference to the bit, edges, gradients, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import LINEARS

import engine
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES, reference_mode
from engine.ops.int8_linear import int8_linear
from engine.ops.int8_quantize import int8_quantize

reference = REFERENCES["int8_linear"]


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def weights(n, k):
    """Every int8 value, the extremes often: their products and sums are where arithmetic may saturate."""
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    extreme = torch.tensor([-128, 127], dtype=torch.int8)[torch.randint(0, 2, (n, k))]
    return torch.where(torch.rand(n, 1) < 0.3, extreme, weight), torch.rand(n) / 100 + 1e-3


def activations(*shape):
    x = torch.randn(shape)
    return torch.where(torch.rand(*shape[:-1], 1) < 0.3, x.sign() * 3, x)  # rows of only -127 and 127, too


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_matches_float64(dtype):
    x, (weight, scale), bias = activations(20, 300).to(dtype), weights(40, 300), torch.randn(40)
    q, row_scale = engine.ops.int8_quantize(x)
    truth = q.double() @ weight.double().t() * row_scale.double().unsqueeze(-1) * scale.double() + bias.double()
    magnitude = (q.double().abs() @ weight.double().abs().t()) * row_scale.double().unsqueeze(-1) * scale.double()
    error = (reference(x, weight, scale, bias).double() - truth).abs()
    assert (error <= torch.finfo(dtype).eps * truth.abs() + 2e-7 * (magnitude + bias.abs())).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_native_is_reference_to_the_bit(variant, shape, dtype):
    m, n, k = shape
    x, (weight, scale) = activations(m, k).to(dtype), weights(n, k)
    for bias in (None, torch.randn(n), torch.randn(n).bfloat16(), torch.randn(n).half()):
        assert_same(int8_linear(x, weight, scale, bias), reference(x, weight, scale, bias))
    input_scale = torch.tensor(0.02)
    assert_same(int8_linear(x, weight, scale, bias, input_scale), reference(x, weight, scale, bias, input_scale))
    assert_same(int8_linear(x, weight, scale, None, 0.02), reference(x, weight, scale, None, input_scale))
    channels = torch.rand(k) * 0.04 + 1e-3
    assert_same(int8_linear(x, weight, scale, bias, channels), reference(x, weight, scale, bias, channels))


# Each row tile of every kernel with each tail, on one and on several stretches of K.
@pytest.mark.parametrize("k", [1, 15, 16, 63, 64, 383, 384, 385, 800])
def test_tails(variant, k):
    weight, scale = weights(67, k)
    x = activations(31, k)
    want = reference(x, weight, scale)
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 18, 19, 20, 21, 22, 23, 31):
        assert_same(int8_linear(x[:m], weight, scale), want[:m])
    for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 32, 33, 40, 48, 49, 56, 57, 64, 65):
        for m in (2, 20, 26):
            assert_same(int8_linear(x[:m], weight[:n], scale[:n]), want[:m, :n])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 40), st.integers(0, 140), st.integers(0, 900), st.sampled_from(FLOAT_DTYPES), st.booleans())
def test_any_shape(m, n, k, dtype, has_bias):
    x, (weight, scale) = activations(m, k).to(dtype), weights(n, k)
    bias = torch.randn(n) if has_bias else None
    want = reference(x, weight, scale, bias)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            assert_same(int8_linear(x, weight, scale, bias), want)


@pytest.mark.parametrize("m", [1, 3, 6, 20, 26])
@pytest.mark.parametrize("k", [32640, 66400, 133000])
def test_sums_beyond_int32_are_exact(variant, m, k):
    x, weight, scale = torch.ones(m, k), torch.full((5, k), -128, dtype=torch.int8), torch.full((5,), 2.0**-7)
    weight[1], weight[2], weight[3, ::2] = 127, 1, 127
    want = reference(x, weight, scale)
    assert_same(int8_linear(x, weight, scale), want)
    assert want[0, 0] == torch.tensor(-127.0 * 128 * k) * (torch.tensor(1.0) / 127 * 2.0**-7)
    assert_same(int8_linear(-x, weight, scale), -want)


@pytest.mark.parametrize("m", [4, 40])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("input_scale", [None, 0.05, torch.linspace(0.01, 0.1, 100)], ids=["own", "one", "channels"])
def test_rows_that_are_not_numbers_do_not_leak(variant, m, dtype, input_scale):
    x, (weight, scale), bias = torch.randn(m, 100).to(dtype), weights(30, 100), torch.randn(30)
    clean = int8_linear(x, weight, scale, bias, input_scale)
    x[1, 50], x[2, 3] = torch.nan, -torch.inf
    y = int8_linear(x, weight, scale, bias, input_scale)
    assert y[1:3].isnan().all()
    assert_same(y[0], clean[0])
    assert_same(y[3:], clean[3:])


@pytest.mark.parametrize("input_scale", [0.0, -0.1, torch.nan, torch.inf, 1e-45, 3e38, 1e-30])
def test_input_scales_at_the_edge(variant, input_scale):
    x, (weight, scale) = torch.randn(3, 20), weights(6, 20)
    y = int8_linear(x, weight, scale, None, input_scale)
    assert_same(y, reference(x, weight, scale, None, torch.tensor(input_scale)))
    channels = torch.full((20,), 0.02).index_fill(0, torch.tensor(7), input_scale)  # one of them is enough
    by_channel = int8_linear(x, weight, scale, None, channels)
    assert_same(by_channel, reference(x, weight, scale, None, channels))
    assert by_channel.isnan().all() == y.isnan().all()
    assert y.isnan().all() == (input_scale not in (3e38, 1e-30))


def test_no_inputs_give_the_bias(variant):
    bias = torch.randn(7)
    for m in (2, 30):
        y = int8_linear(torch.empty(m, 0), torch.empty(7, 0, dtype=torch.int8), torch.ones(7), bias)
        assert_same(y, bias.expand(m, 7))


def test_leading_dimensions_and_strides(variant):
    x, (weight, scale) = torch.randn(3, 40, 2).transpose(1, 2), weights(60, 40)
    assert_same(int8_linear(x, weight, scale), reference(x, weight, scale))
    assert int8_linear(x[0, 0], weight, scale).shape == (60,)
    assert int8_linear(x[:0], weight, scale).shape == (0, 2, 60)
    half, thin = weight[:, ::2], torch.rand(60, 2)
    got = int8_linear(x[..., ::2], half, thin[:, 0], thin[:, 1])
    assert_same(got, reference(x[..., ::2], half, thin[:, 0], thin[:, 1]))
    assert_same(int8_linear(x.flip(1), weight, scale), reference(x.flip(1), weight, scale))


# Activations quantised by all threads together, by each for itself, and by each its own rows.
@pytest.mark.parametrize("n", [300, 330])
@pytest.mark.parametrize("m, k", [(8, 500), (100, 500), (300, 500), (300, 200)])
def test_threads_give_the_same_bits(variant, m, n, k):
    x, (weight, scale) = activations(m, k), weights(n, k)
    y = int8_linear(x, weight, scale)
    try:
        torch.set_num_threads(1)
        assert_same(int8_linear(x, weight, scale), y)
    finally:
        torch.set_num_threads(2)
    assert_same(y, reference(x, weight, scale))


def test_activations_beyond_the_second_cache(variant):
    x, (weight, scale) = activations(1450, 300), weights(70, 300)
    assert_same(int8_linear(x, weight, scale), reference(x, weight, scale))


def test_activations_beyond_one_chunk(variant):
    x, (weight, scale) = torch.randn(500, 11000), weights(9, 11000)
    assert_same(int8_linear(x, weight, scale), reference(x, weight, scale))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gradient_goes_straight_through(dtype):
    x, (weight, scale) = torch.randn(2, 5, 30).to(dtype).requires_grad_(), weights(20, 30)
    bias = torch.randn(20, requires_grad=True)
    grad = torch.randn(2, 5, 20).to(dtype)
    int8_linear(x, weight, scale, bias).backward(grad)
    assert_same(x.grad, (grad.float() @ (weight * scale.unsqueeze(-1))).to(dtype))
    torch.testing.assert_close(bias.grad, grad.float().sum((0, 1)))
    assert x.grad.dtype == dtype and bias.grad.dtype == torch.float32


def test_a_scale_for_each_channel():
    """The weight holds what the input is divided by: close to the product of floats, and so is its gradient."""
    x, w = torch.randn(40, 96) * torch.logspace(-0.5, 0.5, 96), torch.randn(24, 96)
    channels = x.abs().amax(0) / 127
    weight, scale = int8_quantize(w * channels)
    want = x.double() @ w.double().t()
    x.requires_grad_()
    twice = torch.stack([channels, channels], 1)[:, 0]  # not contiguous
    y = int8_linear(x, weight, scale, None, twice)
    assert (y - want).norm() < 0.02 * want.norm()
    coming = torch.randn(40, 24)
    y.backward(coming)
    dense = coming @ w
    assert (x.grad - dense).norm() < 0.02 * dense.norm()


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x, (weight, scale) = torch.randn(3, 5, requires_grad=grad), weights(4, 5)
    bias = torch.randn(4, requires_grad=grad)
    scales = torch.tensor(0.02), torch.rand(5) + 0.01
    for arguments in ((x, weight, scale), (x, weight, scale, bias), *((x, weight, scale, bias, s) for s in scales)):
        torch.library.opcheck(torch.ops.engine.int8_linear.default, arguments)


def test_compiles():
    x, (weight, scale), bias = torch.randn(3, 65), weights(10, 65), torch.randn(10)
    for input_scale in (None, 0.02, torch.rand(65) + 0.01):
        compiled = torch.compile(
            lambda x, s=input_scale: int8_linear(x, weight, scale, bias, s), fullgraph=True, backend="aot_eager"
        )
        assert_same(compiled(x), int8_linear(x, weight, scale, bias, input_scale))


def test_compiled_gradient():
    x, (weight, scale) = torch.randn(3, 65, requires_grad=True), weights(10, 65)
    torch.compile(lambda x: int8_linear(x, weight, scale), fullgraph=True, backend="aot_eager")(x).sum().backward()
    torch.testing.assert_close(x.grad, (weight * scale.unsqueeze(-1)).sum(0).expand(3, 65))


def test_reference_mode():
    x, (weight, scale) = torch.randn(3, 65), weights(10, 65)
    with reference_mode():
        assert_same(int8_linear(x, weight, scale), reference(x, weight, scale))


def test_errors():
    x, (weight, scale), bias = torch.randn(3, 5), weights(4, 5), torch.randn(4)
    wrong = {
        r"x: expected a float32.*got torch.float64": (TypeError, (x.double(), weight, scale)),
        r"x: expected shape \[\.\.\., 5\], got \[3, 4\]": (ValueError, (x[:, 1:], weight, scale)),
        r"x: expected at least one dimension, got \[\]": (ValueError, (torch.tensor(1.0), weight, scale)),
        r"weight: expected a int8 tensor, got torch.uint8": (TypeError, (x, weight.to(torch.uint8), scale)),
        r"weight: expected shape \[N, K\], got \[5\]": (ValueError, (x, weight[0], scale)),
        r"scale: expected a float32 tensor, got torch.float16": (TypeError, (x, weight, scale.half())),
        r"scale: expected shape \[4\], got \[3\]": (ValueError, (x, weight, scale[1:])),
        r"bias: expected a float32.*got torch.int64": (TypeError, (x, weight, scale, bias.long())),
        r"bias: expected shape \[4\], got \[5\]": (ValueError, (x, weight, scale, torch.randn(5))),
        r"input_scale: expected one element or shape \[5\], got \[2\]": (
            ValueError,
            (x, weight, scale, bias, torch.ones(2)),
        ),
        r"input_scale: expected a float32 tensor": (TypeError, (x, weight, scale, bias, torch.tensor(1))),
    }
    for message, (error, arguments) in wrong.items():
        with pytest.raises(error, match="int8_linear: " + message):
            int8_linear(*arguments)

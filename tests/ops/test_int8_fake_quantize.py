"""int8_fake_quantize: against quantise and dequantise to the bit, gradients, edges, errors."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import MATRICES

import engine
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.int8_fake_quantize import int8_fake_quantize

reference = REFERENCES["int8_fake_quantize"]


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_is_the_two_steps(dtype):
    x = torch.randn(50, 333).to(dtype)
    q, scale = REFERENCES["int8_quantize"](x)
    assert_same(reference(x), REFERENCES["int8_dequantize"](q, scale, dtype))
    step = x.double().abs().amax(-1, keepdim=True) / 127
    rounding = torch.finfo(dtype).eps * x.double().abs()
    assert ((reference(x).double() - x.double()).abs() <= 0.501 * step + rounding).all()
    got = reference(x, torch.tensor(0.01)).double()
    truth = (x.double() / 0.01).clamp(-127, 127) * 0.01
    assert ((got - truth).abs() <= 0.501 * 0.01 + rounding).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_native_is_reference_to_the_bit(variant, shape, dtype):
    x = (torch.randn(shape) * torch.rand(shape[0], 1).exp()).to(dtype)
    assert_same(int8_fake_quantize(x), reference(x))
    assert_same(int8_fake_quantize(x, 0.013), reference(x, torch.tensor(0.013)))


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(0, 70)), elements=st.floats(width=32)),
    st.none() | st.floats(width=32),
)
def test_any_values(x, scale):
    x, scale = torch.from_numpy(x), None if scale is None else torch.tensor(scale)
    want = reference(x, scale)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            assert_same(int8_fake_quantize(x, scale), want)


@pytest.mark.parametrize("scale", [None, 0.05])
def test_rows_that_are_not_numbers_do_not_leak(variant, scale):
    x = torch.randn(4, 100)
    x[1, 50], x[2, 3] = torch.nan, -torch.inf
    y = int8_fake_quantize(x, scale)
    assert y.isnan().all(-1).tolist() == [False, True, True, False] and y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, -1.0, torch.inf, torch.nan, 1e-45])
def test_a_scale_that_cannot_divide_makes_all_nan(variant, scale):
    assert int8_fake_quantize(torch.randn(3, 5), torch.tensor(scale)).isnan().all()


def test_leading_dimensions_and_strides(variant):
    x = torch.randn(3, 40, 2).transpose(1, 2)
    assert_same(int8_fake_quantize(x), reference(x))
    assert int8_fake_quantize(x[0, 0]).shape == (40,)


def test_the_gradient_is_straight_through(variant):
    x, grad = torch.randn(6, 50, requires_grad=True), torch.randn(6, 50)
    int8_fake_quantize(x).backward(grad)
    assert torch.equal(x.grad, grad)
    x.grad = None
    int8_fake_quantize(x, 0.01).backward(grad)
    assert torch.equal(x.grad, torch.where(x.abs() <= torch.tensor(0.01) * 127, grad, 0.0))


def test_opcheck():
    for scale in (None, torch.tensor(0.02)):
        for requires_grad in (False, True):
            x = torch.randn(3, 5, requires_grad=requires_grad)
            torch.library.opcheck(torch.ops.engine.int8_fake_quantize.default, (x, scale))


def test_compiles():
    x = torch.randn(3, 65, requires_grad=True)
    compiled = torch.compile(lambda x: int8_fake_quantize(x).square().sum(), fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    assert_same(x.grad, 2 * reference(x.detach()))


def test_errors():
    with pytest.raises(TypeError, match=r"int8_fake_quantize: x: expected a float32.*got torch.float64"):
        int8_fake_quantize(torch.randn(3, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"int8_fake_quantize: x: expected a float32.*got NoneType"):
        int8_fake_quantize(None, 0.1)
    with pytest.raises(ValueError, match=r"int8_fake_quantize: x: expected at least one dimension"):
        int8_fake_quantize(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"int8_fake_quantize: scale: expected one element"):
        int8_fake_quantize(torch.randn(3), torch.ones(2))
    with pytest.raises(TypeError, match=r"int8_fake_quantize: scale: expected a float32"):
        int8_fake_quantize(torch.randn(3), torch.ones(1).double())

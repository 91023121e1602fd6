"""int8_quantize: reference against float64, native against reference to the bit, edges, errors."""

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

reference = REFERENCES["int8_quantize"]


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_matches_float64(dtype):
    x = torch.randn(50, 333).to(dtype)
    q, scale = reference(x)
    truth = x.double() / (x.double().abs().amax(-1, keepdim=True) / 127)
    assert (q.double() - truth).abs().max() <= 0.5 + 1e-4
    assert_same(scale, (x.float().abs().amax(-1) / 127))
    assert (q.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_native_is_reference_to_the_bit(variant, shape, dtype):
    x = (torch.randn(shape) * torch.rand(shape[0], 1).exp()).to(dtype)
    for got, want in zip(engine.ops.int8_quantize(x), reference(x), strict=True):
        assert_same(got, want)


@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(0, 70)), elements=st.floats(width=32)))
def test_any_values(x):
    x = torch.from_numpy(x)
    want = reference(x)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            for got, expected in zip(engine.ops.int8_quantize(x), want, strict=True):
                assert_same(got, expected)


def test_rows_that_are_not_numbers_do_not_leak(variant):
    x = torch.randn(4, 100)
    x[1, 50], x[2, 3] = torch.nan, -torch.inf
    q, scale = engine.ops.int8_quantize(x)
    assert scale.isnan().tolist() == [False, True, True, False]
    assert not q[1:3].any()
    assert_same(q[0], reference(x[0])[0])


def test_tiny_rows_count_as_zero(variant):
    x = torch.tensor([[0.0, -0.0], [2.0**-101, 0.0], [2.0**-100, 0.0], [1e-45, 0.0]])
    q, scale = engine.ops.int8_quantize(x)
    assert scale.tolist() == [1.0, 1.0, float(np.float32(2.0**-100) / np.float32(127)), 1.0]
    assert q.tolist() == [[0, 0], [0, 0], [127, 0], [0, 0]]


def test_half_to_even(variant):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert engine.ops.int8_quantize(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_leading_dimensions_and_strides(variant):
    x = torch.randn(3, 40, 2).transpose(1, 2)
    q, scale = engine.ops.int8_quantize(x)
    assert q.shape == (3, 2, 40) and scale.shape == (3, 2)
    for got, want in zip((q, scale), reference(x), strict=True):
        assert_same(got, want)
    q, scale = engine.ops.int8_quantize(x[0, 0])
    assert scale.shape == ()


def test_opcheck():
    torch.library.opcheck(torch.ops.engine.int8_quantize.default, (torch.randn(3, 5),))


def test_compiles():
    x = torch.randn(3, 65)
    compiled = torch.compile(lambda x: engine.ops.int8_quantize(x), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x), reference(x), strict=True):
        assert_same(got, want)


def test_gradient_is_refused():
    _, scale = engine.ops.int8_quantize(torch.randn(3, 5, requires_grad=True))
    with pytest.raises(RuntimeError, match="int8_quantize has no gradient"):
        scale.sum().backward()


def test_errors():
    with pytest.raises(TypeError, match=r"int8_quantize: x: expected a float32.*got torch.float64"):
        engine.ops.int8_quantize(torch.randn(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"int8_quantize: x: expected at least one dimension"):
        engine.ops.int8_quantize(torch.tensor(1.0))

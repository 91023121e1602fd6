"""int8_dequantize: reference against float64, native against reference to the bit, edges, errors."""

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
from engine.ops.int8_dequantize import int8_dequantize
from engine.ops.int8_quantize import int8_quantize

reference = REFERENCES["int8_dequantize"]


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def random_rows(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8), torch.rand(shape[:-1]).exp()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_matches_float64(dtype):
    q, scale = random_rows(50, 333)
    truth = q.double() * scale.double().unsqueeze(-1)
    torch.testing.assert_close(reference(q, scale, dtype).double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_native_is_reference_to_the_bit(variant, shape, dtype):
    q, scale = random_rows(*shape)
    assert_same(int8_dequantize(q, scale, dtype), reference(q, scale, dtype))


@given(
    hnp.arrays(np.int8, st.tuples(st.just(3), st.integers(0, 70))),
    hnp.arrays(np.float32, 3, elements=st.floats(width=32)),
    st.sampled_from(FLOAT_DTYPES),
)
def test_any_values(q, scale, dtype):
    q, scale = torch.from_numpy(q), torch.from_numpy(scale)
    want = reference(q, scale, dtype)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            assert_same(int8_dequantize(q, scale, dtype), want)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_undoes_int8_quantize(variant, dtype):
    x = torch.randn(20, 333).to(dtype)
    q, scale = int8_quantize(x)
    error = (int8_dequantize(q, scale, dtype).double() - x.double()).abs().amax(-1)
    assert (error <= 0.51 * scale + 127 * scale * torch.finfo(dtype).eps).all()


def test_rows_that_are_not_numbers_do_not_leak(variant):
    q, scale = random_rows(4, 100)
    scale[1], scale[2] = torch.nan, torch.inf
    x = int8_dequantize(q, scale)
    assert x[1].isnan().all() and not x[2].isfinite().any() and x[0].isfinite().all() and x[3].isfinite().all()


def test_leading_dimensions_and_strides(variant):
    q, scale = random_rows(3, 40, 2)
    q, scale = q.transpose(1, 2), torch.rand(2, 3).t()
    x = int8_dequantize(q, scale)
    assert x.shape == (3, 2, 40)
    assert_same(x, reference(q, scale, torch.float32))
    assert_same(int8_dequantize(q[0, 0], scale[0, 0]), x[0, 0])


def test_threads_do_not_change_the_result(variant):
    q, scale = random_rows(700, 1027)
    both = int8_dequantize(q, scale, torch.bfloat16)
    torch.set_num_threads(1)
    try:
        assert_same(int8_dequantize(q, scale, torch.bfloat16), both)
    finally:
        torch.set_num_threads(2)


def test_opcheck():
    q, scale = random_rows(3, 5)
    torch.library.opcheck(torch.ops.engine.int8_dequantize.default, (q, scale, torch.float16))


def test_compiles():
    q, scale = random_rows(3, 65)
    compiled = torch.compile(lambda q, s: int8_dequantize(q, s, torch.bfloat16), fullgraph=True, backend="aot_eager")
    assert_same(compiled(q, scale), reference(q, scale, torch.bfloat16))


def test_gradient_is_refused():
    q, scale = random_rows(3, 5)
    with pytest.raises(RuntimeError, match="int8_dequantize has no gradient"):
        int8_dequantize(q, scale.requires_grad_()).sum().backward()


def test_errors():
    q, scale = random_rows(3, 5)
    with pytest.raises(TypeError, match=r"int8_dequantize: q: expected a int8 tensor, got torch.uint8"):
        int8_dequantize(q.to(torch.uint8), scale)
    with pytest.raises(TypeError, match=r"int8_dequantize: scale: expected a float32 tensor, got torch.float64"):
        int8_dequantize(q, scale.double())
    with pytest.raises(TypeError, match=r"int8_dequantize: dtype: expected torch.float32.*got torch.float64"):
        int8_dequantize(q, scale, torch.float64)
    with pytest.raises(ValueError, match=r"int8_dequantize: q: expected at least one dimension"):
        int8_dequantize(q[0, 0], scale[0])
    with pytest.raises(ValueError, match=r"int8_dequantize: scale: expected shape \[3\], got \[2\]"):
        int8_dequantize(q, scale[:2])

"""int8_embedding: reference against float64, native against reference to the bit, edges, indices out of range."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import MATRICES

import engine
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.int8_embedding import int8_embedding

reference = REFERENCES["int8_embedding"]


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def table(rows, dim):
    return torch.randint(-128, 128, (rows, dim), dtype=torch.int8), torch.rand(rows).exp()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_matches_float64(dtype):
    weight, scale = table(50, 333)
    indices = torch.randint(50, (4, 9))
    truth = torch.nn.functional.embedding(indices, weight.double() * scale.double().unsqueeze(-1))
    got = reference(indices, weight, scale, dtype).double()
    torch.testing.assert_close(got, truth, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_native_is_reference_to_the_bit(variant, shape, dtype, index_dtype):
    weight, scale = table(*shape)
    indices = torch.randint(max(1, shape[0]), (5, 13 if shape[0] else 0), dtype=index_dtype)
    y = int8_embedding(indices, weight, scale, dtype)
    assert y.dtype == dtype
    assert_same(y, reference(indices, weight, scale, dtype))


@given(st.lists(st.integers(-2, 6) | st.integers(-(2**63), 2**63 - 1), max_size=20), st.integers(0, 5))
def test_any_indices(indices, rows):
    weight, scale = table(rows, 33)
    indices = torch.tensor(indices, dtype=torch.int64)
    valid = all(0 <= i < rows for i in indices.tolist())
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            if valid:
                assert_same(int8_embedding(indices, weight, scale), reference(indices, weight, scale, torch.float32))
            else:
                with pytest.raises(IndexError):
                    int8_embedding(indices, weight, scale)


def test_rows_that_are_not_numbers_do_not_leak(variant):
    weight, scale = table(4, 100)
    scale[1] = torch.nan
    y = int8_embedding(torch.tensor([0, 1, 2, 1]), weight, scale)
    assert y.isnan().all(-1).tolist() == [False, True, False, True]
    assert y[::2].isfinite().all()


def test_shapes_and_strides(variant):
    weight, scale = table(64, 40)
    weight, scale = weight[:, ::2], torch.rand(128)[::2]
    indices = torch.randint(64, (3, 4, 5)).transpose(0, 2)
    y = int8_embedding(indices, weight, scale)
    assert y.shape == (5, 4, 3, 20)
    assert_same(y, reference(indices, weight, scale, torch.float32))
    assert_same(int8_embedding(torch.tensor(7), weight, scale), weight[7] * scale[7])
    assert int8_embedding(torch.empty(2, 0, dtype=torch.int64), weight, scale).shape == (2, 0, 20)


def test_threads_do_not_change_the_result(variant):
    weight, scale = table(1000, 384)
    indices = torch.randint(1000, (3000,))
    both = int8_embedding(indices, weight, scale)
    torch.set_num_threads(1)
    try:
        assert_same(int8_embedding(indices, weight, scale), both)
    finally:
        torch.set_num_threads(2)


@pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1, 2**40, -(2**62)])
def test_an_index_out_of_range_is_refused(variant, bad):
    weight, scale = table(10, 16)
    indices = torch.randint(10, (20000,))  # enough for two threads
    indices[15000] = bad
    with pytest.raises(IndexError, match=rf"int8_embedding: indices: expected indices from 0 to 9, got {bad}"):
        int8_embedding(indices, weight, scale)
    with pytest.raises(RuntimeError, match="int8_embedding: indices: an index is out of range"):
        torch.ops.engine.int8_embedding(indices, weight, scale, torch.float32)


def test_opcheck():
    weight, scale = table(5, 7)
    args = (torch.tensor([[0, 4], [2, 2]]), weight, scale, torch.bfloat16)
    torch.library.opcheck(torch.ops.engine.int8_embedding.default, args)


def test_compiles():
    weight, scale = table(5, 65)
    indices = torch.tensor([4, 0, 4])
    compiled = torch.compile(lambda i: int8_embedding(i, weight, scale), fullgraph=True, backend="aot_eager")
    assert_same(compiled(indices), reference(indices, weight, scale, torch.float32))


def test_gradient_is_refused():
    weight, scale = table(5, 7)
    with pytest.raises(RuntimeError, match="int8_embedding has no gradient"):
        int8_embedding(torch.tensor([1]), weight, scale.requires_grad_()).sum().backward()


def test_errors():
    weight, scale = table(5, 7)
    indices = torch.tensor([1])
    with pytest.raises(
        TypeError, match=r"int8_embedding: indices: expected a int32 or int64 tensor, got torch.float32"
    ):
        int8_embedding(indices.float(), weight, scale)
    with pytest.raises(TypeError, match=r"int8_embedding: weight: expected a int8 tensor, got torch.float32"):
        int8_embedding(indices, weight.float(), scale)
    with pytest.raises(TypeError, match=r"int8_embedding: scale: expected a float32 tensor, got torch.float16"):
        int8_embedding(indices, weight, scale.half())
    with pytest.raises(TypeError, match=r"int8_embedding: dtype: expected torch.float32.*got torch.int8"):
        int8_embedding(indices, weight, scale, torch.int8)
    with pytest.raises(ValueError, match=r"int8_embedding: weight: expected shape \[rows, dim\], got \[7\]"):
        int8_embedding(indices, weight[0], scale)
    with pytest.raises(ValueError, match=r"int8_embedding: scale: expected shape \[5\], got \[4\]"):
        int8_embedding(indices, weight, scale[:4])

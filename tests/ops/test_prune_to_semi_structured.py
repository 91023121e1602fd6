"""prune_to_semi_structured: the two largest of four, ties, NaN, tails; every instruction set to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import MATRICES

import engine
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.prune_to_semi_structured import prune_to_semi_structured

reference = REFERENCES["prune_to_semi_structured"]


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def weights(n, k, dtype=torch.float32):
    """Many ties, zeros of both signs, and some that are no numbers."""
    w = torch.randn(n, k).mul(3).round() / 3
    w[torch.rand(n, k) < 0.1] = torch.nan
    w[torch.rand(n, k) < 0.1] = -torch.inf
    return torch.where(torch.rand(n, k) < 0.2, -0.0, w).to(dtype)


def test_by_hand():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 0.0, 0.0, 0.0, 7.0, 5.0, 5.0, -5.0, 5.0, 1.0, 2.0, 3.0]])
    values, metadata = reference(weight)
    assert values.tolist() == [[-3.0, 2.0, 0.0, 7.0, 5.0, 5.0, 2.0, 3.0]]
    # Places 1 and 2; 0 and 3; of equals the first two; 1 and 2 of a last group of three.
    assert metadata.tolist() == [[0b1100_1001, 0b1001_0100]]
    assert reference(weight[:, :5])[1].tolist() == [[0b0100_1001]]  # a weight alone takes places 0 and 1
    values, metadata = reference(weight[:, :4])
    assert metadata.tolist() == [[0b0100_1001]]  # beyond the last group places 0 and 1


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_native_is_reference_to_the_bit(variant, shape, dtype):
    weight = weights(*shape, dtype)
    assert_same(prune_to_semi_structured(weight), reference(weight))
    assert_same(prune_to_semi_structured(weight.t().contiguous().t()), reference(weight))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 9), st.integers(0, 70), st.sampled_from(FLOAT_DTYPES))
def test_what_is_2_to_4_loses_nothing(n, k, dtype):
    packed = prune_to_semi_structured(torch.randn(n, k).to(dtype))
    dense = engine.ops.semi_structured_to_dense(*packed, k)
    assert ((torch.nn.functional.pad(dense, (0, -k % 4)).reshape(n, -(-k // 4), 4) != 0).sum(-1) <= 2).all()
    assert_same(prune_to_semi_structured(dense), packed)


def test_threads_compile_and_opcheck():
    weight = weights(1500, 300)
    want = reference(weight)
    try:
        torch.set_num_threads(1)
        assert_same(prune_to_semi_structured(weight), want)
    finally:
        torch.set_num_threads(2)
    assert_same(prune_to_semi_structured(weight), want)
    assert_same(torch.compile(prune_to_semi_structured, fullgraph=True, backend="aot_eager")(weight), want)
    torch.library.opcheck(torch.ops.engine.prune_to_semi_structured.default, (torch.randn(5, 13),))


def test_errors():
    with pytest.raises(TypeError, match="weight: expected a float32, float16 or bfloat16 tensor"):
        prune_to_semi_structured(torch.randn(3, 4).double())
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, K\], got \[4\]"):
        prune_to_semi_structured(torch.randn(4))
    with pytest.raises(RuntimeError, match="has no gradient"):
        prune_to_semi_structured(torch.randn(3, 4, requires_grad=True))[0].sum().backward()

"""threshold_prune: reference against a plain loop, native against reference to the bit, thresholds, gradient."""

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
from engine.ops.threshold_prune import threshold_prune


def reference(weight, threshold):
    return REFERENCES["threshold_prune"](weight, torch.as_tensor(threshold, dtype=torch.float32))


def bits(t):
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def assert_same_bits(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape and got.is_contiguous()
    assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_zeros_what_is_small(dtype):
    weight = torch.randn(7, 45).to(dtype)
    want = [[w if abs(w) > 0.5 else 0.0 for w in row] for row in weight.double().tolist()]
    assert reference(weight, 0.5).double().tolist() == want


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_native_is_reference_to_the_bit(variant, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    for threshold in (0.0, 0.67, torch.rand(shape[0], 1), torch.rand(shape[1]), torch.rand(shape), torch.inf):
        assert_same_bits(threshold_prune(weight, threshold), reference(weight, threshold))


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(0, 70)), elements=st.floats(width=32)),
    st.floats(width=32),
)
def test_any_values(weight, threshold):
    weight = torch.from_numpy(weight)
    want = reference(weight, threshold)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            assert_same_bits(threshold_prune(weight, threshold), want)


def test_every_half_compares_as_its_fp32_value(variant):
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        weight = patterns.view(dtype)
        for threshold in (0.0, 2.0**-24, 2.0**-14, 1.0, 65504.0, torch.inf):
            assert_same_bits(threshold_prune(weight, threshold), reference(weight, threshold))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_ties_signs_and_what_is_no_number(variant, dtype):
    weight = torch.tensor([0.5, -0.5, 0.75, -0.75, 0.0, -0.0, torch.nan, torch.inf, -torch.inf, 2.0**-24]).to(dtype)

    def kept(threshold):
        pruned = threshold_prune(weight, threshold)
        same = bits(pruned) == bits(weight)
        assert ((bits(pruned) == 0) | same).all(), "what is pruned is +0"
        return (bits(pruned) != 0).int().tolist()

    assert kept(0.5) == [0, 0, 1, 1, 0, 0, 1, 1, 1, 0]
    assert kept(0.0) == [1, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    assert kept(torch.inf) == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert kept(torch.nan) == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1]  # -0 too


def test_every_shape_and_threshold_that_broadcasts(variant):
    shapes = [(), (1,), (40,), (9, 40), (3, 5, 40), (3, 1, 40), (2, 3, 4, 5), (2, 3, 1, 1, 7), (0, 3, 4), (3, 4, 0)]
    for shape in shapes:
        weight = torch.randn(shape)
        for broadcast in range(2 ** len(shape)):
            limits = tuple(1 if broadcast >> i & 1 else size for i, size in enumerate(shape))
            for leading in range(len(shape) + 1):
                if all(size == 1 for size in limits[:leading]):
                    threshold = torch.rand(limits[leading:])
                    assert_same_bits(threshold_prune(weight, threshold), reference(weight, threshold))
                    assert_same_bits(torch.ops.engine.threshold_prune(weight, threshold), reference(weight, threshold))


def test_strides_and_dtypes_of_the_threshold(variant):
    weight = torch.randn(70, 20).T
    for threshold in (0.4, torch.rand(70, 20).T, torch.rand(1, 70).expand(20, 70), torch.rand(20, 1).expand(20, 70)):
        assert_same_bits(threshold_prune(weight, threshold), reference(weight, threshold))
    narrow = torch.rand(20, 1).bfloat16()  # compared in float32
    assert_same_bits(threshold_prune(weight, narrow), reference(weight, narrow.float()))
    assert_same_bits(threshold_prune(weight, torch.tensor(1)), reference(weight, 1.0))
    assert_same_bits(threshold_prune(weight[0, 0], 0.0), weight[0, 0].clone())


def test_empty_weight_and_a_strided_threshold(variant):
    out = threshold_prune(torch.randn(0, 4), torch.randn(0, 8)[:, ::2])
    assert out.shape == (0, 4)


def test_threads_agree(variant):
    weight, threshold = torch.randn(700, 601), torch.rand(700, 1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(threshold_prune(weight, 0.5), reference(weight, 0.5))
            assert_same_bits(threshold_prune(weight, threshold), reference(weight, threshold))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gradient_goes_where_kept(dtype):
    weight, threshold = torch.randn(6, 9).to(dtype).requires_grad_(), torch.rand(6, 1, requires_grad=True)
    grad = torch.randn(6, 9).to(dtype)
    threshold_prune(weight, threshold).backward(grad)
    want = torch.where(weight.detach().abs().float() > threshold, grad, 0.0)
    assert torch.equal(weight.grad, want) and threshold.grad is None


def test_opcheck():
    for threshold, requires_grad in ((torch.tensor(0.5), True), (torch.rand(3, 1), True), (torch.rand(21), False)):
        weight = torch.randn(3, 21, requires_grad=requires_grad)
        torch.library.opcheck(torch.ops.engine.threshold_prune.default, (weight, threshold))


def test_compiles():
    weight = torch.randn(5, 65, requires_grad=True)
    compiled = torch.compile(lambda weight: threshold_prune(weight, 0.5), fullgraph=True, backend="aot_eager")
    pruned = compiled(weight)
    assert_same_bits(pruned.detach(), reference(weight.detach(), 0.5))
    pruned.sum().backward()
    assert torch.equal(weight.grad, (weight.detach().abs() > 0.5).float())


def test_errors():
    with pytest.raises(TypeError, match=r"threshold_prune: weight: expected a float32.*got torch.float64"):
        threshold_prune(torch.randn(3, 4, dtype=torch.float64), 0.1)
    for other in (None, [1.0]):
        with pytest.raises(TypeError, match=rf"threshold_prune: weight: expected .*got {type(other).__name__}"):
            threshold_prune(other, 0.1)
    with pytest.raises(RuntimeError, match=r"threshold_prune: threshold: expected a tensor that holds data.*meta"):
        threshold_prune(torch.randn(3, 4), torch.tensor(0.1, device="meta"))
    with pytest.raises(TypeError, match=r"threshold_prune: threshold: expected .*got str"):
        threshold_prune(torch.randn(3, 4), "0.1")
    with pytest.raises(TypeError, match=r"threshold_prune: threshold: expected a real tensor"):
        threshold_prune(torch.randn(3, 4), torch.tensor(1j))
    for shape in ((3,), (2, 1), (1, 3, 4), (4, 3), (1, 1, 1), (0,)):
        with pytest.raises(ValueError, match=r"threshold_prune: threshold: .*got"):
            threshold_prune(torch.randn(3, 4), torch.rand(shape))
        with pytest.raises((RuntimeError, ValueError), match="threshold_prune: threshold"):
            torch.ops.engine.threshold_prune(torch.randn(3, 4), torch.rand(shape))
    with pytest.raises((RuntimeError, TypeError), match="threshold_prune: threshold"):
        torch.ops.engine.threshold_prune(torch.randn(3, 4), torch.rand(4, dtype=torch.float64))

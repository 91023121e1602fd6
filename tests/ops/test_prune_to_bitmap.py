"""prune_to_bitmap: reference against a plain loop, native against reference to the bit, thresholds, edges, errors."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import MATRICES

import engine
from engine.ops._bitmap import bitmap_mask, check_bitmap, check_bitmap_metadata
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.bitmap_to_dense import bitmap_to_dense
from engine.ops.prune_to_bitmap import prune_to_bitmap


def reference(weight, threshold):
    return REFERENCES["prune_to_bitmap"](weight, torch.as_tensor(threshold, dtype=torch.float32))


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_keeps_what_is_above(dtype):
    weight = torch.randn(7, 45).to(dtype)
    bitmask, row_offsets, values = reference(weight, 0.5)
    kept = [[abs(w) > 0.5 for w in row] for row in weight.double().tolist()]
    assert bitmap_mask(bitmask, 45).tolist() == kept
    assert row_offsets.tolist() == [0, *np.cumsum([sum(row) for row in kept])]
    assert_same([values], [weight[torch.tensor(kept)]])
    check_bitmap_metadata("test", bitmask, row_offsets, values, 45)
    check_bitmap("test", bitmask, row_offsets, values, 45)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_native_is_reference_to_the_bit(variant, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    for threshold in (0.0, 0.1, 0.67, 2.0, torch.inf):
        assert_same(prune_to_bitmap(weight, threshold), reference(weight, threshold))


def test_thresholds_broadcast(variant):
    weight = torch.randn(9, 150)
    for shape in ((), (1,), (150,), (1, 1), (1, 150), (9, 1), (9, 150)):
        threshold = torch.rand(shape) * 2
        assert_same(prune_to_bitmap(weight, threshold), reference(weight, threshold))
    strided = torch.rand(150, 9).T
    assert_same(prune_to_bitmap(weight, strided), reference(weight, strided))
    narrow = torch.rand(9, 1).bfloat16()  # compared in float32
    assert_same(prune_to_bitmap(weight, narrow), reference(weight, narrow.float()))


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(0, 140)), elements=st.floats(width=32)),
    st.floats(width=32),
)
def test_any_values(weight, threshold):
    weight = torch.from_numpy(weight)
    want = reference(weight, threshold)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            assert_same(prune_to_bitmap(weight, threshold), want)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_ties_signs_and_what_is_no_number(variant, dtype):
    weight = torch.tensor([[0.5, -0.5, 0.75, -0.75, 0.0, -0.0, torch.nan, torch.inf, -torch.inf, 2.0**-24]]).to(dtype)

    def kept(threshold):
        return bitmap_mask(prune_to_bitmap(weight, threshold)[0], 10)[0].int().tolist()

    assert kept(0.5) == [0, 0, 1, 1, 0, 0, 1, 1, 1, 0]
    assert kept(0.0) == [1, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    assert kept(-1.0) == [1] * 10
    assert kept(torch.inf) == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert kept(torch.nan) == [1] * 10


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("columns", [8, 333, 1024])
def test_threads_agree_and_clobber_nothing(variant, columns, dtype):
    weight = torch.randn(1500, columns).to(dtype)
    weight[::3] *= 0.01  # rows with nothing, next to full ones
    want, before = reference(weight, 0.4), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same(prune_to_bitmap(weight, 0.4), want)
    finally:
        torch.set_num_threads(before)


def test_strides(variant):
    weight = torch.randn(70, 20).T
    assert_same(prune_to_bitmap(weight, 0.4), reference(weight, 0.4))
    assert_same(prune_to_bitmap(torch.randn(1, 8).expand(5, 8), -1.0)[1:2], [torch.arange(0, 48, 8)])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_round_trip(variant, dtype):
    weight = torch.randn(33, 200).to(dtype)
    bitmap = prune_to_bitmap(weight, 0.6)
    want = torch.where(weight.float().abs() > 0.6, weight, 0.0)
    assert_same([bitmap_to_dense(*bitmap, 200)], [want])


def test_opcheck():
    for threshold in (torch.tensor(0.5), torch.rand(3, 1), torch.rand(21)):
        torch.library.opcheck(torch.ops.engine.prune_to_bitmap.default, (torch.randn(3, 21), threshold))


def test_compiles():
    weight = torch.randn(5, 65)
    compiled = torch.compile(lambda weight: prune_to_bitmap(weight, 0.5), fullgraph=True, backend="aot_eager")
    assert_same(compiled(weight), reference(weight, 0.5))

    def there_and_back(weight):
        return bitmap_to_dense(*prune_to_bitmap(weight, 0.5), weight.shape[1])

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert_same([compiled(weight)], [there_and_back(weight)])


def test_gradient_is_refused():
    values = prune_to_bitmap(torch.randn(3, 5, requires_grad=True), 0.1)[2]
    with pytest.raises(RuntimeError, match="prune_to_bitmap has no gradient"):
        values.sum().backward()


def test_errors():
    with pytest.raises(TypeError, match=r"prune_to_bitmap: weight: expected a float32.*got torch.float64"):
        prune_to_bitmap(torch.randn(3, 4, dtype=torch.float64), 0.1)
    with pytest.raises(ValueError, match=r"prune_to_bitmap: weight: expected shape \[N, K\], got \[3\]"):
        prune_to_bitmap(torch.randn(3), 0.1)
    for shape in ((3,), (2, 1), (1, 3, 4), (4, 3)):
        with pytest.raises(ValueError, match=r"prune_to_bitmap: threshold: .*got"):
            prune_to_bitmap(torch.randn(3, 4), torch.rand(shape))
        with pytest.raises((RuntimeError, ValueError), match="prune_to_bitmap: threshold"):
            torch.ops.engine.prune_to_bitmap(torch.randn(3, 4), torch.rand(shape))
    with pytest.raises((RuntimeError, TypeError), match="prune_to_bitmap: threshold"):
        torch.ops.engine.prune_to_bitmap(torch.randn(3, 4), torch.rand(4, dtype=torch.float64))

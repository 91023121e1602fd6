"""bitmap_to_dense: values at their places in every dtype and size, gradient, and no bitmap that lies gets through."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import MATRICES

import engine
from engine.ops._bitmap import bitmap_mask, pack_mask
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.bitmap_to_dense import bitmap_to_dense

reference = REFERENCES["bitmap_to_dense"]
DTYPES = (*FLOAT_DTYPES, torch.int8)


def bitmap_of(mask, dtype=torch.float32):
    """A bitmap with this mask and random values, as arguments of the op."""
    row_offsets = torch.nn.functional.pad(mask.sum(-1).cumsum(0), (1, 0))
    values = (torch.randn(int(row_offsets[-1])) * 30).to(dtype)
    return pack_mask(mask), row_offsets, values, mask.shape[1]


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", MATRICES)
def test_mask_packs_and_unpacks(shape):
    mask = torch.rand(shape) < 0.5
    bits = np.packbits(mask.numpy(), axis=-1, bitorder="little")
    assert_same(pack_mask(mask), torch.from_numpy(bits))
    assert_same(bitmap_mask(torch.from_numpy(bits), shape[1]), mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_places_every_value(dtype):
    mask = torch.rand(20, 77) < 0.4
    arguments = bitmap_of(mask, dtype)
    dense = reference(*arguments)
    assert dense.dtype == dtype and dense.shape == mask.shape
    assert_same(dense[mask], arguments[2])
    assert not dense[~mask].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_native_is_reference_to_the_bit(variant, shape, dtype):
    for density in (0.0, 0.1, 0.5, 1.0):
        arguments = bitmap_of(torch.rand(shape) < density, dtype)
        assert_same(bitmap_to_dense(*arguments), reference(*arguments))


@given(hnp.arrays(np.bool_, st.tuples(st.integers(0, 5), st.integers(0, 140))), st.sampled_from(DTYPES))
def test_any_mask(mask, dtype):
    arguments = bitmap_of(torch.from_numpy(mask), dtype)
    want = reference(*arguments)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            assert_same(bitmap_to_dense(*arguments), want)


def test_values_that_are_not_numbers_stay_in_place(variant):
    bitmask, row_offsets, values, columns = bitmap_of(torch.rand(3, 100) < 0.5)
    values[::3], values[1::3] = torch.nan, -torch.inf
    dense = bitmap_to_dense(bitmask, row_offsets, values, columns)
    assert_same(dense, reference(bitmask, row_offsets, values, columns))
    assert not dense[~bitmap_mask(bitmask, columns)].any()  # a NaN times 0 would show here


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_share_no_row(variant, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in DTYPES:
            arguments = bitmap_of(torch.rand(500, 1001) < 0.5, dtype)
            assert_same(bitmap_to_dense(*arguments), reference(*arguments))
    finally:
        torch.set_num_threads(before)


def test_strides(variant):
    mask = torch.rand(12, 70) < 0.5
    bitmask, row_offsets, values, columns = bitmap_of(mask)
    spread = torch.zeros(2, len(values)).T.contiguous()
    spread[:, 0] = values
    got = bitmap_to_dense(bitmask.T.contiguous().T, row_offsets.repeat_interleave(2)[::2], spread[:, 0], columns)
    assert_same(got, reference(bitmask, row_offsets, values, columns))


def test_gradient(variant):
    mask = torch.rand(9, 50) < 0.5
    bitmask, row_offsets, values, columns = bitmap_of(mask)
    grad = torch.randn(9, 50)
    bitmap_to_dense(bitmask, row_offsets, values.requires_grad_(), columns).backward(grad)
    assert_same(values.grad, grad[mask])


def test_second_gradient():
    mask = torch.rand(5, 20) < 0.5
    bitmask, row_offsets, values, columns = bitmap_of(mask)
    values.requires_grad_()
    (first,) = torch.autograd.grad(
        bitmap_to_dense(bitmask, row_offsets, values, columns).pow(2).sum(), values, create_graph=True
    )
    (second,) = torch.autograd.grad(first.sum(), values)
    assert_same(second, torch.full_like(values, 2.0))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_gather_is_reference_to_the_bit(variant, shape, dtype):
    for density in (0.0, 0.1, 0.5, 1.0):
        bitmask, row_offsets, values, _ = bitmap_of(torch.rand(shape) < density, dtype)
        dense = torch.randn(shape).to(dtype)
        arguments = dense, bitmask, row_offsets, len(values)
        assert_same(torch.ops.engine.bitmap_gather(*arguments), REFERENCES["bitmap_gather"](*arguments))


@pytest.mark.parametrize("dtype", (torch.float32, torch.int8))
def test_opcheck(dtype):
    bitmask, row_offsets, values, columns = bitmap_of(torch.rand(3, 21) < 0.5, dtype)
    torch.library.opcheck(torch.ops.engine.bitmap_to_dense.default, (bitmask, row_offsets, values, columns))
    if dtype.is_floating_point:
        values.requires_grad_()
        torch.library.opcheck(torch.ops.engine.bitmap_to_dense.default, (bitmask, row_offsets, values, columns))
        dense = torch.randn(3, 21, requires_grad=True)
        arguments = dense, bitmask, row_offsets, len(values)
        torch.library.opcheck(torch.ops.engine.bitmap_gather.default, arguments)


def test_compiles_with_gradient():
    bitmask, row_offsets, values, columns = bitmap_of(torch.rand(6, 65) < 0.5)
    values.requires_grad_()
    compiled = torch.compile(
        lambda values: bitmap_to_dense(bitmask, row_offsets, values, columns) * 2, fullgraph=True, backend="aot_eager"
    )
    dense = compiled(values)
    assert_same(dense, reference(bitmask, row_offsets, values, columns) * 2)
    dense.sum().backward()
    assert_same(values.grad, torch.full_like(values, 2.0))


def damaged():
    """Bitmaps that lie, each with the words that its error must hold."""
    mask = torch.zeros(4, 13, dtype=torch.bool)
    mask[0, :3], mask[2, 12], mask[3, 5] = True, True, True
    good = pack_mask(mask), torch.tensor([0, 3, 3, 4, 5]), torch.ones(5), 13

    def bad(expected, **changes):
        return pytest.param({**dict(zip(NAMES, good, strict=True)), **changes}, expected, id=expected)

    extra_bit, padding_bit, all_bits = good[0].clone(), good[0].clone(), torch.full_like(good[0], 255)
    extra_bit[1, 0], padding_bit[2, 1] = 4, 0x30
    yield bad("bitmask: expected 0 bits set in row 1, as many as row_offsets gives it values, got 1", bitmask=extra_bit)
    yield bad("bitmask: expected 1 bits set in row 2, .*, got 2", bitmask=padding_bit)
    yield bad("bitmask: expected 3 bits set in row 0, .*, got 16", bitmask=all_bits)
    yield bad("row_offsets: expected to begin with 0, got 1", row_offsets=torch.tensor([1, 3, 3, 4, 5]))
    yield bad("row_offsets: expected to begin with 0, got -5", row_offsets=torch.tensor([-5, 3, 3, 4, 5]))
    yield bad(
        "row_offsets: expected to end with the number of values, 5, got 6", row_offsets=torch.tensor([0, 3, 3, 4, 6])
    )
    yield bad(
        "row_offsets: expected never to decrease, got 3 then 2 at row 1", row_offsets=torch.tensor([0, 3, 2, 4, 5])
    )
    yield bad("row_offsets: expected never to decrease, got 9", row_offsets=torch.tensor([0, 3, 9, 4, 5]))
    huge = torch.tensor([0, 2**62, 2**63 - 1, -(2**63), 5])
    yield bad("row_offsets: expected never to decrease, got 9223372036854775807", row_offsets=huge)
    yield bad("row_offsets: expected shape \\[5\\], got \\[4\\]", row_offsets=torch.tensor([0, 3, 4, 5]))
    yield bad("row_offsets: expected shape \\[5\\], got \\[0\\]", row_offsets=torch.zeros(0, dtype=torch.int64))
    yield bad("values: expected shape \\[nnz\\], got \\[5, 1\\]", values=torch.ones(5, 1))
    yield bad("bitmask: expected shape \\[N, 3\\], got \\[4, 2\\]", columns=17)
    yield bad("columns: expected at least 0, got -1", columns=-1)


NAMES = ("bitmask", "row_offsets", "values", "columns")


@pytest.mark.parametrize("arguments, expected", list(damaged()))
def test_damaged(variant, arguments, expected):
    with pytest.raises(ValueError, match=f"engine.ops.bitmap_to_dense: {expected}"):
        bitmap_to_dense(**arguments)
    with pytest.raises((RuntimeError, ValueError)):  # the op itself, without the public function's second look
        torch.ops.engine.bitmap_to_dense(*(arguments[name] for name in NAMES))


def test_padding_bit_in_place_of_another(variant):
    bitmask, row_offsets = torch.tensor([[0, 0x20]], dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="bitmask: expected no bit set beyond column 13, got one in row 0"):
        bitmap_to_dense(bitmask, row_offsets, torch.ones(1), 13)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gather_refuses_what_does_not_fit(variant, dtype):
    mask = torch.rand(40, 100) < 0.5
    bitmask, row_offsets, values, _ = bitmap_of(mask, dtype)
    dense, gather = torch.randn(40, 100).to(dtype), torch.ops.engine.bitmap_gather
    shifted = row_offsets.clone()
    shifted[5:9] += 1
    for arguments in (
        (dense, torch.full_like(bitmask, 255), row_offsets, len(values)),
        (dense, bitmask, shifted, len(values)),
        (dense, bitmask, row_offsets, len(values) - 1),
        (dense, bitmask, row_offsets, -1),
        (dense[:, :80], bitmask, row_offsets, len(values)),
        (dense[:20], bitmask, row_offsets, len(values)),
        (dense.double(), bitmask, row_offsets, len(values)),
        (dense, bitmask.to(torch.int32), row_offsets, len(values)),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError), match="bitmap_gather"):
            gather(*arguments)
        with pytest.raises((ValueError, TypeError), match="bitmap_gather"):
            REFERENCES["bitmap_gather"](*arguments)


def test_errors():
    bitmask, row_offsets, values, columns = bitmap_of(torch.rand(3, 21) < 0.5)
    with pytest.raises(TypeError, match=r"bitmap_to_dense: values: expected a float32 or .*, got torch.float64"):
        bitmap_to_dense(bitmask, row_offsets, values.double(), columns)
    with pytest.raises(TypeError, match=r"bitmap_to_dense: bitmask: expected a uint8 tensor, got torch.int8"):
        bitmap_to_dense(bitmask.to(torch.int8), row_offsets, values, columns)
    with pytest.raises(TypeError, match=r"bitmap_to_dense: row_offsets: expected a int64 tensor, got torch.int32"):
        bitmap_to_dense(bitmask, row_offsets.int(), values, columns)
    for other in (21.0, "21", None):
        with pytest.raises(TypeError, match=rf"bitmap_to_dense: columns: expected an int, got {type(other).__name__}"):
            bitmap_to_dense(bitmask, row_offsets, values, other)

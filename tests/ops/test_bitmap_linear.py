"""bitmap_linear: reference and native against float64, edges, gradients, damaged bitmaps, errors."""

import contextlib
import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import LINEARS, few_outputs
from tolerance import assert_as_good_as_torch

import engine
from engine.ops._bitmap import bitmap_mask, pack_mask
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES, reference_mode
from engine.ops.bitmap_linear import bitmap_linear

reference = REFERENCES["bitmap_linear"]


def bitmap_of(dense, mask):
    row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return pack_mask(mask), row_offsets, dense[mask]


def random_bitmap(n, k, dtype=torch.float32, density=None):
    """Rows of any density, all kept and none kept among them."""
    kept = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])[torch.randint(0, 5, (n, 1))] if density is None else density
    return bitmap_of(torch.randn(n, k).to(dtype), torch.rand(n, k) < kept)


def dense_of(bitmask, row_offsets, values, k):
    dense = torch.zeros(bitmask.shape[0], k, dtype=torch.float64)
    dense[bitmap_mask(bitmask, k)] = values.double()
    return dense


def truth_of(x, bitmask, row_offsets, values, bias=None):
    """The result in float64, and PyTorch's own in the dtype of x."""
    dense = dense_of(bitmask, row_offsets, values, x.shape[-1])
    y = x.double() @ dense.t() + (0 if bias is None else bias.double())
    own = torch.nn.functional.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return torch.where(x.isfinite().all(-1, keepdim=True), y, torch.nan), own


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_matches_float64(dtype):
    x, weight, bias = torch.randn(20, 300).to(dtype), random_bitmap(40, 300), torch.randn(40)
    assert_as_good_as_torch(reference(x, *weight, bias), *truth_of(x, *weight, bias))


@pytest.mark.parametrize("values_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_native_is_as_good_as_torch(variant, shape, values_dtype):
    m, n, k = shape
    weight = random_bitmap(n, k, values_dtype)
    for dtype, bias in zip(FLOAT_DTYPES, (None, torch.randn(n), torch.randn(n).half()), strict=True):
        x = torch.randn(m, k).to(dtype)
        assert_as_good_as_torch(bitmap_linear(x, *weight, bias), *truth_of(x, *weight, bias))


def test_sums_of_few_outputs(variant):
    for m, n, k in few_outputs(60):
        x, weight = torch.randn(m, k), random_bitmap(n, k, density=0.9)
        assert_as_good_as_torch(bitmap_linear(x, *weight), *truth_of(x, *weight))


# Small integers, so that every sum is exact: each tile of every kernel with each tail, on one and on several
# stretches of K.
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("k", [1, 7, 8, 63, 65, 256, 257, 600])
def test_tails(variant, k, dtype):
    dense = torch.randint(-128, 128, (115, k)).to(dtype)
    mask = torch.rand(115, k) < torch.rand(115, 1)
    x = torch.randint(-8, 9, (35, k)).float()
    want = x @ (dense.float() * mask).t()
    weight = bitmap_of(dense, mask)
    for m in (*range(1, 10), 15, 16, 17, 24, 25, 33, 35):
        assert torch.equal(bitmap_linear(x[:m], *weight), want[:m])
    for n in (*range(1, 16), 29, 96, 97, 99):
        weight = bitmap_of(dense[:n], mask[:n])
        for m in (1, 2, 20):
            assert torch.equal(bitmap_linear(x[:m], *weight), want[:m, :n])


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 40),
    st.integers(0, 140),
    st.integers(0, 700),
    st.sampled_from(FLOAT_DTYPES),
    st.sampled_from(FLOAT_DTYPES),
    st.floats(0, 1),
)
def test_any_shape(m, n, k, dtype, values_dtype, density):
    x = torch.randint(-8, 9, (m, k)).to(dtype)
    weight = bitmap_of(torch.randint(-128, 128, (n, k)).to(values_dtype), torch.rand(n, k) < density)
    want = reference(x, *weight)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            assert torch.equal(bitmap_linear(x, *weight), want)


@pytest.mark.parametrize("m", [4, 40])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_rows_that_are_not_numbers_do_not_leak(variant, m, dtype):
    x, dense, mask = torch.randn(m, 300).to(dtype), torch.randn(30, 300), torch.rand(30, 300) < 0.5
    mask[:, 3] = False  # an infinity that meets pruned weights alone
    weight, bias = bitmap_of(dense, mask), torch.randn(30)
    clean = bitmap_linear(x, *weight, bias)
    x[1, 290], x[2, 3] = torch.nan, -torch.inf
    y = bitmap_linear(x, *weight, bias)
    assert y[1:3].isnan().all()
    assert torch.equal(y[0], clean[0]) and torch.equal(y[3:], clean[3:])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_values_that_are_not_numbers_stay_in_their_output(variant, m, dtype):
    x, mask = torch.rand(m, 300) + 1, torch.rand(9, 300) < 0.5
    mask[4, :3] = True
    dense = torch.randn(9, 300).to(dtype)
    dense[4, 0], dense[4, 2] = torch.inf, torch.nan
    y = bitmap_linear(x, *bitmap_of(dense, mask))
    assert y[:, 4].isnan().all() and y.isfinite().sum() == 8 * m


def test_no_inputs_give_the_bias(variant):
    bias, weight = torch.randn(7), random_bitmap(7, 0)
    for m in (2, 30):
        assert torch.equal(bitmap_linear(torch.empty(m, 0), *weight, bias), bias.expand(m, 7))


def test_leading_dimensions_and_strides(variant):
    x, weight = torch.randn(3, 40, 2).transpose(1, 2), random_bitmap(60, 40)
    assert_as_good_as_torch(bitmap_linear(x, *weight), *truth_of(x, *weight))
    assert bitmap_linear(x[0, 0], *weight).shape == (60,)
    assert bitmap_linear(x[:0], *weight).shape == (0, 2, 60)
    spread = [torch.stack([t, torch.zeros_like(t)], -1)[..., 0] for t in weight]
    assert not spread[0].is_contiguous()
    assert_as_good_as_torch(bitmap_linear(x, *spread), *truth_of(x, *weight))


@pytest.mark.parametrize("m", [3, 100, 700])
def test_threads_give_the_same_bits(variant, m):
    x, weight = torch.randn(m, 500), random_bitmap(300, 500)
    y = bitmap_linear(x, *weight)
    try:
        torch.set_num_threads(1)
        assert torch.equal(bitmap_linear(x, *weight), y)
    finally:
        torch.set_num_threads(2)
    assert_as_good_as_torch(y, *truth_of(x, *weight))


@pytest.mark.parametrize(("dtype", "values_dtype"), list(itertools.product(FLOAT_DTYPES, FLOAT_DTYPES)))
def test_gradients_are_those_of_the_dense_formula(dtype, values_dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["engine.ops.bitmap_linear"], "BLOCK_ELEMENTS", 7 * 30)  # several blocks
    bitmask, row_offsets, values = random_bitmap(20, 30, values_dtype)
    x, bias = torch.randn(2, 5, 30).to(dtype).requires_grad_(), torch.randn(20).requires_grad_()
    values.requires_grad_()
    grad = torch.randn(2, 5, 20).to(dtype)
    bitmap_linear(x, bitmask, row_offsets, values, bias).backward(grad)

    inputs = [t.detach().double().requires_grad_() for t in (x, values, bias)]
    dense = torch.zeros(20, 30, dtype=torch.float64).masked_scatter(bitmap_mask(bitmask, 30), inputs[1])
    torch.nn.functional.linear(inputs[0], dense, inputs[2]).backward(grad.double())
    for t, want in zip((x, values, bias), inputs, strict=True):
        assert_as_good_as_torch(t.grad, want.grad, want.grad.float().to(t.dtype))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_gradient_alone(wanted):
    bitmask, row_offsets, values = random_bitmap(20, 30)
    x = torch.randn(5, 30).requires_grad_(wanted[0])
    values.requires_grad_(wanted[1])
    bitmap_linear(x, bitmask, row_offsets, values).sum().backward()
    assert (x.grad is not None, values.grad is not None) == wanted


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x, (bitmask, row_offsets, values) = torch.randn(3, 13, requires_grad=grad), random_bitmap(4, 13)
    values, bias = values.requires_grad_(grad), torch.randn(4, requires_grad=grad)
    torch.library.opcheck(torch.ops.engine.bitmap_linear.default, (x, bitmask, row_offsets, values))
    torch.library.opcheck(torch.ops.engine.bitmap_linear.default, (x, bitmask, row_offsets, values, bias))


def test_opcheck_of_the_gradients():
    bitmask, row_offsets, values = random_bitmap(4, 13)
    grad, x = torch.randn(2, 3, 4), torch.randn(2, 3, 13)
    torch.library.opcheck(
        torch.ops.engine.bitmap_linear_backward_input.default, (grad, bitmask, row_offsets, values, 13)
    )
    torch.library.opcheck(
        torch.ops.engine.bitmap_linear_backward_values.default,
        (grad, x, bitmask, row_offsets, values.shape[0], torch.bfloat16),
    )


def test_compiles_with_its_gradients():
    bitmask, row_offsets, values = random_bitmap(10, 65)
    tensors = [torch.randn(3, 65), values, torch.randn(10)]

    def gradients(function):
        x, v, bias = (t.clone().requires_grad_() for t in tensors)
        y = function(x, v, bias)
        y.square().sum().backward()
        return y.detach(), x.grad, v.grad, bias.grad

    def call(x, v, bias):
        return bitmap_linear(x, bitmask, row_offsets, v, bias)

    for got, want in zip(
        gradients(torch.compile(call, fullgraph=True, backend="aot_eager")), gradients(call), strict=True
    ):
        assert torch.equal(got, want)


def test_reference_mode():
    x, weight = torch.randn(3, 65), random_bitmap(10, 65)
    with reference_mode():
        assert torch.equal(bitmap_linear(x, *weight), reference(x, *weight))


def damaged_bitmaps():
    bitmask, row_offsets, values = random_bitmap(6, 45, density=0.5)
    full, empty, padding = bitmask.clone(), bitmask.clone(), bitmask.clone()
    full[3], empty[2] = 0xFF, 0
    full[3, 5] = 0x1F
    padding[4, 5] |= 0x20
    back, beyond, late = row_offsets.clone(), row_offsets.clone(), row_offsets.clone()
    back[2], back[3] = row_offsets[3], row_offsets[2]
    beyond[3] = 10**12
    late[0] = 1
    yield "row 3", (full, row_offsets, values)
    yield "row 2", (empty, row_offsets, values)
    yield "row 4", (padding, row_offsets, values)
    yield "row_offsets: expected never to decrease", (bitmask, back, values)
    yield "row_offsets: expected never to decrease", (bitmask, beyond, values)
    yield "row_offsets: expected to begin with 0", (bitmask, late, values)
    yield "row_offsets: expected to end with", (bitmask, row_offsets, values[:-1])
    last = bitmask.clone()
    last[5] = torch.tensor([0xFF] * 5 + [0x1F])
    yield "row 5", (last, row_offsets, values)


@pytest.mark.parametrize("m", [1, 5, 20])
def test_damaged_bitmaps_are_refused(variant, m):
    x = torch.randn(m, 45)
    for message, weight in damaged_bitmaps():
        with pytest.raises(ValueError, match="bitmap_linear: .*" + message):
            bitmap_linear(x, *weight)


# Under AddressSanitizer (make sanitize) this is the test that nothing is read out of bounds.
@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 6),
    st.integers(1, 700),
    st.sampled_from([1, 2, 4, 7, 9]),
    st.sampled_from(FLOAT_DTYPES),
    st.integers(0, 2**31),
)
def test_no_bitmap_reads_out_of_bounds(n, k, m, dtype, seed):
    torch.manual_seed(seed)
    x, (bitmask, row_offsets, values) = torch.randint(-8, 9, (m, k)).float(), random_bitmap(n, k, dtype)
    values = (values * 8).round()
    for damage in torch.rand(int(torch.randint(1, 4, ()))):
        row = int(torch.randint(0, n, ()))
        if damage < 0.6:
            bitmask[row, int(torch.randint(0, bitmask.shape[1], ())) :] = int(torch.randint(0, 256, ()))
        else:
            row_offsets[row] = int(torch.randint(-10, values.shape[0] + 10, ()))
    want: torch.Tensor | None = None
    with contextlib.suppress(ValueError):
        want = reference(x, bitmask, row_offsets, values)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            if want is None:
                with pytest.raises(ValueError, match="bitmap_linear"):
                    bitmap_linear(x, bitmask, row_offsets, values)
            else:
                assert torch.equal(bitmap_linear(x, bitmask, row_offsets, values), want)


def test_errors():
    x, (bitmask, row_offsets, values), bias = torch.randn(3, 13), random_bitmap(4, 13), torch.randn(4)
    wrong = {
        r"x: expected a float32.*got torch.float64": (TypeError, (x.double(), bitmask, row_offsets, values)),
        r"x: expected shape \[\.\.\., K\], got \[\]": (ValueError, (x[0, 0], bitmask, row_offsets, values)),
        r"bitmask: expected shape \[N, 3\], got \[4, 2\]": (
            ValueError,
            (torch.randn(3, 17), bitmask, row_offsets, values),
        ),
        r"bitmask: expected a torch.uint8|bitmask: expected a uint8": (
            TypeError,
            (x, bitmask.char(), row_offsets, values),
        ),
        r"row_offsets: expected a int64": (TypeError, (x, bitmask, row_offsets.int(), values)),
        r"row_offsets: expected shape \[5\], got \[4\]": (ValueError, (x, bitmask, row_offsets[1:], values)),
        r"values: expected a float32.*got torch.int8": (TypeError, (x, bitmask, row_offsets, values.char())),
        r"values: expected shape \[nnz\]": (ValueError, (x, bitmask, row_offsets, values[None])),
        r"bias: expected a float32.*got torch.int64": (TypeError, (x, bitmask, row_offsets, values, bias.long())),
        r"bias: expected shape \[4\], got \[5\]": (ValueError, (x, bitmask, row_offsets, values, torch.randn(5))),
    }
    for message, (error, arguments) in wrong.items():
        with pytest.raises(error, match="bitmap_linear: (" + message + ")"):
            bitmap_linear(*arguments)

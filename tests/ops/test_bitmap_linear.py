"""bitmap_linear: bitmaps that lie, its gradient ops; what all such ops must do is in test_float_linears.py."""

import contextlib
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import few_outputs
from stored import FORMS, random_keep
from tolerance import assert_as_good_as_torch

import engine
from engine.ops._bitmap import bitmap_mask
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES, reference_mode
from engine.ops.bitmap_linear import bitmap_linear

reference = REFERENCES["bitmap_linear"]


def random_bitmap(n, k, dtype=torch.float32):
    return FORMS["bitmap"].store(torch.randn(n, k).to(dtype), random_keep(n, k))


def integers(n, k, density, dtype=torch.float32):
    """A bitmap of numbers so small that every sum is exact, in whatever order."""
    return FORMS["bitmap"].store(torch.randint(-8, 9, (n, k)).to(dtype), torch.rand(n, k) < density)


# On both sides of where products with the kept weights alone pay, in strips of every width.
@pytest.mark.parametrize("density", [0.0, 0.02, 0.15, 0.35, 0.55, 0.65, 1.0])
def test_densities(variant, density):
    for n, k in ((1, 40), (64, 96), (65, 97), (130, 600)):
        x, weight = torch.randint(-8, 9, (330, k)).float(), integers(n, k, density)
        want = reference(x, *weight)
        for m in (9, 16, 17, 33, 48, 49, 64, 65, 100, 256, 330):
            assert torch.equal(bitmap_linear(x[:m], *weight), want[:m])


# The gradients likewise, and the reverse.
@pytest.mark.parametrize("density", [0.0, 0.1, 0.18, 0.35, 0.55, 1.0])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_native_gradients(variant, density, dtype):
    for n, k in ((1, 40), (40, 1), (64, 96), (130, 290)):
        for values_dtype in FLOAT_DTYPES:
            bitmask, row_offsets, values = integers(n, k, density, values_dtype)
            for m in (1, 31, 32, 65, 97, 300):
                grad, x = torch.randint(-4, 5, (m, n)).to(dtype), torch.randint(-4, 5, (m, k)).to(dtype)
                for name, arguments in (
                    ("bitmap_linear_backward_input", (grad, bitmask, row_offsets, values, k)),
                    ("bitmap_linear_backward_values", (grad, x, bitmask, row_offsets, len(values), values_dtype)),
                ):
                    got = getattr(torch.ops.engine, name)(*arguments)
                    assert torch.equal(got, REFERENCES[name](*arguments)), (name, n, k, m)


@pytest.mark.parametrize(
    "shape", [(0, 20, 30), (5, 0, 30), (70, 0, 30), (5, 20, 0), (70, 20, 0), (70, 0, 0), (70, 50, 300)], ids=str
)
def test_gradients_are_as_good_as_torch(variant, shape):
    m, n, k = shape
    weight, keep = torch.randn(n, k), torch.rand(n, k) < 0.3
    bitmask, row_offsets, values = FORMS["bitmap"].store(weight, keep)
    x, grad = torch.randn(m, k, requires_grad=True), torch.randn(m, n)
    bitmap_linear(x, bitmask, row_offsets, values.requires_grad_()).backward(grad)
    dense = (weight * keep).double()
    assert_as_good_as_torch(x.grad, grad.double() @ dense, grad @ dense.float())
    own = (grad.t() @ x.detach())[keep]
    assert_as_good_as_torch(values.grad, (grad.double().t() @ x.detach().double())[keep], own)


# A chain of additions may be no longer than PyTorch's where its are shortest, in strips of every width.
def test_sums_of_few_outputs_and_few_kept(variant):
    for m, n, k in few_outputs(150):
        weight, keep = torch.randn(n, k), torch.rand(n, k) < 0.55
        x, stored = torch.randn(m, k), FORMS["bitmap"].store(weight, keep)
        dense = weight * keep
        assert_as_good_as_torch(bitmap_linear(x, *stored), x.double() @ dense.double().t(), x @ dense.t())


def test_gradients_go_through_many_blocks(monkeypatch):
    monkeypatch.setattr(sys.modules["engine.ops.bitmap_linear"], "DENSE_AT_ONCE", 7 * 30)
    bitmask, row_offsets, values = random_bitmap(20, 30)
    x, grad = torch.randn(5, 30, requires_grad=True), torch.randn(5, 20)
    with reference_mode():
        bitmap_linear(x, bitmask, row_offsets, values.requires_grad_()).backward(grad)
    dense = FORMS["bitmap"].restore(bitmask, row_offsets, values.detach(), 20, 30)
    torch.testing.assert_close(x.grad, grad @ dense)
    torch.testing.assert_close(values.grad, (grad.t() @ x.detach())[bitmap_mask(bitmask, 30)])


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


def damaged_bitmaps():
    bitmask, row_offsets, values = FORMS["bitmap"].store(torch.randn(6, 45), torch.rand(6, 45) < 0.5)
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


@pytest.mark.parametrize("m", [5, 40])
def test_gradients_refuse_damaged_bitmaps(variant, m):
    grad, x = torch.randn(m, 6), torch.randn(m, 45)
    for message, (bitmask, row_offsets, values) in damaged_bitmaps():
        if "row_offsets: expected to" in message:
            message = "row_offsets"
        with pytest.raises((RuntimeError, ValueError), match=message):
            torch.ops.engine.bitmap_linear_backward_input(grad, bitmask, row_offsets, values, 45)
        with pytest.raises((RuntimeError, ValueError), match=message):
            torch.ops.engine.bitmap_linear_backward_values(
                grad, x, bitmask, row_offsets, values.shape[0], torch.float32
            )


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
        r"x: expected at least one dimension, got \[\]": (ValueError, (x[0, 0], bitmask, row_offsets, values)),
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

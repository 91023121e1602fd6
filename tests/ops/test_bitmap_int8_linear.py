"""bitmap_int8_linear: bitmaps that lie, and densities; what all int8 linear ops must do is in test_int8_linears.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import FORMS, activations, assert_same, int8_values, random_keep

import engine
from engine.ops._bitmap import pack_mask
from engine.ops._library import REFERENCES
from engine.ops.bitmap_int8_linear import bitmap_int8_linear

reference = REFERENCES["bitmap_int8_linear"]


def weights(n, k, keep=None):
    keep = random_keep(n, k) if keep is None else keep
    return *FORMS["bitmap"].store(int8_values(n, k), keep), torch.rand(n) / 100 + 1e-3


@pytest.mark.parametrize("density", [0.0, 0.05, 0.13, 0.28, 0.9, 1.0])
def test_densities(variant, density):
    weight, x = weights(67, 1500, torch.rand(67, 1500) < density), activations(330, 1500)
    want = reference(x, *weight)
    for m in (1, 2, 7, 20, 25, 40, 41, 70, 330):
        assert_same(bitmap_int8_linear(x[:m], *weight), want[:m])


def damaged():
    """Bitmaps that lie, each with the words that its error must hold."""
    mask = torch.zeros(4, 13, dtype=torch.bool)
    mask[0, :3], mask[2, 12], mask[3, 5] = True, True, True
    bitmask, offsets = pack_mask(mask), torch.tensor([0, 3, 3, 4, 5])
    extra_bit, padding_bit = bitmask.clone(), bitmask.clone()
    extra_bit[1, 0], padding_bit[2, 1] = 4, 0x20
    huge = torch.tensor([0, 2**62, 2**63 - 1, -(2**63), 5])
    yield "bitmask: expected 0 bits set in row 1, as many as", extra_bit, offsets
    yield "bitmask: expected no bit set beyond column 13, got one in row 2", padding_bit, offsets
    yield "bitmask: expected 3 bits set in row 0, .*, got 16", torch.full_like(bitmask, 255), offsets
    yield "row_offsets: expected to begin with 0, got -5", bitmask, torch.tensor([-5, 3, 3, 4, 5])
    yield "row_offsets: expected to end with the number of values, 5, got 6", bitmask, torch.tensor([0, 3, 3, 4, 6])
    yield "row_offsets: expected never to decrease, got 3 then 2 at row 1", bitmask, torch.tensor([0, 3, 2, 4, 5])
    yield "row_offsets: expected never to decrease", bitmask, huge
    yield r"row_offsets: expected shape \[5\], got \[4\]", bitmask, offsets[1:]


@pytest.mark.parametrize("m", [1, 3, 10, 20, 30])
@pytest.mark.parametrize("expected, bitmask, row_offsets", list(damaged()))
def test_damaged(variant, m, expected, bitmask, row_offsets):
    arguments = torch.randn(m, 13), bitmask, row_offsets, torch.ones(5, dtype=torch.int8), torch.ones(4)
    with pytest.raises(ValueError, match=f"engine.ops.bitmap_int8_linear: {expected}"):
        bitmap_int8_linear(*arguments)
    with pytest.raises((RuntimeError, ValueError), match="bitmap_int8_linear"):  # without a second look
        torch.ops.engine.bitmap_int8_linear(*arguments)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from([1, 2, 7, 16, 19, 31, 49]),
    st.integers(0, 2**31),
    st.data(),
)
def test_corrupted_bitmaps_never_pass(n, k, m, seed, data):
    """Random damage: refused, and (a sanitized build sees it) never read beyond. Undone damage must pass."""
    bitmask, row_offsets, values, scale = weights(n, k)
    generator = torch.Generator().manual_seed(seed)
    bad_mask, bad_offsets = bitmask.clone(), row_offsets.clone()
    if data.draw(st.booleans(), "damage to the mask"):
        hit = torch.randint(0, bitmask.numel(), (3,), generator=generator)
        bad_mask.view(-1)[hit] = torch.randint(0, 256, (3,), generator=generator).to(torch.uint8)
    if data.draw(st.booleans(), "damage to the offsets"):
        hit = torch.randint(0, n + 1, (2,), generator=generator)
        bad_offsets[hit] += torch.randint(-k, k + 1, (2,), generator=generator)
    x = torch.randn(m, k)
    intact = torch.equal(bad_mask, bitmask) and torch.equal(bad_offsets, row_offsets)
    try:
        want = reference(x, bad_mask, bad_offsets, values, scale)  # damage may leave the counts right
    except ValueError:
        want = None
    assert want is not None or not intact
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            if want is None:
                with pytest.raises(RuntimeError, match="bitmap_int8_linear"):
                    torch.ops.engine.bitmap_int8_linear(x, bad_mask, bad_offsets, values, scale)
            else:
                assert_same(torch.ops.engine.bitmap_int8_linear(x, bad_mask, bad_offsets, values, scale), want)


def test_errors():
    x, (bitmask, row_offsets, values, scale), bias = torch.randn(3, 9), weights(4, 9), torch.randn(4)
    b = bitmask, row_offsets, values
    wrong = {
        r"x: expected a float32.*got torch.float64": (TypeError, (x.double(), *b, scale)),
        r"x: expected at least one dimension, got \[\]": (ValueError, (torch.tensor(1.0), *b, scale)),
        r"bitmask: expected shape \[N, 1\], got \[4, 2\]": (ValueError, (x[:, 1:], *b, scale)),
        r"bitmask: expected a uint8 tensor": (TypeError, (x, bitmask.to(torch.int8), row_offsets, values, scale)),
        r"row_offsets: expected a int64 tensor": (TypeError, (x, bitmask, row_offsets.int(), values, scale)),
        r"values: expected a int8 tensor, got torch.float32": (TypeError, (x, *b[:2], values.float(), scale)),
        r"scale: expected a float32 tensor, got torch.float16": (TypeError, (x, *b, scale.half())),
        r"scale: expected shape \[4\], got \[3\]": (ValueError, (x, *b, scale[1:])),
        r"bias: expected a float32.*got torch.int64": (TypeError, (x, *b, scale, bias.long())),
        r"bias: expected shape \[4\], got \[5\]": (ValueError, (x, *b, scale, torch.randn(5))),
        r"input_scale: expected one element or shape \[9\], got \[2\]": (
            ValueError,
            (x, *b, scale, bias, torch.ones(2)),
        ),
        r"input_scale: expected a float32 tensor": (TypeError, (x, *b, scale, bias, torch.tensor(1))),
    }
    for message, (error, arguments) in wrong.items():
        with pytest.raises(error, match="bitmap_int8_linear: " + message):
            bitmap_int8_linear(*arguments)

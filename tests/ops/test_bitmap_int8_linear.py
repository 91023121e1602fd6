"""bitmap_int8_linear: to the bit what int8_linear makes of the dense weight, edges, gradients, bitmaps that lie."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import LINEARS

import engine
from engine.ops._bitmap import bitmap_mask, pack_mask
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES, reference_mode
from engine.ops.bitmap_int8_linear import bitmap_int8_linear

reference = REFERENCES["bitmap_int8_linear"]


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def bitmap_of(mask):
    """A bitmap with this mask and every int8 value, the extremes often; and a scale a row."""
    row_offsets = torch.nn.functional.pad(mask.sum(-1).cumsum(0), (1, 0))
    values = torch.randint(-128, 128, (int(row_offsets[-1]),), dtype=torch.int8)
    extreme = torch.tensor([-128, 127], dtype=torch.int8)[torch.randint(0, 2, values.shape)]
    values = torch.where(torch.rand(values.shape) < 0.2, extreme, values)
    return pack_mask(mask), row_offsets, values, torch.rand(mask.shape[0]) / 100 + 1e-3


def weights(n, k, density=0.5):
    """Rows of about the density, some empty, some full."""
    row = torch.where(torch.rand(n, 1) < 0.2, torch.randint(0, 2, (n, 1)).float(), density)
    return bitmap_of(torch.rand(n, k) < row)


def dense_of(bitmask, row_offsets, values, scale, k):
    weight = torch.zeros(bitmask.shape[0], k, dtype=torch.int8)
    weight[bitmap_mask(bitmask, k)] = values
    return weight


def activations(*shape):
    x = torch.randn(shape)
    return torch.where(torch.rand(*shape[:-1], 1) < 0.3, x.sign() * 3, x)  # rows of only -127 and 127, too


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_matches_float64(dtype):
    x, weight, bias = activations(20, 300).to(dtype), weights(40, 300), torch.randn(40)
    dense, scale = dense_of(*weight, 300).double(), weight[3].double()
    q, row_scale = engine.ops.int8_quantize(x)
    q, factor = q.double(), row_scale.double().unsqueeze(-1) * scale
    truth = q @ dense.t() * factor + bias.double()
    error = (reference(x, *weight, bias).double() - truth).abs()
    bound = torch.finfo(dtype).eps * truth.abs() + 2e-7 * ((q.abs() @ dense.abs().t()) * factor + bias.abs())
    assert (error <= bound).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_native_is_reference_to_the_bit(variant, shape, dtype):
    m, n, k = shape
    x, weight = activations(m, k).to(dtype), weights(n, k)
    for bias in (None, torch.randn(n), torch.randn(n).bfloat16(), torch.randn(n).half()):
        assert_same(bitmap_int8_linear(x, *weight, bias), reference(x, *weight, bias))
    input_scale = torch.tensor(0.02)
    assert_same(bitmap_int8_linear(x, *weight, bias, input_scale), reference(x, *weight, bias, input_scale))
    assert_same(bitmap_int8_linear(x, *weight, None, 0.02), reference(x, *weight, None, input_scale))
    channels = torch.rand(k) * 0.04 + 1e-3
    assert_same(bitmap_int8_linear(x, *weight, bias, channels), reference(x, *weight, bias, channels))


@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 0.9, 1.0])
def test_densities(variant, density):
    weight, x = bitmap_of(torch.rand(40, 1500) < density), activations(20, 1500)
    want = reference(x, *weight)
    for m in (1, 2, 7, 20):
        assert_same(bitmap_int8_linear(x[:m], *weight), want[:m])


# Each row tile of every kernel with each tail, on one and on several stretches of K.
@pytest.mark.parametrize("k", [1, 15, 63, 64, 65, 255, 257, 384, 385, 512, 1024, 1030, 2100])
def test_tails(variant, k):
    weight, x = weights(37, k), activations(19, k)
    want = reference(x, *weight)
    for m in range(1, 20):
        assert_same(bitmap_int8_linear(x[:m], *weight), want[:m])
    bitmask, row_offsets, values, scale = weight
    for n in (1, 2, 3, 4, 5, 15, 16, 17, 18, 33):
        some = bitmask[:n], row_offsets[: n + 1], values[: row_offsets[n]], scale[:n]
        for m in (1, 3, 6, 17):
            assert_same(bitmap_int8_linear(x[:m], *some), want[:m, :n])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 20), st.integers(0, 70), st.integers(0, 700), st.floats(0, 1), st.sampled_from(FLOAT_DTYPES))
def test_any_shape(m, n, k, density, dtype):
    x, weight = activations(m, k).to(dtype), weights(n, k, density)
    bias = torch.randn(n) if n % 2 else None
    want = reference(x, *weight, bias)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            assert_same(bitmap_int8_linear(x, *weight, bias), want)


@pytest.mark.parametrize("m", [1, 3, 7, 20])
@pytest.mark.parametrize("k", [65280, 66400, 133000])
def test_sums_beyond_int32_are_exact(variant, m, k):
    mask = torch.ones(5, k, dtype=torch.bool)
    mask[3, ::2], mask[4] = False, False
    bitmask, row_offsets, values, _ = bitmap_of(mask)
    values[:], values[row_offsets[1] : row_offsets[2]] = -128, 127
    x, weight = torch.ones(m, k), (bitmask, row_offsets, values, torch.full((5,), 2.0**-7))
    want = reference(x, *weight)
    assert_same(bitmap_int8_linear(x, *weight), want)
    assert want[0, 0] == torch.tensor(-127.0 * 128 * k) * (torch.tensor(1.0) / 127 * 2.0**-7)
    assert_same(bitmap_int8_linear(-x, *weight), -want)


@pytest.mark.parametrize("m", [4, 10, 40])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("input_scale", [None, 0.05, torch.linspace(0.01, 0.1, 100)], ids=["own", "one", "channels"])
def test_rows_that_are_not_numbers_do_not_leak(variant, m, dtype, input_scale):
    x, weight, bias = torch.randn(m, 100).to(dtype), weights(30, 100), torch.randn(30)
    clean = bitmap_int8_linear(x, *weight, bias, input_scale)
    x[1, 50], x[2, 3] = torch.nan, -torch.inf
    y = bitmap_int8_linear(x, *weight, bias, input_scale)
    assert y[1:3].isnan().all()
    assert_same(y[0], clean[0])
    assert_same(y[3:], clean[3:])
    assert bitmap_int8_linear(x[1], *weight, bias, input_scale).isnan().all()


@pytest.mark.parametrize("input_scale", [0.0, -0.1, torch.nan, torch.inf, 1e-45, 3e38, 1e-30])
def test_input_scales_at_the_edge(variant, input_scale):
    x, weight = torch.randn(3, 20), weights(6, 20)
    y = bitmap_int8_linear(x, *weight, None, input_scale)
    assert_same(y, reference(x, *weight, None, torch.tensor(input_scale)))
    channels = torch.full((20,), 0.02).index_fill(0, torch.tensor(7), input_scale)  # one of them is enough
    by_channel = bitmap_int8_linear(x, *weight, None, channels)
    assert_same(by_channel, reference(x, *weight, None, channels))
    assert by_channel.isnan().all() == y.isnan().all()


def test_no_inputs_give_the_bias(variant):
    bias, weight = torch.randn(7), weights(7, 0)
    for m in (1, 2, 30):
        assert_same(bitmap_int8_linear(torch.empty(m, 0), *weight, bias), bias.expand(m, 7))


def test_leading_dimensions_and_strides(variant):
    x, (bitmask, row_offsets, values, scale) = torch.randn(3, 40, 2).transpose(1, 2), weights(60, 40)
    weight = bitmask, row_offsets, values, scale
    want = reference(x, *weight)
    assert_same(bitmap_int8_linear(x, *weight), want)
    assert bitmap_int8_linear(x[0, 0], *weight).shape == (60,)
    assert bitmap_int8_linear(x[:0], *weight).shape == (0, 2, 60)
    spread = (bitmask.T.contiguous().T, row_offsets.repeat_interleave(2)[::2], values.repeat_interleave(3)[::3])
    thin = torch.rand(60, 2)
    thin[:, 0] = scale
    assert_same(bitmap_int8_linear(x, *spread, thin[:, 0]), want)
    assert_same(bitmap_int8_linear(x.flip(1), *weight), want.flip(1))


@pytest.mark.parametrize("m", [1, 4, 12, 100])
def test_threads_give_the_same_bits(variant, m):
    x, weight = activations(m, 500), weights(1501, 500)
    y = bitmap_int8_linear(x, *weight)
    try:
        torch.set_num_threads(1)
        assert_same(bitmap_int8_linear(x, *weight), y)
    finally:
        torch.set_num_threads(2)
    assert_same(y, reference(x, *weight))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gradient_goes_straight_through(dtype):
    x, weight = torch.randn(2, 5, 30).to(dtype).requires_grad_(), weights(20, 30)
    bias = torch.randn(20, requires_grad=True)
    grad = torch.randn(2, 5, 20).to(dtype)
    bitmap_int8_linear(x, *weight, bias).backward(grad)
    assert_same(x.grad, (grad.float() @ (dense_of(*weight, 30) * weight[3].unsqueeze(-1))).to(dtype))
    torch.testing.assert_close(bias.grad, grad.float().sum((0, 1)))
    assert x.grad.dtype == dtype and bias.grad.dtype == torch.float32


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x, weight = torch.randn(3, 21, requires_grad=grad), weights(4, 21)
    bias = torch.randn(4, requires_grad=grad)
    for arguments in ((x, *weight), (x, *weight, bias), (x, *weight, bias, torch.tensor(0.02))):
        torch.library.opcheck(torch.ops.engine.bitmap_int8_linear.default, arguments)


def test_compiles():
    x, weight, bias = torch.randn(3, 65), weights(10, 65), torch.randn(10)
    for input_scale in (None, 0.02, torch.rand(65) + 0.01):
        compiled = torch.compile(
            lambda x, s=input_scale: bitmap_int8_linear(x, *weight, bias, s), fullgraph=True, backend="aot_eager"
        )
        assert_same(compiled(x), bitmap_int8_linear(x, *weight, bias, input_scale))


def test_compiled_gradient():
    x, weight = torch.randn(3, 65, requires_grad=True), weights(10, 65)
    torch.compile(lambda x: bitmap_int8_linear(x, *weight), fullgraph=True, backend="aot_eager")(x).sum().backward()
    want = (dense_of(*weight, 65) * weight[3].unsqueeze(-1)).sum(0)
    torch.testing.assert_close(x.grad, want.expand(3, 65))


def test_reference_mode():
    x, weight = torch.randn(3, 65), weights(10, 65)
    with reference_mode():
        assert_same(bitmap_int8_linear(x, *weight), reference(x, *weight))


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


@pytest.mark.parametrize("m", [1, 3, 10, 20])
@pytest.mark.parametrize("expected, bitmask, row_offsets", list(damaged()))
def test_damaged(variant, m, expected, bitmask, row_offsets):
    arguments = torch.randn(m, 13), bitmask, row_offsets, torch.ones(5, dtype=torch.int8), torch.ones(4)
    with pytest.raises(ValueError, match=f"engine.ops.bitmap_int8_linear: {expected}"):
        bitmap_int8_linear(*arguments)
    with pytest.raises((RuntimeError, ValueError), match="bitmap_int8_linear"):  # without a second look
        torch.ops.engine.bitmap_int8_linear(*arguments)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from([1, 2, 7, 16, 19]), st.integers(0, 2**31), st.data())
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

"""What all int8 linear ops must do, whatever the form in which they store the weight: one set of tests for all."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import LINEARS
from stored import FORMS, Form, activations, assert_same, int8_values, ops_called, random_keep
from torch import Tensor

import engine
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES, reference_mode
from engine.ops.int8_quantize import int8_quantize

OPS = {
    "int8_linear": "dense",
    "bitmap_int8_linear": "bitmap",
    "block_int8_linear": "block",
    "semi_structured_int8_linear": "semi_structured",
}


class Case(NamedTuple):
    """An op and its form."""

    name: str
    form: Form

    def __call__(self, x: Tensor, *rest) -> Tensor:
        return getattr(engine.ops, self.name)(x, *rest)

    def reference(self, x: Tensor, *rest) -> Tensor:
        return REFERENCES[self.name](x, *rest)

    def weights(self, n: int, k: int, density: float = 0.5) -> tuple[Tensor, ...]:
        return *self.form.store(int8_values(n, k), random_keep(n, k, density)), torch.rand(n) / 100 + 1e-3

    def dense(self, stored_and_scale: tuple[Tensor, ...], k: int) -> Tensor:
        *stored, scale = stored_and_scale
        return self.form.restore(*stored, scale.shape[0], k)


@pytest.fixture(params=OPS)
def op(request):
    return Case(request.param, FORMS[OPS[request.param]])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_matches_float64(op, dtype):
    x, weight, bias = activations(20, 300).to(dtype), op.weights(40, 300), torch.randn(40)
    dense, scale = op.dense(weight, 300).double(), weight[-1].double()
    q, row_scale = int8_quantize(x)
    q, factor = q.double(), row_scale.double().unsqueeze(-1) * scale
    truth = q @ dense.t() * factor + bias.double()
    error = (op.reference(x, *weight, bias).double() - truth).abs()
    bound = torch.finfo(dtype).eps * truth.abs() + 2e-7 * ((q.abs() @ dense.abs().t()) * factor + bias.abs())
    assert (error <= bound).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_native_is_reference_to_the_bit(variant, op, shape, dtype):
    m, n, k = shape
    x, weight = activations(m, k).to(dtype), op.weights(n, k)
    for bias in (None, torch.randn(n), torch.randn(n).bfloat16(), torch.randn(n).half()):
        assert_same(op(x, *weight, bias), op.reference(x, *weight, bias))
    one, channels = torch.tensor(0.02), torch.rand(k) * 0.04 + 1e-3
    for input_scale in (one, channels):
        assert_same(op(x, *weight, bias, input_scale), op.reference(x, *weight, bias, input_scale))
    assert_same(op(x, *weight, None, 0.02), op.reference(x, *weight, None, one))


# Each row tile of every kernel with each tail, on one and on several stretches of K.
@pytest.mark.parametrize("k", [1, 15, 63, 64, 65, 257, 384, 385, 1030, 2100])
def test_tails(variant, op, k):
    weight, x = op.weights(67, k), activations(31, k)
    want = op.reference(x, *weight)
    for m in (*range(1, 24), 31):
        assert_same(op(x[:m], *weight), want[:m])
    for n in (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 24, 31, 33, 40, 48, 49, 57, 64, 65):
        weight = op.weights(n, k)
        want = op.reference(x, *weight)
        for m in (1, 2, 6, 20, 26):
            assert_same(op(x[:m], *weight), want[:m])


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (11, 300, 1089),
        (12, 520, 1100),
        (16, 150, 255),
        (24, 257, 1023),
        (25, 70, 900),
        (40, 300, 2300),
        (41, 130, 1100),
    ],
)
def test_where_one_kernel_ends_and_another_begins(variant, op, m, n, k):
    weight, x = op.weights(n, k), activations(m, k)
    assert_same(op(x, *weight), op.reference(x, *weight))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(list(OPS)),
    st.integers(0, 40),
    st.integers(0, 140),
    st.integers(0, 900),
    st.floats(0, 1),
    st.sampled_from(FLOAT_DTYPES),
    st.booleans(),
)
def test_any_shape(name, m, n, k, density, dtype, has_bias):
    op = Case(name, FORMS[OPS[name]])
    x, weight = activations(m, k).to(dtype), op.weights(n, k, density)
    bias = torch.randn(n) if has_bias else None
    want = op.reference(x, *weight, bias)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            assert_same(op(x, *weight, bias), want)


@pytest.mark.parametrize("m", [1, 3, 7, 20, 26])
@pytest.mark.parametrize("k", [32640, 65280, 66400, 133000, 264000])
def test_sums_beyond_int32_are_exact(variant, op, m, k):
    dense = torch.full((5, k), -128, dtype=torch.int8)
    dense[1], dense[2], dense[3, ::2] = 127, 1, 127
    weight = *op.form.store(dense, torch.ones(5, k, dtype=torch.bool)), torch.full((5,), 2.0**-7)
    x = torch.ones(m, k)
    want = op.reference(x, *weight)
    assert_same(op(x, *weight), want)
    assert_same(op(-x, *weight), -want)
    total = op.dense(weight, k)[0].double().sum()
    assert want[0, 0] == (127 * total).float() * (torch.tensor(1.0) / 127 * 2.0**-7)


def test_one_tensor_on_meta_is_refused(op):
    arguments = [torch.randn(2, 16), *op.weights(3, 16), torch.randn(3)]
    for i, tensor in enumerate(arguments):
        mixed = [*arguments[:i], tensor.to("meta"), *arguments[i + 1 :]]
        here, there = ("meta", "cpu") if i == 0 else ("cpu", "meta")
        message = f"engine.ops.{op.name}: [a-z_]+: expected a tensor on {here}, as x is, got one on {there}"
        with pytest.raises(RuntimeError, match=message):
            op(*mixed)
    assert op(*(tensor.to("meta") for tensor in arguments)).is_meta


@pytest.mark.parametrize("m", [3, 6, 18])
def test_sums_of_activations_beyond_int32_are_exact(variant, op, m):
    k = 2_200_000
    weight = (
        *op.form.store(torch.full((1, k), 127, dtype=torch.int8), torch.ones(1, k, dtype=torch.bool)),
        torch.ones(1),
    )
    kept = op.dense(weight, k)[0].double().sum()
    y = op(torch.ones(m, k, dtype=torch.bfloat16), *weight)
    assert (y.double() == (kept * 127).float().mul(torch.tensor(1.0) / 127).bfloat16().double()).all()


@pytest.mark.parametrize("m", [4, 10, 40])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("input_scale", [None, 0.05, torch.linspace(0.01, 0.1, 100)], ids=["own", "one", "channels"])
def test_rows_that_are_not_numbers_do_not_leak(variant, op, m, dtype, input_scale):
    x, weight, bias = torch.randn(m, 100).to(dtype), op.weights(30, 100), torch.randn(30)
    clean = op(x, *weight, bias, input_scale)
    x[1, 50], x[2, 3] = torch.nan, -torch.inf
    y = op(x, *weight, bias, input_scale)
    assert y[1:3].isnan().all()
    assert_same(y[0], clean[0])
    assert_same(y[3:], clean[3:])
    assert op(x[1], *weight, bias, input_scale).isnan().all()


@pytest.mark.parametrize("input_scale", [0.0, -0.1, torch.nan, torch.inf, 1e-45, 3e38, 1e-30])
def test_input_scales_at_the_edge(variant, op, input_scale):
    x, weight = torch.randn(3, 20), op.weights(6, 20)
    y = op(x, *weight, None, input_scale)
    assert_same(y, op.reference(x, *weight, None, torch.tensor(input_scale)))
    channels = torch.full((20,), 0.02).index_fill(0, torch.tensor(7), input_scale)  # one of them is enough
    by_channel = op(x, *weight, None, channels)
    assert_same(by_channel, op.reference(x, *weight, None, channels))
    assert by_channel.isnan().all() == y.isnan().all() == (input_scale not in (3e38, 1e-30))


def test_no_inputs_give_the_bias(variant, op):
    bias, weight = torch.randn(7), op.weights(7, 0)
    for m in (1, 2, 30):
        assert_same(op(torch.empty(m, 0), *weight, bias), bias.expand(m, 7))


def test_leading_dimensions_and_strides(variant, op):
    x, weight = torch.randn(3, 400, 2).transpose(1, 2), op.weights(60, 400)
    want = op.reference(x, *weight)
    assert_same(op(x, *weight), want)
    assert_same(op(x.flip(1), *weight), want.flip(1))
    assert op(x[0, 0], *weight).shape == (60,)
    assert op(x[:0], *weight).shape == (0, 2, 60)
    spread = [torch.stack([t, torch.zeros_like(t)], -1)[..., 0] for t in weight]
    assert not spread[0].is_contiguous()
    bias = torch.randn(120)[::2]
    assert_same(op(x, *spread, bias), op.reference(x, *weight, bias))
    assert_same(op(torch.stack([x, x], -1)[..., 1], *weight), want)


# Activations quantised by all threads together, by each for itself, and by each its own rows.
@pytest.mark.parametrize("m, n, k", [(1, 1501, 500), (8, 330, 500), (12, 1501, 500), (100, 300, 500), (300, 330, 200)])
def test_threads_give_the_same_bits(variant, op, m, n, k):
    x, weight = activations(m, k), op.weights(n, k)
    y = op(x, *weight)
    try:
        torch.set_num_threads(1)
        assert_same(op(x, *weight), y)
    finally:
        torch.set_num_threads(2)
    assert_same(y, op.reference(x, *weight))


@pytest.mark.parametrize("op", [name for name in OPS if name != "int8_linear"], indirect=True)
def test_equals_int8_linear_of_the_dense_weight(variant, op):
    x, weight = activations(9, 130), op.weights(33, 130)
    assert_same(op(x, *weight), engine.ops.int8_linear(x, op.dense(weight, 130), weight[-1]))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gradient_goes_straight_through(op, dtype):
    x, weight = torch.randn(2, 5, 30).to(dtype).requires_grad_(), op.weights(20, 30)
    bias, grad = torch.randn(20, requires_grad=True), torch.randn(2, 5, 20).to(dtype)
    op(x, *weight, bias).backward(grad)
    assert_same(x.grad, (grad.float() @ (op.dense(weight, 30) * weight[-1].unsqueeze(-1))).to(dtype))
    torch.testing.assert_close(bias.grad, grad.float().sum((0, 1)))


def test_the_gradient_expands_the_weight_by_its_ops(op):
    y = op(torch.randn(5, 30, requires_grad=True), *op.weights(20, 30))
    called = ops_called(y.sum().backward)
    assert "engine.int8_dequantize.default" in called
    assert op.name == "int8_linear" or f"engine.{OPS[op.name]}_to_dense.default" in called


@pytest.mark.parametrize("m, n", [(0, 20), (3, 0)])
def test_gradients_of_nothing(op, m, n):
    x, bias = torch.randn(m, 30, requires_grad=True), torch.randn(n, requires_grad=True)
    op(x, *op.weights(n, 30), bias).sum().backward()
    assert_same(x.grad, torch.zeros(m, 30))
    assert_same(bias.grad, torch.full((n,), float(m)))


def test_a_scale_for_each_channel(op):
    """The weight holds what the input is divided by: close to the product of floats, and so is its gradient."""
    x, w = torch.randn(40, 96) * torch.logspace(-0.5, 0.5, 96), torch.randn(24, 96)
    channels = x.abs().amax(0) / 127
    q, scale = int8_quantize(w * channels)
    stored = op.form.store(q, torch.ones(24, 96, dtype=torch.bool))
    w = torch.where(op.form.restore(*stored, 24, 96) != 0, w, 0.0)  # what the form could keep
    want = x.double() @ w.double().t()
    x.requires_grad_()
    y = op(x, *stored, scale, None, torch.stack([channels, channels], 1)[:, 0])  # not contiguous
    assert (y - want).norm() < 0.03 * want.norm()
    coming = torch.randn(40, 24)
    y.backward(coming)
    dense = coming @ w
    assert (x.grad - dense).norm() < 0.03 * dense.norm()


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(op, grad):
    x, weight = torch.randn(3, 21, requires_grad=grad), op.weights(4, 21)
    bias, scales = torch.randn(4, requires_grad=grad), (torch.tensor(0.02), torch.rand(21) + 0.01)
    for arguments in ((x, *weight), (x, *weight, bias), *((x, *weight, bias, s) for s in scales)):
        torch.library.opcheck(getattr(torch.ops.engine, op.name).default, arguments)


def test_compiles(op):
    torch._dynamo.reset()  # the ops share the lambda below, and PyTorch stops compiling one again and again
    x, weight, bias = torch.randn(3, 65), op.weights(10, 65), torch.randn(10)
    function = getattr(engine.ops, op.name)
    for input_scale in (None, 0.02, torch.rand(65) + 0.01):
        compiled = torch.compile(
            lambda x, s=input_scale: function(x, *weight, bias, s), fullgraph=True, backend="aot_eager"
        )
        assert_same(compiled(x), function(x, *weight, bias, input_scale))


def test_compiled_gradient(op):
    x, weight = torch.randn(3, 65, requires_grad=True), op.weights(10, 65)
    function = getattr(engine.ops, op.name)
    torch.compile(lambda x: function(x, *weight), fullgraph=True, backend="aot_eager")(x).sum().backward()
    want = (op.dense(weight, 65) * weight[-1].unsqueeze(-1)).sum(0)
    torch.testing.assert_close(x.grad, want.expand(3, 65))


def test_reference_mode(op, monkeypatch):
    monkeypatch.setitem(REFERENCES, op.name, lambda x, *rest: torch.full((3, 10), 7.0))
    x, weight = torch.randn(3, 65), op.weights(10, 65)
    with reference_mode():
        assert (op(x, *weight) == 7).all()
    assert not (op(x, *weight) == 7).all()


@pytest.mark.parametrize("number", [1e39, -1e39, torch.nan, 0.0])
def test_a_number_that_cannot_divide_makes_all_nan(op, number):
    assert op(torch.randn(2, 16), *op.weights(3, 16), None, number).isnan().all()


def test_other_layouts_are_refused(op):
    x, weight = torch.randn(2, 16), op.weights(3, 16)
    for other in (x.to_sparse(), x.to_sparse_csr(), x.to_mkldnn(), torch.nested.nested_tensor([x, x[:1]])):
        with pytest.raises(TypeError, match=f"{op.name}: x: expected a dense tensor, got"):
            op(other, *weight)
    with pytest.raises(TypeError, match=f"{op.name}: scale: expected a dense tensor, got torch.sparse_coo"):
        op(x, *weight[:-1], weight[-1].to_sparse())
    with pytest.raises(TypeError, match=f"{op.name}: x: expected a float32, float16 or bfloat16 tensor, got NoneType"):
        op(None, *weight, None, 0.1)


def test_errors(op):
    x, weight, bias = torch.randn(3, 37), op.weights(4, 37), torch.randn(4)
    *stored, scale = weight
    floats = list(stored)
    floats[op.form.values] = floats[op.form.values].float()
    name = "weight" if op.name == "int8_linear" else "values"
    wrong = {
        r"x: expected a float32.*got torch.float64": (TypeError, (x.double(), *weight)),
        r"x: expected at least one dimension, got \[\]": (ValueError, (torch.tensor(1.0), *weight)),
        rf"{name}: expected a int8 tensor, got torch.float32": (TypeError, (x, *floats, scale)),
        r"scale: expected a float32 tensor, got torch.float16": (TypeError, (x, *stored, scale.half())),
        r"bias: expected a float32.*got torch.int64": (TypeError, (x, *weight, bias.long())),
        r"bias: expected shape \[4\], got \[5\]": (ValueError, (x, *weight, torch.randn(5))),
        r"input_scale: expected one element or shape \[37\], got \[2\]": (
            ValueError,
            (x, *weight, bias, torch.ones(2)),
        ),
        r"input_scale: expected a float32 tensor, got torch.int64": (TypeError, (x, *weight, bias, torch.tensor(1))),
        r"input_scale: expected a float32 tensor, got str": (TypeError, (x, *weight, bias, "0.02")),
    }
    for message, (error, arguments) in wrong.items():
        with pytest.raises(error, match=f"{op.name}: {message}"):
            op(*arguments)
    with pytest.raises(ValueError, match=f"{op.name}: bias: expected shape"):
        getattr(engine.ops, op.name)(x, *weight, bias=torch.randn(5))


@pytest.mark.parametrize("wide", [16, 48, 32])
def test_the_largest_sums_of_blocks(variant, wide):
    """A million products of 127 and 127: no lane of a register may run over."""
    columns = -(-(1 << 20) // wide)
    values = torch.full((columns, 16, wide), 127, dtype=torch.int8)
    crow, col = torch.tensor([0, columns], dtype=torch.int32), torch.arange(columns, dtype=torch.int32)
    y = engine.ops.block_int8_linear(torch.ones(1, 1 << 20), crow, col, values, torch.ones(16), input_scale=1 / 127)
    assert y[0].tolist() == pytest.approx([127.0 * (1 << 20)] * 16)

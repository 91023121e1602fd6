"""What all linear ops of sparse float weights must do, whatever the form: one set of tests for all."""

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import LINEARS, few_outputs
from stored import FORMS, Form, assert_same, ops_called, random_keep
from tolerance import assert_as_good_as_torch
from torch import Tensor

import engine
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES, reference_mode

OPS = {
    "bitmap_linear": "bitmap",
    "csr_linear": "csr",
    "block_linear": "block",
    "semi_structured_linear": "semi_structured",
}


class Case(NamedTuple):
    """An op and its form."""

    name: str
    form: Form

    def arguments(self, stored: tuple[Tensor, ...], n: int) -> tuple:
        """What stands between `x` and `bias`."""
        return (*stored, n) if self.name == "block_linear" else tuple(stored)

    def __call__(self, x: Tensor, stored: tuple[Tensor, ...], n: int, bias: Tensor | None = None) -> Tensor:
        return getattr(engine.ops, self.name)(x, *self.arguments(stored, n), bias)

    def reference(self, x: Tensor, stored: tuple[Tensor, ...], n: int, bias: Tensor | None = None) -> Tensor:
        return REFERENCES[self.name](x, *self.arguments(stored, n), bias)

    def weights(self, n: int, k: int, dtype: torch.dtype = torch.float32, density: float = 0.5) -> tuple[Tensor, ...]:
        return self.form.store(torch.randn(n, k).to(dtype), random_keep(n, k, density))

    def integers(self, n: int, k: int, dtype: torch.dtype, density: float = 0.5) -> tuple[Tensor, ...]:
        """So small that every sum is exact, in whatever order."""
        return self.form.store(torch.randint(-128, 128, (n, k)).to(dtype), random_keep(n, k, density))

    def dense(self, stored: tuple[Tensor, ...], n: int, k: int) -> Tensor:
        return self.form.restore(*stored, n, k)

    def truth(self, x: Tensor, stored: tuple[Tensor, ...], n: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The result in float64, and PyTorch's own in the dtype of `x`."""
        dense = self.dense(stored, n, x.shape[-1])
        y = F.linear(x.double(), dense.double(), None if bias is None else bias.double())
        own = F.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return torch.where(x.isfinite().all(-1, keepdim=True), y, torch.nan), own


@pytest.fixture(params=OPS)
def op(request):
    return Case(request.param, FORMS[OPS[request.param]])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference_matches_float64(op, dtype):
    x, weight, bias = torch.randn(20, 300).to(dtype), op.weights(40, 300), torch.randn(40)
    assert_as_good_as_torch(op.reference(x, weight, 40, bias), *op.truth(x, weight, 40, bias))


@pytest.mark.parametrize("values_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_native_is_as_good_as_torch(variant, op, shape, values_dtype):
    m, n, k = shape
    weight = op.weights(n, k, values_dtype)
    for dtype, bias in zip(FLOAT_DTYPES, (None, torch.randn(n), torch.randn(n).half()), strict=True):
        x = torch.randn(m, k).to(dtype)
        assert_as_good_as_torch(op(x, weight, n, bias), *op.truth(x, weight, n, bias))


def test_sums_of_few_outputs(variant, op):
    for m, n, k in few_outputs(60):
        weight = op.form.store(torch.randn(n, k), torch.rand(n, k) < 0.95)
        x = torch.randn(m, k)
        assert_as_good_as_torch(op(x, weight, n), *op.truth(x, weight, n))


# Here torch's own chains are short: one long chain to a lane would err up to five times as much.
@pytest.mark.parametrize("k", [16_384, 65_536])
def test_long_sums(variant, op, k):
    weight = op.form.store(torch.randn(64, k), torch.ones(64, k, dtype=torch.bool))
    for m in (4, 8, 17):
        x = torch.randn(m, k)
        assert_as_good_as_torch(op(x, weight, 64), *op.truth(x, weight, 64))


# Terms of one sign, of which a stretch of a row holds few: sums of stretches make a chain too.
def test_long_sparse_sums(variant, op):
    k = 20_191
    weight = op.form.store(torch.rand(16, k), torch.rand(16, k) < 0.02)
    for m in (9, 33):
        x = torch.rand(m, k)
        assert_as_good_as_torch(op(x, weight, 16), *op.truth(x, weight, 16))


# Stretches of K, and a tail behind them.
@pytest.mark.parametrize("k", [4096, 4097, 8256, 16_500])
def test_long_rows(variant, op, k):
    x, weight = torch.randint(-8, 9, (20, k)).float(), op.integers(35, k, torch.float32)
    want = op.reference(x, weight, 35)
    for m in (*range(1, 9), 20):
        assert torch.equal(op(x[:m], weight, 35), want[:m])


# Each tile of every kernel with each tail, on one and on several stretches of K.
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("k", [1, 7, 8, 33, 63, 65, 256, 257, 600])
def test_tails(variant, op, k, dtype):
    x = torch.randint(-8, 9, (35, k)).float()
    weight = op.integers(115, k, dtype)
    want = op.reference(x, weight, 115)
    for m in (*range(1, 12), 15, 16, 17, 24, 25, 33, 35):
        assert torch.equal(op(x[:m], weight, 115), want[:m])
    for n in (*range(1, 10), 15, 29, 96, 97, 99):
        weight = op.integers(n, k, dtype)
        want = op.reference(x[:20], weight, n)
        for m in (1, 2, 20):
            assert torch.equal(op(x[:m], weight, n), want[:m])


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(list(OPS)),
    st.integers(0, 40),
    st.integers(0, 140),
    st.integers(0, 700),
    st.sampled_from(FLOAT_DTYPES),
    st.sampled_from(FLOAT_DTYPES),
    st.floats(0, 1),
)
def test_any_shape(name, m, n, k, dtype, values_dtype, density):
    op = Case(name, FORMS[OPS[name]])
    x, weight = torch.randint(-8, 9, (m, k)).to(dtype), op.integers(n, k, values_dtype, density)
    want = op.reference(x, weight, n)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            assert torch.equal(op(x, weight, n), want)


@pytest.mark.parametrize("m", [4, 12, 40])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_rows_that_are_not_numbers_do_not_leak(variant, op, m, dtype):
    x, dense, keep = torch.randn(m, 300).to(dtype), torch.randn(30, 300), torch.rand(30, 300) < 0.5
    keep[:, 3] = False  # an infinity that meets pruned weights alone, where the form leaves the choice
    weight, bias = op.form.store(dense, keep), torch.randn(30)
    clean = op(x, weight, 30, bias)
    x[1, 290], x[2, 3] = torch.nan, -torch.inf
    y = op(x, weight, 30, bias)
    assert y[1:3].isnan().all()
    assert torch.equal(y[0], clean[0]) and torch.equal(y[3:], clean[3:])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_values_that_are_not_numbers_stay_in_their_output(variant, op, m, dtype):
    x, dense = torch.rand(m, 300) + 1, torch.randn(9, 300).to(dtype)
    dense[4], dense[4, ::2] = torch.inf, torch.nan
    y = op(x, op.form.store(dense, torch.ones(9, 300, dtype=torch.bool)), 9)
    assert y[:, 4].isnan().all() and y.isfinite().sum() == 8 * m


def test_no_inputs_give_the_bias(variant, op):
    bias, weight = torch.randn(7), op.weights(7, 0)
    for m in (1, 2, 30):
        assert torch.equal(op(torch.empty(m, 0), weight, 7, bias), bias.expand(m, 7))


def test_leading_dimensions_and_strides(variant, op):
    x, weight = torch.randn(3, 400, 2).transpose(1, 2), op.weights(60, 400)
    want = op(x.contiguous(), weight, 60)
    assert_as_good_as_torch(want, *op.truth(x, weight, 60))
    assert torch.equal(op(x, weight, 60), want)
    assert op(x[0, 0], weight, 60).shape == (60,)
    assert op(x[:0], weight, 60).shape == (0, 2, 60)
    spread = tuple(torch.stack([t, torch.zeros_like(t)], -1)[..., 0] for t in weight)
    assert not spread[0].is_contiguous()
    assert torch.equal(op(x, spread, 60), want)


@pytest.mark.parametrize("m", [1, 3, 100, 700])
def test_threads_give_the_same_bits(variant, op, m):
    x, weight = torch.randn(m, 500), op.weights(300, 500)
    y = op(x, weight, 300)
    try:
        torch.set_num_threads(1)
        assert torch.equal(op(x, weight, 300), y)
    finally:
        torch.set_num_threads(2)
    assert_as_good_as_torch(y, *op.truth(x, weight, 300))


@pytest.mark.parametrize(("dtype", "values_dtype"), list(itertools.product(FLOAT_DTYPES, FLOAT_DTYPES)))
def test_gradients_are_those_of_the_dense_formula(op, dtype, values_dtype):
    stored = list(op.weights(20, 30, values_dtype))
    values = stored[op.form.values].requires_grad_()
    x, bias = torch.randn(2, 5, 30).to(dtype).requires_grad_(), torch.randn(20).requires_grad_()
    grad = torch.randn(2, 5, 20).to(dtype)
    op(x, tuple(stored), 20, bias).backward(grad)

    dense = op.dense([t.detach() for t in stored], 20, 30)
    stored[op.form.values] = torch.arange(1.0, values.numel() + 1).reshape(values.shape)
    places = op.dense(stored, 20, 30).long()  # which value, from 1, stands there

    def dense_gradients(dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, dense, bias)]
        F.linear(*inputs).backward(grad.to(dtype))
        of_values = torch.zeros(values.numel() + 1, dtype=dtype)
        of_values[places.flatten()] = inputs[1].grad.flatten()
        return inputs[0].grad, of_values[1:].reshape(values.shape), inputs[2].grad

    for t, want, own in zip((x, values, bias), *map(dense_gradients, (torch.float64, torch.float32)), strict=True):
        assert_as_good_as_torch(t.grad, want, own.to(t.dtype))


@pytest.mark.parametrize("op", ["block_linear", "semi_structured_linear"], indirect=True)
def test_the_gradient_expands_the_weight_by_its_op(op):
    y = op(torch.randn(5, 30, requires_grad=True), op.weights(20, 30), 20)
    assert f"engine.{OPS[op.name]}_to_dense.default" in ops_called(y.sum().backward)


@pytest.mark.parametrize("op", ["block_linear", "semi_structured_linear"], indirect=True)
def test_second_derivatives_by_expanding(op):
    stored = list(op.weights(20, 33))
    x, values = torch.randn(5, 33, requires_grad=True), stored[op.form.values].requires_grad_()

    def second(y):
        first = torch.autograd.grad(y.square().sum(), (x, values), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, values))

    want = second(F.linear(x, op.dense(stored, 20, 33)))
    torch.testing.assert_close(second(op(x, tuple(stored), 20)), want, rtol=1e-3, atol=1e-3 * want[0].abs().max())


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_gradient_alone(op, wanted):
    stored = op.weights(20, 30)
    x, values = torch.randn(5, 30).requires_grad_(wanted[0]), stored[op.form.values].requires_grad_(wanted[1])
    op(x, stored, 20).sum().backward()
    assert (x.grad is not None, values.grad is not None) == wanted


@pytest.mark.parametrize("m, n", [(0, 20), (3, 0)])
def test_gradients_of_nothing(op, m, n):
    x, bias = torch.randn(m, 30, requires_grad=True), torch.randn(n, requires_grad=True)
    op(x, op.weights(n, 30), n, bias).sum().backward()
    assert_same(x.grad, torch.zeros(m, 30))
    assert_same(bias.grad, torch.full((n,), float(m)))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(op, grad):
    x, stored, bias = torch.randn(3, 24, requires_grad=grad), op.weights(4, 24), torch.randn(4, requires_grad=grad)
    stored[op.form.values].requires_grad_(grad)
    for arguments in ((x, *op.arguments(stored, 4)), (x, *op.arguments(stored, 4), bias)):
        torch.library.opcheck(getattr(torch.ops.engine, op.name).default, arguments)


def test_compiles_with_its_gradients(op):
    stored = op.weights(10, 65)
    tensors = [torch.randn(3, 65), stored[op.form.values], torch.randn(10)]
    function = getattr(engine.ops, op.name)

    def call(x, values, bias):
        weight = (*stored[: op.form.values], values, *stored[op.form.values + 1 :])
        return function(x, *op.arguments(weight, 10), bias)

    def gradients(function):
        x, values, bias = (t.clone().requires_grad_() for t in tensors)
        y = function(x, values, bias)
        y.square().sum().backward()
        return y.detach(), x.grad, values.grad, bias.grad

    for got, want in zip(
        gradients(torch.compile(call, fullgraph=True, backend="aot_eager")), gradients(call), strict=True
    ):
        assert torch.equal(got, want)


def test_reference_mode(op, monkeypatch):
    monkeypatch.setitem(REFERENCES, op.name, lambda x, *rest: torch.full((3, 10), 7.0))
    x, weight = torch.randn(3, 65), op.weights(10, 65)
    with reference_mode():
        assert (op(x, weight, 10) == 7).all()
    assert not (op(x, weight, 10) == 7).all()


def test_second_derivatives(op):
    """The dense formula's, or an error that names the op."""
    x, weight = torch.randn(3, 20, requires_grad=True), op.weights(5, 20)
    (grad,) = torch.autograd.grad(op(x, weight, 5).square().sum(), x, create_graph=True)
    if op.name in ("bitmap_linear", "csr_linear"):
        with pytest.raises(RuntimeError, match=f"engine.ops.{op.name} has no second derivative"):
            grad.sum().backward()
    else:
        dense = op.dense(weight, 5, 20)
        torch.testing.assert_close(torch.autograd.grad(grad.sum(), x)[0], 2 * torch.ones(3, 20) @ dense.t() @ dense)


def test_forward_mode_derivatives_are_refused(op):
    """By the op itself too, which has no function of Python's before it."""
    x, arguments = torch.randn(3, 20), op.arguments(op.weights(5, 20), 5)
    direct = getattr(torch.ops.engine, op.name)
    for transform in (torch.func.jvp, lambda f, x, t: torch.func.jacfwd(f)(*x)):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=f"{op.name} has no forward-mode"):
                transform(lambda x: direct(x, *arguments), (x,), (torch.ones_like(x),))


def test_errors(op):
    x, weight, bias = torch.randn(3, 24), op.weights(4, 24), torch.randn(4)
    ints = list(weight)
    ints[op.form.values] = ints[op.form.values].to(torch.int8)
    wrong = {
        r"x: expected a float32.*got torch.float64": (TypeError, (x.double(), weight, 4)),
        r"x: expected at least one dimension, got \[\]": (ValueError, (torch.tensor(1.0), weight, 4)),
        r"values: expected a float32.*got torch.int8": (TypeError, (x, ints, 4)),
        r"bias: expected a float32.*got torch.int64": (TypeError, (x, weight, 4, bias.long())),
        r"bias: expected shape \[4\], got \[5\]": (ValueError, (x, weight, 4, torch.randn(5))),
    }
    for message, (error, arguments) in wrong.items():
        with pytest.raises(error, match=f"{op.name}: {message}"):
            op(*arguments)

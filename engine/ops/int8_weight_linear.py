"""int8_weight_linear: a linear layer whose weight is int8 and whose activations stay float."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._library import define
from engine.ops._linear import DENSE_AT_ONCE, bias_gradient, check_bias, check_rows


def _check_arguments(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
    op = "int8_weight_linear"
    _check.is_float(op, "x", x)
    _check.is_dtype(op, "weight", weight, torch.int8)
    _check.is_dtype(op, "scale", scale, torch.float32)
    _check.has_shape(op, "weight", weight, ("N", "K"))
    n, k = weight.shape
    _check.expect(x.dim() >= 1 and x.shape[-1] == k, op, "x", f"shape [..., {k}]", list(x.shape))
    _check.has_shape(op, "scale", scale, (n,))
    check_bias(op, bias, n)


def _reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_arguments(x, weight, scale, bias)
    y = (x.float() @ weight.float().t() + 0.0) * scale  # as in _linear.py, never -0.0
    if bias is not None:
        y = y + bias.float()
    return torch.where(x.isfinite().all(-1, keepdim=True), y, torch.nan).to(x.dtype)


def _fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_arguments(x, weight, scale, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    _, weight, scale, bias = inputs
    ctx.save_for_backward(weight, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
    weight, scale = ctx.saved_tensors
    grad_x = _backward_input_op(grad, weight, scale) if ctx.needs_input_grad[0] else None
    grad_bias = bias_gradient(ctx, grad, place=3)
    return grad_x, None, None, grad_bias


_op = define(
    "int8_weight_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor",
    check=_check_arguments,
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def int8_weight_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`(x @ weight.T) * scale + bias` in fp32 arithmetic: only the weight is quantised.

    Where `x` is bfloat16 and the processor multiplies pairs of such (AVX512_BF16), that instruction is used, for which
    numbers below fp32's smallest normal one (2^-126) are zero, sums too.

    A row of `x` that holds a NaN or an infinity makes its row of `y` NaN, and no other.

    Has gradients for `x` and `bias`; second derivatives are refused.

    Args:
        x: `[..., K]`, float32, float16 or bfloat16.
        weight: int8 `[N, K]`; any value, -128 too.
        scale: float32 `[N]`.
        bias: `[N]`, float32, float16 or bfloat16.

    Returns:
        `[..., N]` of the dtype of `x`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: the shapes do not fit.
    """
    return _op(x, weight, scale, bias)


# The gradient's op. It goes through the weight block by block, so that it never lies in memory as fp32 as a whole.


def _backward_input(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    op = "int8_weight_linear_backward_input"
    _check.is_dtype(op, "weight", weight, torch.int8)
    n, k = weight.shape
    _check.has_shape(op, "scale", scale, (n,))
    scaled = check_rows(op, "grad", grad, n) * scale
    total = scaled.new_zeros(scaled.shape[0], k)
    step = max(1, DENSE_AT_ONCE // max(1, k))
    for begin in range(0, n, step):
        total.addmm_(scaled[:, begin : begin + step], weight[begin : begin + step].float())
    return total.reshape(*grad.shape[:-1], k).to(grad.dtype)


def _fake_backward_input(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


_backward_input_op = define(
    "int8_weight_linear_backward_input(Tensor grad, Tensor weight, Tensor scale) -> Tensor",
    reference=_backward_input,
    fake=_fake_backward_input,
)

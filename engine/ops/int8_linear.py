"""int8_linear: a linear layer whose weight is int8 and whose activations are quantised on the fly."""

import torch
from torch import Tensor

from engine.ops import _check, _scaled_mm  # noqa: F401  (defines the op that its kernels for CUDA call)
from engine.ops._library import REFERENCES
from engine.ops._patches import define_with_patches


def _check_arguments(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, input_scale: Tensor | float | None = None
) -> None:
    op = "int8_linear"
    _check.is_float(op, "x", x)
    _check.is_dtype(op, "weight", weight, torch.int8)
    _check.is_dtype(op, "scale", scale, torch.float32)
    _check.has_shape(op, "weight", weight, ("N", "K"))
    n, k = weight.shape
    _check.expect(x.dim() >= 1 and x.shape[-1] == k, op, "x", f"shape [..., {k}]", list(x.shape))
    _check.has_shape(op, "scale", scale, (n,))
    if bias is not None:
        _check.is_float(op, "bias", bias)
        _check.has_shape(op, "bias", bias, (n,))
    if input_scale is not None and not isinstance(input_scale, float | int):
        check_input_scale(op, input_scale, k)


def check_input_scale(op: str, input_scale: Tensor, k: int) -> None:
    """Raises unless `input_scale` is float32, of one element or `[K]`."""
    _check.is_dtype(op, "input_scale", input_scale, torch.float32)
    fits = input_scale.numel() == 1 or tuple(input_scale.shape) == (k,)
    _check.expect(fits, op, "input_scale", f"one element or shape [{k}]", list(input_scale.shape))


def _quantize_by(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """`x` by the one given scale, or by one for each channel: `q` and a scale a row.

    The row's scale is the one given, or 1 where each channel has its own; NaN (and `q` 0) where it is not finite.
    """
    s = input_scale.reshape(()) if input_scale.numel() == 1 else input_scale
    inverse = torch.full_like(s, 1) / s
    usable = ((s > 0) & s.isfinite() & inverse.isfinite()).all()  # by any other scale the result is NaN
    values = x.float()
    finite = values.isfinite().all(-1) & usable
    q = torch.where(finite.unsqueeze(-1), values * inverse, 0.0).round().clamp(-127, 127)
    return q, torch.where(finite, s if s.dim() == 0 else s.new_ones(()), torch.nan)


def _reference(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, input_scale: Tensor | None = None
) -> Tensor:
    _check_arguments(x, weight, scale, bias, input_scale)
    q, row_scale = REFERENCES["int8_quantize"](x) if input_scale is None else _quantize_by(x, input_scale)
    # float64 holds these sums exactly; rounded once, to fp32. Of one column they may be -0.0, integers not.
    acc = (q.double() @ weight.double().t() + 0.0).float()
    y = acc * (row_scale.unsqueeze(-1) * scale)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def _fake(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, input_scale: Tensor | None = None
) -> Tensor:
    _check_arguments(x, weight, scale, bias, input_scale)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], output: Tensor) -> None:
    x, weight, scale, bias, input_scale = inputs
    ctx.save_for_backward(
        weight, scale, *([input_scale] if input_scale is not None and input_scale.numel() != 1 else [])
    )
    ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
    """Straight through the quantisation: as if `x` had been multiplied by the dequantised weight."""
    weight, scale, *channels = ctx.saved_tensors
    grad = grad.float()
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ (weight * scale.unsqueeze(-1))
        grad_x = (grad_x / channels[0] if channels else grad_x).to(ctx.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:  # left out, bias may have no place in the tuple
        grad_bias = grad.reshape(-1, weight.shape[0]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None


_op, int8_linear_of_patches = define_with_patches(
    "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, Tensor? input_scale=None) -> Tensor",
    check=_check_arguments,
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | float | None = None,
) -> Tensor:
    """`x @ (weight * scale).T + bias` with `x` quantised to int8, so that the products are of integers.

    Each row of `x` is quantised as by :func:`engine.ops.int8_quantize`, or by `input_scale` where it is given:
    `q = clamp(round_half_even(x * (1 / input_scale)), -127, 127)`. With one scale for each channel (the
    weight then stands for `w * input_scale`) `s_x` is 1. The integer sum is exact for every K, and
    `y = sum * (s_x * s_w) + bias` is evaluated in fp32 in that order, then cast: the same to the bit on every backend.
    A row of `x` that holds a NaN or an infinity makes its row of `y` NaN, and no other; so does, for every row, an
    `input_scale` that is not positive, or it or its reciprocal not finite.

    Has gradients for `x` and `bias`, straight through the quantisation.

    Args:
        x: `[..., K]`, float32, float16 or bfloat16.
        weight: int8 `[N, K]`; any value, -128 too.
        scale: float32 `[N]`.
        bias: `[N]`, float32, float16 or bfloat16.
        input_scale: one scale for all of `x` (static quantisation), a float32 tensor of one element or a float; or
            float32 `[K]`, one for each channel.

    Returns:
        `[..., N]` of the dtype of `x`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: the shapes do not fit.
    """
    if input_scale is not None and isinstance(input_scale, float | int):  # most often None
        input_scale = torch.full((), input_scale, dtype=torch.float32, device=x.device)
    return _op(x, weight, scale, bias, input_scale)

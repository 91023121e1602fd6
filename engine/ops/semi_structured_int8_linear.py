"""semi_structured_int8_linear: a linear layer whose 2:4 weight is int8, activations quantised on the fly."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._library import REFERENCES
from engine.ops._patches import define_with_patches
from engine.ops._semi_structured import check_semi_structured, check_semi_structured_metadata, spread
from engine.ops.int8_linear import check_input_scale  # defines the reference that this one builds on, too

OP = "semi_structured_int8_linear"


def _check_metadata(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | float | None = None,
) -> None:
    _check.is_float(OP, "x", x)
    _check.expect(x.dim() >= 1, OP, "x", "at least one dimension", list(x.shape))
    _check.is_dtype(OP, "values", values, torch.int8)
    check_semi_structured_metadata(OP, values, metadata, x.shape[-1])
    n = values.shape[0]
    _check.is_dtype(OP, "scale", scale, torch.float32)
    _check.has_shape(OP, "scale", scale, (n,))
    if bias is not None:
        _check.is_float(OP, "bias", bias)
        _check.has_shape(OP, "bias", bias, (n,))
    if input_scale is not None and not isinstance(input_scale, float | int):
        check_input_scale(OP, input_scale, x.shape[-1])


def _check_arguments(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | float | None = None,
) -> None:
    _check_metadata(x, values, metadata, scale, bias, input_scale)
    check_semi_structured(OP, values, metadata, x.shape[-1])


def _reference(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    _check_arguments(x, values, metadata, scale, bias, input_scale)
    weight = spread(values, metadata)[:, : x.shape[-1]]
    return REFERENCES["int8_linear"](x, weight, scale, bias, input_scale)


def _fake(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    _check_metadata(x, values, metadata, scale, bias, input_scale)
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, values, metadata, scale, bias, input_scale = inputs
    channels = [input_scale] if input_scale is not None and input_scale.numel() != 1 else []
    ctx.save_for_backward(values, metadata, scale, *channels)
    ctx.columns, ctx.dtype, ctx.bias_dtype = x.shape[-1], x.dtype, None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None, None]:
    """Straight through the quantisation: as if `x` had been multiplied by the dequantised weight."""
    values, metadata, scale, *channels = ctx.saved_tensors
    grad = grad.float()
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = spread(values, metadata)[:, : ctx.columns]
        grad_x = grad @ (weight * scale.unsqueeze(-1))
        grad_x = (grad_x / channels[0] if channels else grad_x).to(ctx.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:  # left out, bias may have no place in the tuple
        grad_bias = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None


_op, semi_structured_int8_linear_of_patches = define_with_patches(
    "semi_structured_int8_linear(Tensor x, Tensor values, Tensor metadata, Tensor scale, Tensor? bias=None,"
    " Tensor? input_scale=None) -> Tensor",
    check=_check_arguments,
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def semi_structured_int8_linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | float | None = None,
) -> Tensor:
    """:func:`engine.ops.int8_linear` of a 2:4 weight, read in its compressed form.

    Equal to the bit to `int8_linear(x, weight, ...)` with `weight = semi_structured_to_dense(values, metadata, K)`, for
    every `x`: the same quantisation, sums exact for every K, `y = sum * (s_x * s_w) + bias` in fp32, and NaN for a row
    of `x` that holds a NaN or an infinity.

    The metadata is not checked while it is read: places that do not ascend give a meaningless result, though nothing
    is read out of bounds. Formats check theirs when they are loaded.

    Has gradients for `x` and `bias`, straight through the quantisation.

    Args:
        x: `[..., K]`, float32, float16 or bfloat16.
        values: int8 `[N, 2 * ceil(K / 4)]`; any value, -128 too.
        metadata: uint8 `[N, ceil(K / 8)]`, as :func:`engine.ops.prune_to_semi_structured` gives it.
        scale: float32 `[N]`.
        bias: `[N]`, float32, float16 or bfloat16.
        input_scale: as for :func:`engine.ops.int8_linear`.

    Returns:
        `[..., N]` of the dtype of `x`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: the shapes do not fit.
    """
    if input_scale is not None and isinstance(input_scale, float | int):  # most often None
        input_scale = torch.full((), input_scale, dtype=torch.float32, device=x.device)
    return _op(x, values, metadata, scale, bias, input_scale)

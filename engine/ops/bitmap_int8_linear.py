"""bitmap_int8_linear: a linear layer of a pruned int8 weight, multiplied as its bitmap holds it."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._bitmap import bitmap_mask, check_bitmap, check_bitmap_metadata
from engine.ops._library import REFERENCES
from engine.ops._patches import define_with_patches
from engine.ops.bitmap_to_dense import bitmap_to_dense
from engine.ops.int8_linear import check_input_scale  # (its module defines the reference that this one builds on)

OP = "bitmap_int8_linear"


def _check_metadata(
    x: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | float | None = None,
) -> None:
    _check.is_float(OP, "x", x)
    _check.expect(x.dim() >= 1, OP, "x", "at least one dimension", list(x.shape))
    _check.is_dtype(OP, "values", values, torch.int8)
    check_bitmap_metadata(OP, bitmask, row_offsets, values, x.shape[-1])
    n = bitmask.shape[0]
    _check.is_dtype(OP, "scale", scale, torch.float32)
    _check.has_shape(OP, "scale", scale, (n,))
    if bias is not None:
        _check.is_float(OP, "bias", bias)
        _check.has_shape(OP, "bias", bias, (n,))
    if input_scale is not None and not isinstance(input_scale, float | int):
        check_input_scale(OP, input_scale, x.shape[-1])


def _check_arguments(
    x: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | float | None = None,
) -> None:
    _check_metadata(x, bitmask, row_offsets, values, scale, bias, input_scale)
    check_bitmap(OP, bitmask, row_offsets, values, x.shape[-1])


def _reference(
    x: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    _check_arguments(x, bitmask, row_offsets, values, scale, bias, input_scale)
    weight = values.new_zeros(bitmask.shape[0], x.shape[-1])
    weight[bitmap_mask(bitmask, x.shape[-1])] = values
    return REFERENCES["int8_linear"](x, weight, scale, bias, input_scale)


def _fake(
    x: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    _check_metadata(x, bitmask, row_offsets, values, scale, bias, input_scale)
    return x.new_empty((*x.shape[:-1], bitmask.shape[0]))


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, bitmask, row_offsets, values, scale, bias, input_scale = inputs
    by_channel = input_scale is not None and input_scale.numel() != 1
    ctx.save_for_backward(bitmask, row_offsets, values, scale, *([input_scale] if by_channel else []))
    ctx.columns, ctx.dtype, ctx.bias_dtype = x.shape[-1], x.dtype, None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, None, None, None, Tensor | None, None]:
    """Straight through the quantisation: as if `x` had been multiplied by the dequantised weight."""
    bitmask, row_offsets, values, scale, *channels = ctx.saved_tensors
    grad = grad.float()
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = bitmap_to_dense(bitmask, row_offsets, values, ctx.columns)
        grad_x = grad @ (weight * scale.unsqueeze(-1))
        grad_x = (grad_x / channels[0] if channels else grad_x).to(ctx.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:  # left out, bias may have no place in the tuple
        grad_bias = grad.reshape(-1, bitmask.shape[0]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, None


_op, bitmap_int8_linear_of_patches = define_with_patches(
    "bitmap_int8_linear(Tensor x, Tensor bitmask, Tensor row_offsets, Tensor values, Tensor scale, Tensor? bias=None,"
    " Tensor? input_scale=None) -> Tensor",
    check=_check_arguments,
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def bitmap_int8_linear(
    x: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | float | None = None,
) -> Tensor:
    """:func:`engine.ops.int8_linear` of the weight that a bitmap holds, read in its compressed form.

    Equal to the bit to `int8_linear(x, weight, ...)` with `weight = bitmap_to_dense(bitmask, row_offsets, values, K)`,
    for every `x`: the same quantisation, sums exact for every K, `y = sum * (s_x * s_w) + bias` in fp32, and NaN for a
    row of `x` that holds a NaN or an infinity. The bitmap is checked while it is read.

    Has gradients for `x` and `bias`, straight through the quantisation.

    On CUDA nothing waits for the GPU, so that a bitmap whose data do not fit together raises no error there: the
    outputs of the rows that it is wrong about are NaN.

    Args:
        x: `[..., K]`, float32, float16 or bfloat16.
        bitmask: uint8 `[N, ceil(K / 8)]`, the least significant bit first.
        row_offsets: int64 `[N + 1]`, where each row's values begin.
        values: int8 `[nnz]`, row after row; any value, -128 too.
        scale: float32 `[N]`.
        bias: `[N]`, float32, float16 or bfloat16.
        input_scale: as in :func:`engine.ops.int8_linear`: one element, or `[K]`.

    Returns:
        `[..., N]` of the dtype of `x`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: the shapes do not fit, `row_offsets` does not run from 0 to nnz without a step back, a row has more
            or fewer bits set than values, or a bit beyond K is set.
    """
    if input_scale is not None and isinstance(input_scale, float | int):  # most often None
        input_scale = torch.full((), input_scale, dtype=torch.float32, device=x.device)
    return _op(x, bitmask, row_offsets, values, scale, bias, input_scale)

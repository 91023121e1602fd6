"""block_int8_linear: a linear layer of whose int8 weight only some blocks are kept."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._block import check_block, check_block_metadata, from_blocks
from engine.ops._library import REFERENCES
from engine.ops._patches import define_with_patches
from engine.ops.int8_linear import check_input_scale  # defines the reference that this one builds on, too

OP = "block_int8_linear"


def _check_metadata(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | float | None = None,
) -> None:
    _check.is_float(OP, "x", x)
    _check.expect(x.dim() >= 1, OP, "x", "at least one dimension", list(x.shape))
    _check.is_dtype(OP, "values", values, torch.int8)
    _check.is_dtype(OP, "scale", scale, torch.float32)
    _check.has_shape(OP, "scale", scale, ("N",))
    n = scale.shape[0]
    check_block_metadata(OP, crow_indices, col_indices, values, n, x.shape[-1])
    if bias is not None:
        _check.is_float(OP, "bias", bias)
        _check.has_shape(OP, "bias", bias, (n,))
    if input_scale is not None and not isinstance(input_scale, float | int):
        check_input_scale(OP, input_scale, x.shape[-1])


def _check_arguments(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | float | None = None,
) -> None:
    _check_metadata(x, crow_indices, col_indices, values, scale, bias, input_scale)
    check_block(OP, crow_indices, col_indices, values.shape[2], x.shape[-1])


def _reference(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    _check_arguments(x, crow_indices, col_indices, values, scale, bias, input_scale)
    weight = from_blocks(crow_indices, col_indices, values, scale.shape[0], x.shape[-1])
    return REFERENCES["int8_linear"](x, weight, scale, bias, input_scale)


def _fake(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    _check_metadata(x, crow_indices, col_indices, values, scale, bias, input_scale)
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, crow_indices, col_indices, values, scale, bias, input_scale = inputs
    channels = [input_scale] if input_scale is not None and input_scale.numel() != 1 else []
    ctx.save_for_backward(crow_indices, col_indices, values, scale, *channels)
    ctx.columns, ctx.dtype, ctx.bias_dtype = x.shape[-1], x.dtype, None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, None, None, None, Tensor | None, None]:
    """Straight through the quantisation: as if `x` had been multiplied by the dequantised weight."""
    crow_indices, col_indices, values, scale, *channels = ctx.saved_tensors
    grad = grad.float()
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = from_blocks(crow_indices, col_indices, values, scale.shape[0], ctx.columns)
        grad_x = grad @ (weight * scale.unsqueeze(-1))
        grad_x = (grad_x / channels[0] if channels else grad_x).to(ctx.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:  # left out, bias may have no place in the tuple
        grad_bias = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, None


_op, block_int8_linear_of_patches = define_with_patches(
    "block_int8_linear(Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, Tensor scale,"
    " Tensor? bias=None, Tensor? input_scale=None) -> Tensor",
    check=_check_arguments,
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def block_int8_linear(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | float | None = None,
) -> Tensor:
    """:func:`engine.ops.int8_linear` of a weight of which only the kept blocks are stored, and only they are computed.

    Equal to the bit to `int8_linear(x, weight, ...)` with `weight = block_to_dense(..., N, K)`, for every `x`: the same
    quantisation, sums exact for every K, `y = sum * (s_x * s_w) + bias` in fp32, and NaN for a row of `x` that holds a
    NaN or an infinity.

    Has gradients for `x` and `bias`, straight through the quantisation.

    Args:
        x: `[..., K]`, float32, float16 or bfloat16.
        crow_indices: int32 `[ceil(N / R) + 1]`, where each row of blocks begins.
        col_indices: int32 `[B]`, the column of blocks in which each stands, ascending.
        values: int8 `[B, R, C]`; any value, -128 too. What a block holds beyond N and K does not count.
        scale: float32 `[N]`.
        bias: `[N]`, float32, float16 or bfloat16.
        input_scale: as for :func:`engine.ops.int8_linear`.

    Returns:
        `[..., N]` of the dtype of `x`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: the shapes do not fit, `crow_indices` does not run from 0 to B without a step back, or a column of
            blocks lies outside the matrix or does not ascend.
    """
    if input_scale is not None and isinstance(input_scale, float | int):  # most often None
        input_scale = torch.full((), input_scale, dtype=torch.float32, device=x.device)
    return _op(x, crow_indices, col_indices, values, scale, bias, input_scale)

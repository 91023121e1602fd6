"""block_int8_linear: a linear layer of whose int8 weight only some blocks are kept."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._block import check_block, check_block_metadata, from_blocks
from engine.ops._int8_linear import as_tensor, define_int8_linear
from engine.ops.block_to_dense import block_to_dense

OP = "block_int8_linear"


def _check_metadata(x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, scale: Tensor) -> None:
    _check.is_dtype(OP, "values", values, torch.int8)
    _check.is_dtype(OP, "scale", scale, torch.float32)
    _check.has_shape(OP, "scale", scale, ("N",))
    check_block_metadata(OP, crow_indices, col_indices, values, scale.shape[0], x.shape[-1])


_op, block_int8_linear_of_patches = define_int8_linear(
    "block_int8_linear(Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, Tensor scale,"
    " Tensor? bias=None, Tensor? input_scale=None) -> Tensor",
    check_metadata=_check_metadata,
    check_data=lambda crow, col, values, columns: check_block(OP, crow, col, values.shape[2], columns),
    to_dense=from_blocks,
    to_dense_quickly=block_to_dense,
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
    return _op(x, crow_indices, col_indices, values, scale, bias, as_tensor(input_scale, x))

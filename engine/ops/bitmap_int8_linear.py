"""bitmap_int8_linear: a linear layer of a pruned int8 weight, multiplied as its bitmap holds it."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._bitmap import bitmap_mask, check_bitmap, check_bitmap_metadata
from engine.ops._int8_linear import as_tensor, define_int8_linear
from engine.ops.bitmap_to_dense import bitmap_to_dense

OP = "bitmap_int8_linear"


def _check_metadata(x: Tensor, bitmask: Tensor, row_offsets: Tensor, values: Tensor, scale: Tensor) -> None:
    _check.is_dtype(OP, "values", values, torch.int8)
    check_bitmap_metadata(OP, bitmask, row_offsets, values, x.shape[-1])
    _check.is_dtype(OP, "scale", scale, torch.float32)
    _check.has_shape(OP, "scale", scale, (bitmask.shape[0],))


def _to_dense(bitmask: Tensor, row_offsets: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    weight = values.new_zeros(rows, columns)
    weight[bitmap_mask(bitmask, columns)] = values
    return weight


_op, bitmap_int8_linear_of_patches = define_int8_linear(
    "bitmap_int8_linear(Tensor x, Tensor bitmask, Tensor row_offsets, Tensor values, Tensor scale, Tensor? bias=None,"
    " Tensor? input_scale=None) -> Tensor",
    check_metadata=_check_metadata,
    check_data=lambda *bitmap: check_bitmap(OP, *bitmap),
    to_dense=_to_dense,
    to_dense_quickly=lambda *bitmap: bitmap_to_dense(*bitmap[:3], bitmap[-1]),
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
    return _op(x, bitmask, row_offsets, values, scale, bias, as_tensor(input_scale, x))

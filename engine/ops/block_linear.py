"""block_linear: a linear layer of whose weight only some blocks are kept, with float values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._block import check_block, check_block_metadata, collect_blocks, from_blocks
from engine.ops._float_linear import define_float_linear
from engine.ops._linear import as_rows
from engine.ops.block_to_dense import block_to_dense

OP = "block_linear"


def _input_gradient(
    grad: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, rows: int, columns: int
) -> Tensor:
    weight = block_to_dense(crow_indices, col_indices, values.float(), rows, columns)
    return (grad.float() @ weight).to(grad.dtype)


def _values_gradient(
    grad: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    rows: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return collect_blocks(as_rows(grad).t() @ as_rows(x), crow_indices, col_indices, shape).to(dtype)


_op = define_float_linear(
    "block_linear(Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, SymInt rows, Tensor? bias=None)"
    " -> Tensor",
    check_metadata=lambda *blocks: check_block_metadata(OP, *blocks),
    check_data=lambda crow, col, values, rows, columns: check_block(OP, crow, col, values.shape[2], columns),
    row_count=lambda crow, col, values, rows: rows,
    to_dense=lambda crow, col, values, rows, columns: from_blocks(crow, col, values.float(), rows, columns),
    input_gradient=_input_gradient,
    values_gradient=_values_gradient,
)


def block_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, rows: int, bias: Tensor | None = None
) -> Tensor:
    """`x @ weight.T + bias` in fp32 arithmetic, of which only the kept blocks are computed.

    Where `x` and `values` both are bfloat16 and the processor multiplies pairs of such (AVX512_BF16), that instruction
    may be used, for which numbers below fp32's smallest normal one (2^-126) are zero, sums too.

    A row of `x` that holds a NaN or an infinity makes its row of `y` NaN, and no other.

    Has gradients for `x`, `values` (of kept blocks alone) and `bias`; the weight is dense for their length.

    Args:
        x: `[..., K]`, float32, float16 or bfloat16.
        crow_indices: int32 `[ceil(rows / R) + 1]`, where each row of blocks begins.
        col_indices: int32 `[B]`, the column of blocks in which each stands, ascending.
        values: `[B, R, C]`, float32, float16 or bfloat16; need not be of the dtype of `x`. What a block holds beyond N
            and K is not read.
        rows: N, which the blocks leave open.
        bias: `[N]`, float32, float16 or bfloat16.

    Returns:
        `[..., N]` of the dtype of `x`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: the shapes do not fit, `crow_indices` does not run from 0 to B without a step back, or a column of
            blocks lies outside the matrix or does not ascend.
    """
    _check.expect(not isinstance(rows, Tensor), OP, "rows", "an int", "a tensor", TypeError)  # a bias, say
    return _op(x, crow_indices, col_indices, values, rows, bias)

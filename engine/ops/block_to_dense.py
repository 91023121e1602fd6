"""block_to_dense: kept blocks back at their places, zeros elsewhere."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._block import check_block, check_block_metadata, collect_blocks, from_blocks
from engine.ops._library import define, explained_by

DTYPES = (*_check.FLOAT_DTYPES, torch.int8)
OP = "block_to_dense"


def _check_metadata(crow_indices: Tensor, col_indices: Tensor, values: Tensor, rows: int, columns: int) -> None:
    _check.is_dtype(OP, "values", values, *DTYPES)
    check_block_metadata(OP, crow_indices, col_indices, values, rows, columns)


def _check_arguments(crow_indices: Tensor, col_indices: Tensor, values: Tensor, rows: int, columns: int) -> None:
    _check_metadata(crow_indices, col_indices, values, rows, columns)
    check_block(OP, crow_indices, col_indices, values.shape[2], columns)


def _reference(crow_indices: Tensor, col_indices: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    _check_arguments(crow_indices, col_indices, values, rows, columns)
    return from_blocks(crow_indices, col_indices, values, rows, columns).contiguous()


def _fake(crow_indices: Tensor, col_indices: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    _check_metadata(crow_indices, col_indices, values, rows, columns)
    return values.new_empty((rows, columns))


def _setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor, int, int], output: Tensor) -> None:
    crow_indices, col_indices, values, *_ = inputs
    ctx.save_for_backward(crow_indices, col_indices)
    ctx.shape = values.shape


def _backward(ctx, grad: Tensor) -> tuple[None, None, Tensor, None, None]:
    crow_indices, col_indices = ctx.saved_tensors
    return None, None, collect_blocks(grad, crow_indices, col_indices, ctx.shape), None, None


_op = define(
    "block_to_dense(Tensor crow_indices, Tensor col_indices, Tensor values, SymInt rows, SymInt columns) -> Tensor",
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


@explained_by(_check_arguments)
def block_to_dense(crow_indices: Tensor, col_indices: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    """Spreads kept blocks over a dense matrix. What does not fit together is refused.

    Has a gradient for `values`.

    Args:
        crow_indices: int32 `[ceil(rows / R) + 1]`, where each row of blocks begins.
        col_indices: int32 `[B]`, the column of blocks in which each stands, ascending.
        values: `[B, R, C]`, float32, float16, bfloat16 or int8.
        rows: N, which the blocks leave open.
        columns: K.

    Returns:
        `[rows, columns]` of the dtype of `values`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: the shapes do not fit, `crow_indices` does not run from 0 to B without a step back, or a column of
            blocks lies outside the matrix or does not ascend.
    """
    return _op(crow_indices, col_indices, values, rows, columns)

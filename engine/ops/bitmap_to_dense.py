"""bitmap_to_dense: a bitmap's values back at their places, zeros elsewhere."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._bitmap import bitmap_mask, check_bitmap, check_bitmap_metadata
from engine.ops._library import define, explained_by

DTYPES = (*_check.FLOAT_DTYPES, torch.int8)


def _check_metadata(op: str, bitmask: Tensor, row_offsets: Tensor, values: Tensor, columns: int) -> None:
    _check.is_dtype(op, "values", values, *DTYPES)
    check_bitmap_metadata(op, bitmask, row_offsets, values, columns)


def _check_arguments(bitmask: Tensor, row_offsets: Tensor, values: Tensor, columns: int) -> None:
    _check_metadata("bitmap_to_dense", bitmask, row_offsets, values, columns)
    check_bitmap("bitmap_to_dense", bitmask, row_offsets, values, columns)


def _reference(bitmask: Tensor, row_offsets: Tensor, values: Tensor, columns: int) -> Tensor:
    _check_arguments(bitmask, row_offsets, values, columns)
    dense = values.new_zeros(bitmask.shape[0], columns)
    dense[bitmap_mask(bitmask, columns)] = values
    return dense


def _fake(bitmask: Tensor, row_offsets: Tensor, values: Tensor, columns: int) -> Tensor:
    _check_metadata("bitmap_to_dense", bitmask, row_offsets, values, columns)
    return values.new_empty((bitmask.shape[0], columns))


def _setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    bitmask, row_offsets, values, _ = inputs
    ctx.save_for_backward(bitmask, row_offsets)
    ctx.nnz = values.shape[0]


def _backward(ctx, grad: Tensor) -> tuple[None, None, Tensor, None]:
    bitmask, row_offsets = ctx.saved_tensors
    return None, None, _gather(grad, bitmask, row_offsets, ctx.nnz), None


_op = define(
    "bitmap_to_dense(Tensor bitmask, Tensor row_offsets, Tensor values, SymInt columns) -> Tensor",
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


@explained_by(_check_arguments)
def bitmap_to_dense(bitmask: Tensor, row_offsets: Tensor, values: Tensor, columns: int) -> Tensor:
    """Spreads a bitmap's values over a dense matrix. The bitmap is checked: what does not fit together is refused.

    Has a gradient for `values`.

    On CUDA the CPU waits once for the GPU, to know whether the bitmap was good.

    Args:
        bitmask: uint8 `[N, ceil(columns / 8)]`, the least significant bit first.
        row_offsets: int64 `[N + 1]`, where each row's values begin.
        values: `[nnz]`, float32, float16, bfloat16 or int8, row after row.
        columns: K, which the bitmask's own width leaves open.

    Returns:
        `[N, columns]` of the dtype of `values`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: the shapes do not fit, `row_offsets` does not run from 0 to nnz without a step back, a row has more
            or fewer bits set than values, or a bit beyond `columns` is set.
    """
    return _op(bitmask, row_offsets, values, columns)


# The gradient's op, the reverse of bitmap_to_dense: what a dense matrix holds where the mask's bits are set.


def _reference_gather(dense: Tensor, bitmask: Tensor, row_offsets: Tensor, nnz: int) -> Tensor:
    _check.is_float("bitmap_gather", "dense", dense)
    _check.has_shape("bitmap_gather", "dense", dense, ("N", "K"))
    _check.expect(nnz >= 0, "bitmap_gather", "nnz", "at least 0", nnz)
    check_bitmap_metadata("bitmap_gather", bitmask, row_offsets, dense.new_empty(nnz), dense.shape[1])
    _check.has_shape("bitmap_gather", "dense", dense, (bitmask.shape[0], "K"))
    values = dense[bitmap_mask(bitmask, dense.shape[1])]
    _check.expect(values.shape[0] == nnz, "bitmap_gather", "nnz", f"{values.shape[0]}, the bits set", nnz)
    check_bitmap("bitmap_gather", bitmask, row_offsets, values, dense.shape[1])
    return values


def _fake_gather(dense: Tensor, bitmask: Tensor, row_offsets: Tensor, nnz: int) -> Tensor:
    return dense.new_empty((nnz,))


def _setup_context_gather(ctx, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    dense, bitmask, row_offsets, _ = inputs
    ctx.save_for_backward(bitmask, row_offsets)
    ctx.columns = dense.shape[1]


def _backward_gather(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
    bitmask, row_offsets = ctx.saved_tensors
    return _op(bitmask, row_offsets, grad.contiguous(), ctx.columns), None, None, None


_gather = define(
    "bitmap_gather(Tensor dense, Tensor bitmask, Tensor row_offsets, SymInt nnz) -> Tensor",
    reference=_reference_gather,
    fake=_fake_gather,
    backward=_backward_gather,
    setup_context=_setup_context_gather,
)

"""The compressed sparse rows of a matrix [N, K], as the csr ops take them, and the checks between them and a kernel.

`crow_indices` `[N + 1]`: where each row's values begin. `col_indices` `[nnz]`: each value's column, in any order within
a row; columns that come twice add up. `values` `[nnz]`. Both index tensors are int32 or both int64.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._linear import DENSE_AT_ONCE


def check_csr_metadata(op: str, crow_indices: Tensor, col_indices: Tensor, values: Tensor) -> None:
    """Raises TypeError or ValueError unless dtypes and shapes fit together. Reads no data: fine on fake tensors.

    The dtype of `values` is left to the op.
    """
    _check.is_dtype(op, "crow_indices", crow_indices, torch.int32, torch.int64)
    _check.is_dtype(op, "col_indices", col_indices, crow_indices.dtype)
    _check.has_shape(op, "crow_indices", crow_indices, ("N + 1",))
    _check.expect(crow_indices.shape[0] >= 1, op, "crow_indices", "at least one element", 0)
    _check.has_shape(op, "values", values, ("nnz",))
    _check.has_shape(op, "col_indices", col_indices, values.shape)


def check_csr(op: str, crow_indices: Tensor, col_indices: Tensor, columns: int) -> None:
    """Raises ValueError unless the indices, whose metadata was checked before, are consistent.

    Offsets run from 0 to nnz without a step back, and each column lies in `[0, columns)`.
    """
    nnz = col_indices.shape[0]
    _check.offsets_rise(op, "crow_indices", crow_indices, nnz, "values")
    if nnz > 0:
        least, most = (int(bound) for bound in col_indices.aminmax())
        inside = least >= 0 and most < columns
        _check.expect(inside, op, "col_indices", f"columns in [0, {columns})", least if least < 0 else most)


def row_indices(crow_indices: Tensor) -> Tensor:
    """The row of each value: int64 `[nnz]`."""
    rows = torch.arange(crow_indices.shape[0] - 1, device=crow_indices.device)
    return rows.repeat_interleave(crow_indices.diff())


def dense_rows(crow_indices: Tensor, col_indices: Tensor, values: Tensor, begin: int, end: int, columns: int) -> Tensor:
    """Rows [begin, end) of the matrix as fp32 `[end - begin, columns]`."""
    offsets = crow_indices[begin : end + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    dense = values.new_zeros((end - begin) * columns, dtype=torch.float32)
    dense.index_add_(0, row_indices(offsets) * columns + col_indices[first:last], values[first:last].float())
    return dense.reshape(end - begin, columns)


def blocks(crow_indices: Tensor, columns: int) -> Iterator[tuple[int, int]]:
    """Goes through the matrix by blocks of rows, [begin, end), that are small even when dense."""
    n = crow_indices.shape[0] - 1
    step = max(1, DENSE_AT_ONCE // max(1, columns))
    for begin in range(0, n, step):
        yield begin, min(n, begin + step)

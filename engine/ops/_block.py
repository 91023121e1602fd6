"""The block form of a sparse matrix [N, K], as every block op takes it, and the checks between it and a kernel.

The matrix is cut into blocks of R rows and C columns, those at its end perhaps padded with zeros; a block is kept as a
whole or not at all. R and C are multiples of 16, at most 256, and are read from the shape of `values`.

`crow_indices`, int32 `[ceil(N / R) + 1]`: where each row of blocks begins. `col_indices`, int32 `[B]`: which column of
blocks each kept one stands in, ascending within a row of blocks. `values`, `[B, R, C]`. So
`torch.sparse_bsr_tensor` has them too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.ops import _check

# 32 outputs are what the AVX2 kernels multiply by one stretch of activations, and two vectors of AVX-512's; 32 columns
# are eight of VNNI's fours and a half cache line of int8. Larger blocks are a little faster and cost more accuracy.
BLOCK_SHAPE = (32, 32)
STEP, MOST = 16, 256
DOUBLES_AT_ONCE = 1 << 20


def check_block_shape(op: str, block_shape: Sequence[int]) -> None:
    """Raises TypeError unless it is two integers, ValueError unless both are multiples of 16 from 16 to 256."""
    pair = isinstance(block_shape, Sequence) and len(block_shape) == 2 and all(map(_check.is_integer, block_shape))
    _check.expect(pair, op, "block_shape", "two ints", block_shape, TypeError)
    fits = all(STEP <= size <= MOST and size % STEP == 0 for size in block_shape)
    expected = f"multiples of {STEP} from {STEP} to {MOST}"
    _check.expect(fits, op, "block_shape", expected, "x".join(map(str, block_shape)))


def check_block_metadata(
    op: str, crow_indices: Tensor, col_indices: Tensor, values: Tensor, rows: int, columns: int
) -> None:
    """Raises TypeError or ValueError unless dtypes and shapes fit together. Reads no data: fine on fake tensors.

    The dtype of `values` is left to the op.
    """
    _check.is_dtype(op, "crow_indices", crow_indices, torch.int32)
    _check.is_dtype(op, "col_indices", col_indices, torch.int32)
    _check.has_shape(op, "values", values, ("B", "R", "C"))
    check_block_shape(op, values.shape[1:])
    _check.is_size(op, "rows", rows)
    _check.is_size(op, "columns", columns)
    _check.has_shape(op, "crow_indices", crow_indices, (-(-rows // values.shape[1]) + 1,))
    _check.has_shape(op, "col_indices", col_indices, (values.shape[0],))


def check_block(op: str, crow_indices: Tensor, col_indices: Tensor, block_columns: int, columns: int) -> None:
    """Raises ValueError unless the indices, whose metadata was checked before, are consistent.

    Offsets run from 0 to B without a step back; columns of blocks lie in the matrix and ascend within a row.
    """
    count = col_indices.shape[0]
    _check.offsets_rise(op, "crow_indices", crow_indices, count, "blocks")
    if count == 0:
        return
    least, most = (int(bound) for bound in col_indices.aminmax())
    column_blocks = -(-columns // block_columns)
    inside = least >= 0 and most < column_blocks
    expected = f"columns of blocks in [0, {column_blocks})"
    _check.expect(inside, op, "col_indices", expected, least if least < 0 else most)
    rows = block_rows_of(crow_indices, count)
    wrong = (rows[1:] == rows[:-1]) & (col_indices[1:] <= col_indices[:-1])
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        got = f"{int(col_indices[at])} then {int(col_indices[at + 1])} in row of blocks {int(rows[at])}"
        _check.expect(False, op, "col_indices", "to ascend within a row of blocks", got)


def block_rows_of(crow_indices: Tensor, count: int) -> Tensor:
    """The row of blocks in which each of the `count` kept ones stands: int64 `[B]`."""
    rows = torch.arange(crow_indices.shape[0] - 1, device=crow_indices.device)
    return rows.repeat_interleave(crow_indices.diff().long(), output_size=count)


def as_blocks(dense: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """`[N, K]` cut into blocks, padded with zeros: `[ceil(N / R), ceil(K / C), R, C]`.

    A view where nothing has to be padded.
    """
    rows, columns = dense.shape
    row_blocks, column_blocks = -(-rows // block_rows), -(-columns // block_columns)
    padding = (0, column_blocks * block_columns - columns, 0, row_blocks * block_rows - rows)
    padded = pad(dense, padding) if any(padding) else dense  # by nothing it would copy
    return padded.reshape(row_blocks, block_rows, column_blocks, block_columns).transpose(1, 2)


def from_blocks(crow_indices: Tensor, col_indices: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix with zeros where pruned: `[rows, columns]`."""
    count, block_rows, block_columns = values.shape
    row_blocks, column_blocks = crow_indices.shape[0] - 1, -(-columns // block_columns)
    blocks = values.new_zeros(row_blocks, column_blocks, block_rows, block_columns)
    blocks = blocks.index_put((block_rows_of(crow_indices, count), col_indices.long()), values)
    padded = blocks.transpose(1, 2).reshape(row_blocks * block_rows, column_blocks * block_columns)
    return padded[:rows, :columns]


def collect_blocks(dense: Tensor, crow_indices: Tensor, col_indices: Tensor, shape: Sequence[int]) -> Tensor:
    """What `dense` holds where blocks are kept: `shape`, `[B, R, C]`. The transpose of `from_blocks`."""
    count, block_rows, block_columns = shape
    rows = block_rows_of(crow_indices, count)
    return as_blocks(dense, block_rows, block_columns)[rows, col_indices.long()]


def block_areas(
    rows: int, columns: int, block_shape: Sequence[int] = BLOCK_SHAPE, device: torch.device | None = None
) -> Tensor:
    """How many weights of `[N, K]` each block has, padding left out: int64 `[ceil(N / R), ceil(K / C)]`."""
    tall, broad = (
        (size - block * torch.arange(-(-size // block), device=device)).clamp(max=block)
        for size, block in zip((rows, columns), block_shape, strict=True)
    )
    return tall.unsqueeze(1) * broad


def block_norms(weight: Tensor, block_shape: tuple[int, int] = BLOCK_SHAPE) -> Tensor:
    """The root mean square of each block's weights: float32 `[ceil(N / R), ceil(K / C)]`.

    Blocks at the end are not diluted by what they are padded with.
    """
    blocks = as_blocks(weight, *block_shape)
    # In float64: squares of numbers far from 1 leave float32's range. On a CPU some at a time, which stay in its cache.
    whole = max(1, len(blocks))
    step = max(1, DOUBLES_AT_ONCE * whole // max(1, weight.numel())) if weight.device.type == "cpu" else whole
    norms = torch.cat(
        [torch.linalg.vector_norm(some, dim=(2, 3), dtype=torch.float64).float() for some in blocks.split(step)]
    )
    rows, columns = weight.shape
    return norms / block_areas(rows, columns, block_shape, weight.device).float().sqrt()

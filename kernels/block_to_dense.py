"""block_to_dense on NVIDIA GPUs: one read of what is kept, one write of the matrix.

A first kernel goes over the indices, writes down where in the matrix each block belongs and finds what does not
fit. The second writes tile by tile, zeros included. The host waits once, at the end, to learn whether all fitted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels._device import FLOAT_DTYPES, expect, own_cuda, same_device

INDICES = 256  # of a step of a program
TILE_ROWS = tl.constexpr(16)  # a block's rows are a multiple of it, as are its columns


@triton.jit(do_not_specialize=["high", "count"])
def place_blocks_kernel(
    crow_indices,  # int32 [high + 1]
    col_indices,  # int32 [count]
    places,  # int32 [high, wide], -1 at first: which block stands there
    bad,  # int32 [1], 0 at first
    high,
    wide,
    count,
    INDICES: tl.constexpr,
):
    """A program has a row of blocks."""
    row = tl.program_id(0)
    begin, end = tl.load(crow_indices + row), tl.load(crow_indices + row + 1)
    wrong = (begin < 0) | (end < begin) | (end > count)
    wrong |= ((row == 0) & (begin != 0)) | ((row == high - 1) & (end != count))
    if wrong:
        tl.store(bad, 1)
    else:
        for start in range(begin, end, INDICES):
            at = start + tl.arange(0, INDICES)
            there = at < end
            column = tl.load(col_indices + at, mask=there, other=0)
            before = tl.load(col_indices + at - 1, mask=there & (at > begin), other=-1)
            fits = (column > before) & (column >= 0) & (column < wide)
            tl.store(places + row.to(tl.int64) * wide + column, at, mask=there & fits)
            if tl.max((there & (fits == 0)).to(tl.int32), axis=0) != 0:
                tl.store(bad, 1)


@triton.jit(do_not_specialize=["rows"])
def block_to_dense_kernel(
    places,  # int32 [high, wide]
    values,  # [count, BLOCK_ROWS, BLOCK_COLUMNS], a float dtype or int8
    dense,  # [rows, columns], of the same
    rows,
    columns,
    wide,
    tiles_across,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program has TILE_ROWS rows, which are all of one row of blocks, and COLUMNS columns."""
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles_across * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = program % tiles_across * COLUMNS + tl.arange(0, COLUMNS)
    block_row, block_column = program // tiles_across * TILE_ROWS // BLOCK_ROWS, column // BLOCK_COLUMNS
    block = tl.load(places + block_row * wide + block_column, mask=block_column < wide, other=-1)
    within = block.to(tl.int64) * (BLOCK_ROWS * BLOCK_COLUMNS)
    at = within[None, :] + (row % BLOCK_ROWS)[:, None] * BLOCK_COLUMNS + (column % BLOCK_COLUMNS)[None, :]
    # Sixteen neighbours are of one block.
    at = tl.max_contiguous(tl.multiple_of(at, [1, 16]), [1, 16])
    kept = tl.max_constancy(tl.broadcast_to((block >= 0)[None, :], at.shape), [1, 16])
    w = tl.load(values + at, mask=kept, other=0)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(dense + row[:, None] * columns + column[None, :], w, mask=inside)


def block_to_dense(crow_indices: Tensor, col_indices: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    """`engine::block_to_dense` for CUDA: `values` [B, R, C], int32 indices."""
    op = "block_to_dense"
    expect(values.dtype in (*FLOAT_DTYPES, torch.int8) and values.dim() == 3, op, "expected values [B, R, C]")
    count, block_rows, block_columns = values.shape
    expect(all(16 <= n <= 256 and n % 16 == 0 for n in (block_rows, block_columns)), op, "expected another block shape")
    expect(crow_indices.dtype == col_indices.dtype == torch.int32, op, "expected int32 indices")
    expect(rows >= 0 and columns >= 0, op, "expected sizes")
    high, wide = triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns)
    expect(crow_indices.shape == (high + 1,) and col_indices.shape == (count,), op, "expected other indices")
    same_device(op, crow_indices, col_indices, values)
    dense, bad = values.new_empty((rows, columns)), crow_indices.new_zeros(1)
    if high == 0:
        expect(count == 0 and int(crow_indices[0]) == 0, op, "expected consistent indices")
        return dense
    places = torch.full((high, wide), -1, dtype=torch.int32, device=values.device)
    width = min(256, max(16, triton.next_power_of_2(columns)))
    across = triton.cdiv(columns, width)
    with torch.cuda.device_of(values):
        place_blocks_kernel[(high,)](
            crow_indices.contiguous(), col_indices.contiguous(), places, bad, high, wide, count, INDICES=INDICES
        )
        if dense.numel():
            block_to_dense_kernel[(triton.cdiv(rows, TILE_ROWS.value) * across,)](
                places,
                values.contiguous(),
                dense,
                rows,
                columns,
                wide,
                across,
                BLOCK_ROWS=block_rows,
                BLOCK_COLUMNS=block_columns,
                COLUMNS=width,
                num_warps=4,
            )
    expect(not bad.item(), op, "expected consistent indices")
    return dense


def register() -> None:
    """Makes this kernel the owner of `engine::block_to_dense` for CUDA."""
    own_cuda("block_to_dense", block_to_dense)

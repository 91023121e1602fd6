"""prune_to_block on NVIDIA GPUs: a program copies a kept block. The host waits once, for the number of them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels._device import FLOAT_DTYPES, expect, own_cuda, same_device

ELEMENTS = 4096  # of a step of a program


@triton.jit
def prune_to_block_kernel(
    weight,  # [rows, columns], a float dtype or int8
    kept,  # int64 [count]: the block's place in row-major order among all blocks
    col_indices,  # int32 [count]
    values,  # [count, block_rows, block_columns], of the weight's dtype
    rows,
    columns,
    blocks_per_row,
    block_rows,
    block_columns,
    ROWS: tl.constexpr,  # a step
    COLUMNS: tl.constexpr,
):
    """Copies one block, with zeros beyond the weight's edges."""
    program = tl.program_id(0).to(tl.int64)
    at = tl.load(kept + program)
    top, left = at // blocks_per_row * block_rows, at % blocks_per_row * block_columns
    tl.store(col_indices + program, (at % blocks_per_row).to(tl.int32))
    column = tl.arange(0, COLUMNS)
    for start in range(0, block_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < block_rows)[:, None] & (column < block_columns)[None, :]
        there = inside & (top + row < rows)[:, None] & (left + column < columns)[None, :]
        w = tl.load(weight + (top + row)[:, None] * columns + (left + column)[None, :], mask=there, other=0)
        to = values + (program * block_rows + row)[:, None] * block_columns + column[None, :]
        tl.store(to, w, mask=inside)


def prune_to_block(weight: Tensor, keep: Tensor, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """`engine::prune_to_block` for CUDA: `weight` [n, k], `keep` bool with one element a block."""
    op = "prune_to_block"
    expect(weight.dtype in (*FLOAT_DTYPES, torch.int8) and weight.dim() == 2, op, "expected a matrix")
    sizes = (block_rows, block_columns)
    expect(all(16 <= size <= 256 and size % 16 == 0 for size in sizes), op, "expected another block shape")
    rows, columns = weight.shape
    high, wide = triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns)
    expect(keep.dtype == torch.bool and keep.shape == (high, wide), op, "expected keep for each block")
    same_device(op, weight, keep)

    crow_indices = weight.new_zeros(high + 1, dtype=torch.int32)
    torch.cumsum(keep.sum(1), 0, dtype=torch.int32, out=crow_indices[1:])
    kept = keep.flatten().nonzero().flatten()  # the one synchronisation: the result's size
    count = kept.numel()
    col_indices = weight.new_empty(count, dtype=torch.int32)
    values = weight.new_empty((count, block_rows, block_columns))
    if count:
        block = triton.next_power_of_2(block_columns)
        with torch.cuda.device_of(weight):
            prune_to_block_kernel[(count,)](
                weight.contiguous(),
                kept,
                col_indices,
                values,
                rows,
                columns,
                wide,
                block_rows,
                block_columns,
                ROWS=min(triton.next_power_of_2(block_rows), ELEMENTS // block),
                COLUMNS=block,
                num_warps=4,
            )
    return crow_indices, col_indices, values


def register() -> None:
    """Makes this kernel the owner of `engine::prune_to_block` for CUDA."""
    own_cuda("prune_to_block", prune_to_block)

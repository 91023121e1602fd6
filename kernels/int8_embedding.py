"""int8_embedding on NVIDIA GPUs: one pass over the rows that are asked for."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels._device import FLOAT_DTYPES, expect, own_cuda, same_device

BLOCK = 4096  # elements of a program
SMALLEST_WIDTH = 16


@triton.jit(do_not_specialize=["count"])
def int8_embedding_kernel(
    indices,  # int32 or int64 [count]
    weight,  # int8 [rows, dim]
    scale,  # float32 [rows]
    out,  # [count, dim], float32, float16 or bfloat16
    count,
    rows,
    dim,
    blocks_per_row,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program's tile is [ROWS, WIDTH]: one long piece of a row, or several short rows.

    An index outside the table reads nothing and makes its row NaN.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks_per_row * ROWS + tl.arange(0, ROWS)
    column = program % blocks_per_row * WIDTH + tl.arange(0, WIDTH)
    index = tl.load(indices + row, mask=row < count, other=0).to(tl.int64)
    known = (index >= 0) & (index < rows)
    inside = (column < dim)[None, :]
    q = tl.load(weight + index[:, None] * dim + column[None, :], mask=known[:, None] & inside, other=0)
    s = tl.load(scale + index, mask=known, other=float("nan"))
    values = q.to(tl.float32) * s[:, None]
    at = row[:, None] * dim + column[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=(row < count)[:, None] & inside)


def int8_embedding(indices: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`engine::int8_embedding` for CUDA: `indices` of any shape, `weight` int8 [rows, dim], `scale` float32 [rows]."""
    op = "int8_embedding"
    expect(indices.dtype in (torch.int32, torch.int64), op, "expected int32 or int64 indices")
    expect(weight.dtype == torch.int8 and weight.dim() == 2, op, "expected an int8 matrix")
    rows, dim = weight.shape
    expect(scale.dtype == torch.float32 and scale.shape == (rows,), op, "expected a float32 scale of shape [rows]")
    expect(dtype in FLOAT_DTYPES, op, "expected a float dtype")
    same_device(op, indices, weight, scale)
    out = torch.empty((*indices.shape, dim), dtype=dtype, device=weight.device)
    if out.numel() == 0:
        return out
    count = indices.numel()
    width = min(BLOCK, max(SMALLEST_WIDTH, triton.next_power_of_2(dim)))
    blocks_per_row = triton.cdiv(dim, width)
    # Few indices still make many programs.
    tile_rows = min(BLOCK // width, max(1, triton.next_power_of_2(count) // 512))
    with torch.cuda.device_of(weight):
        int8_embedding_kernel[(triton.cdiv(count, tile_rows) * blocks_per_row,)](
            indices.contiguous(),
            weight.contiguous(),
            scale.contiguous(),
            out,
            count,
            rows,
            dim,
            blocks_per_row,
            ROWS=tile_rows,
            WIDTH=width,
            num_warps=max(1, tile_rows * width // 512),
        )
    return out


def register() -> None:
    """Makes this kernel the owner of `engine::int8_embedding` for CUDA."""
    own_cuda("int8_embedding", int8_embedding)

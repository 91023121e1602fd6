"""int8_dequantize on NVIDIA GPUs: one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels._device import FLOAT_DTYPES, expect, own_cuda, same_device

BLOCK = 4096  # elements of a program: 8 warps move 16 a thread, one 16-byte word of q
SMALLEST_WIDTH = 16


@triton.jit(do_not_specialize=["m"])
def int8_dequantize_kernel(
    q,  # int8 [m, k]
    scale,  # float32 [m]
    x,  # [m, k], float32, float16 or bfloat16
    m,
    k,
    blocks_per_row,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program's tile is [ROWS, WIDTH]: one long piece of a row, or several short rows."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks_per_row * ROWS + tl.arange(0, ROWS)
    column = program % blocks_per_row * WIDTH + tl.arange(0, WIDTH)
    inside = (row < m)[:, None] & (column < k)[None, :]
    at = row[:, None] * k + column[None, :]
    s = tl.load(scale + row, mask=row < m)
    values = tl.load(q + at, mask=inside).to(tl.float32) * s[:, None]
    tl.store(x + at, values.to(x.dtype.element_ty), mask=inside)


def int8_dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`engine::int8_dequantize` for CUDA: `q` int8 [..., k], `scale` float32 [...]."""
    op = "int8_dequantize"
    expect(q.dtype == torch.int8 and scale.dtype == torch.float32, op, "expected int8 and float32 tensors")
    expect(dtype in FLOAT_DTYPES, op, "expected a float dtype")
    expect(q.dim() >= 1 and scale.shape == q.shape[:-1], op, "expected a scale for each row")
    same_device(op, q, scale)
    q, scale, x = q.contiguous(), scale.contiguous(), torch.empty(q.shape, dtype=dtype, device=q.device)
    if x.numel() == 0:
        return x
    m, k = scale.numel(), q.shape[-1]
    width = min(BLOCK, max(SMALLEST_WIDTH, triton.next_power_of_2(k)))
    rows = BLOCK // width
    blocks_per_row = triton.cdiv(k, width)
    with torch.cuda.device_of(q):
        int8_dequantize_kernel[(triton.cdiv(m, rows) * blocks_per_row,)](
            q, scale, x, m, k, blocks_per_row, ROWS=rows, WIDTH=width, num_warps=8
        )
    return x


def register() -> None:
    """Makes this kernel the owner of `engine::int8_dequantize` for CUDA."""
    own_cuda("int8_dequantize", int8_dequantize)

"""block_linear on NVIDIA GPUs: only kept blocks are read and multiplied.

A row of x must be finite also where no block is kept, so that one kernel looks at x before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import _device
from engine.kernels._block import check_block, multiply
from engine.kernels._device import FLOAT_DTYPES, expect, own_cuda
from engine.kernels.int8_quantize import INFINITY_BITS, amax_bits, quantize_config


@triton.jit(do_not_specialize=["m"])
def not_finite_kernel(
    x,  # [m, k], float32, float16 or bfloat16
    term,  # float32 [m]: NaN where the row holds a NaN or an infinity, otherwise 0
    m,
    k,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One read of x."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    bits = tl.zeros([ROWS], tl.int32)
    for start in range(0, k, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < m)[:, None] & (column < k)[None, :]
        bits = tl.maximum(bits, amax_bits(tl.load(x + row[:, None] * k + column[None, :], mask=inside, other=0.0)))
    tl.store(term + row, tl.where(bits < INFINITY_BITS, 0.0, float("nan")), mask=row < m)


def block_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, rows: int, bias: Tensor | None = None
) -> Tensor:
    """`engine::block_linear` for CUDA: `x` [..., k], float `values` [B, R, C]."""
    op = "block_linear"
    expect(values.dtype in FLOAT_DTYPES, op, "expected float values")
    check_block(op, x, crow_indices, col_indices, values, rows, bias)
    m, k = x.shape[:-1].numel(), x.shape[-1]
    flat, y = x.reshape(m, k).contiguous(), x.new_empty((*x.shape[:-1], rows))
    if y.numel():
        term = x.new_empty(m, dtype=torch.float32)
        config = quantize_config(m, k, _device.describe(x.device).multiprocessors)
        with torch.cuda.device_of(x):
            not_finite_kernel[(triton.cdiv(m, config.rows),)](
                flat, term, m, k, ROWS=config.rows, BLOCK=config.block, num_warps=config.warps
            )
        multiply(flat, crow_indices, col_indices, values, term, None, bias, y)
    return y


def register() -> None:
    """Makes these kernels the owner of `engine::block_linear` for CUDA."""
    own_cuda("block_linear", block_linear)

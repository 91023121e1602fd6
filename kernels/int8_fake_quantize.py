"""int8_fake_quantize on NVIDIA GPUs: int8_quantize and int8_dequantize without the int8 in memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import _device
from engine.kernels._device import FLOAT_DTYPES, expect, own_cuda, same_device
from engine.kernels.int8_quantize import amax_bits, given_scale, quantize, quantize_config, row_scale


@triton.jit(do_not_specialize=["m"])
def int8_fake_quantize_kernel(
    x,  # [m, k], float32, float16 or bfloat16
    scale,  # float32, one element; None: each row has its own
    out,  # [m, k], of the dtype of x
    m,
    k,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # k <= BLOCK: the row stays in registers
):
    """Each row's scale, then its values rounded by it; a row that fits one block is read once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row[:, None] * k + column[None, :]
    in_rows = row < m
    if ONE_BLOCK:
        inside = in_rows[:, None] & (column < k)[None, :]
        values = tl.load(x + at, mask=inside, other=0.0)
        bits = amax_bits(values)
    else:
        bits = tl.zeros([ROWS], tl.int32)
        for start in range(0, k, BLOCK):
            inside = in_rows[:, None] & (start + column < k)[None, :]
            bits = tl.maximum(bits, amax_bits(tl.load(x + at + start, mask=inside, other=0.0)))
    if scale is None:
        s, inverse, finite = row_scale(bits)
    else:
        s, inverse, finite = given_scale(bits, tl.load(scale))
    if ONE_BLOCK:
        rounded = quantize(values, inverse[:, None], finite).to(tl.float32) * s[:, None]
        tl.store(out + at, rounded.to(out.dtype.element_ty), mask=inside)
    else:
        for start in range(0, k, BLOCK):
            inside = in_rows[:, None] & (start + column < k)[None, :]
            block = tl.load(x + at + start, mask=inside, other=0.0)
            rounded = quantize(block, inverse[:, None], finite).to(tl.float32) * s[:, None]
            tl.store(out + at + start, rounded.to(out.dtype.element_ty), mask=inside)


def int8_fake_quantize(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """`engine::int8_fake_quantize` for CUDA: `x` [..., k], `scale` float32 of one element."""
    op = "int8_fake_quantize"
    expect(x.dtype in FLOAT_DTYPES and x.dim() >= 1, op, "expected floats of at least one dimension")
    if scale is not None:
        expect(scale.dtype == torch.float32 and scale.numel() == 1, op, "expected a float32 scale of one element")
    same_device(op, x, scale)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    (m, k), out = flat.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = quantize_config(m, k, _device.describe(x.device).multiprocessors)
    with torch.cuda.device_of(x):
        int8_fake_quantize_kernel[(triton.cdiv(m, config.rows),)](
            flat,
            scale,
            out,
            m,
            k,
            ROWS=config.rows,
            BLOCK=config.block,
            ONE_BLOCK=k <= config.block,
            num_warps=config.warps,
            enable_fp_fusion=False,
        )
    return out


def register() -> None:
    """Makes this kernel the owner of `engine::int8_fake_quantize` for CUDA."""
    own_cuda("int8_fake_quantize", int8_fake_quantize)

"""threshold_prune on NVIDIA GPUs: one pass, as fast as a copy."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels._device import own_cuda

BLOCK = 4096  # elements of a program: 8 warps move 16 a thread, two or four 16-byte words
SMALLEST_BLOCK = 128


@triton.jit
def threshold_prune_kernel(
    weight,  # [rows, columns], float32, float16 or bfloat16
    threshold,  # float32, read at row * row_stride + column * column_stride
    pruned,  # [rows, columns], of the weight's dtype
    columns,
    blocks_per_row,
    row_stride,
    column_stride,
    BY_ROW: tl.constexpr,  # one threshold for a whole row: column_stride is 0
    BLOCK: tl.constexpr,
):
    """Keeps a weight unless `|w| <= threshold`; a comparison with NaN is false, so that NaN keeps."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks_per_row
    column = (program % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = row * columns + column
    if BY_ROW:
        limit = tl.load(threshold + row * row_stride)
    else:
        limit = tl.load(threshold + row * row_stride + column * column_stride, mask=inside)
    w = tl.load(weight + at, mask=inside)
    drop = tl.abs(w.to(tl.float32)) <= limit
    tl.store(pruned + at, tl.where(drop, 0.0, w).to(w.dtype), mask=inside)


def threshold_prune(weight: Tensor, threshold: Tensor) -> Tensor:
    """`engine::threshold_prune` for CUDA: `weight` of any shape, `threshold` float32 that broadcasts against it."""
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16) or threshold.dtype != torch.float32:
        raise RuntimeError("threshold_prune: expected a float weight and a float32 threshold")
    if weight.device != threshold.device:
        raise RuntimeError(f"threshold_prune: threshold: expected device {weight.device}, got {threshold.device}")
    limits = threshold.expand(weight.shape)  # refuses what does not broadcast
    weight = weight.contiguous()
    pruned = torch.empty_like(weight)
    if weight.numel() == 0:
        return pruned

    columns = weight.numel() if threshold.numel() == 1 else weight.shape[-1]  # one threshold makes one long row
    if threshold.numel() == 1:
        limits, row_stride, column_stride = threshold, 0, 0
    else:
        limits = limits.reshape(-1, columns)  # a copy only where a middle dimension of three is broadcast
        row_stride, column_stride = limits.stride()
    block = min(BLOCK, max(SMALLEST_BLOCK, triton.next_power_of_2(columns)))
    blocks_per_row = triton.cdiv(columns, block)
    grid = (weight.numel() // columns * blocks_per_row,)
    with torch.cuda.device_of(weight):
        threshold_prune_kernel[grid](
            weight,
            limits,
            pruned,
            columns,
            blocks_per_row,
            row_stride,
            column_stride,
            BY_ROW=column_stride == 0,
            BLOCK=block,
            num_warps=max(1, block // 512),
        )
    return pruned


def register() -> None:
    """Makes this kernel the owner of `engine::threshold_prune` for CUDA."""
    own_cuda("threshold_prune", threshold_prune)

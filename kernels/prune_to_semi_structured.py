"""prune_to_semi_structured on NVIDIA GPUs: one read of the weight, one write of what is kept."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels._device import FLOAT_DTYPES, expect, own_cuda

GROUPS = 1024  # groups of four of a program: 8 warps take 16 weights a thread
NAN_RANK = tl.constexpr(0x7F800001)  # above infinity, the same for every NaN


@triton.jit
def rank(w):
    """Magnitudes are ordered as their bits are."""
    return tl.minimum(w.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, NAN_RANK)


@triton.jit
def prune_to_semi_structured_kernel(
    weight,  # [rows, columns], float32, float16 or bfloat16
    values,  # [rows, 2 * groups], of the weight's dtype
    metadata,  # uint8 [rows, ceil(groups / 2)]
    columns,
    groups,  # ceil(columns / 4)
    blocks_per_row,
    GROUPS: tl.constexpr,
):
    """GROUPS groups of a row: of each the two of largest magnitude, in the order of their columns, and their places.

    Of four equal ones the first two are kept. So a group beyond the row's end gets places 0 and 1, as it should.
    """
    program = tl.program_id(0).to(tl.int64)
    row, first = program // blocks_per_row, program % blocks_per_row * GROUPS
    column = 4 * first + tl.arange(0, 4 * GROUPS)
    w = tl.load(weight + row * columns + column, mask=column < columns, other=0.0)
    even, odd = tl.split(tl.reshape(w, [GROUPS, 2, 2]))  # columns 0 and 2, columns 1 and 3
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    r0, r1, r2, r3 = rank(w0), rank(w1), rank(w2), rank(w3)
    # A weight is kept if at most one goes before it; of equal ones the lower column does.
    keep0 = (r1 > r0).to(tl.int32) + (r2 > r0).to(tl.int32) + (r3 > r0).to(tl.int32) < 2
    keep1 = (r0 >= r1).to(tl.int32) + (r2 > r1).to(tl.int32) + (r3 > r1).to(tl.int32) < 2
    keep2 = (r0 >= r2).to(tl.int32) + (r1 >= r2).to(tl.int32) + (r3 > r2).to(tl.int32) < 2
    keep3 = (r0 >= r3).to(tl.int32) + (r1 >= r3).to(tl.int32) + (r2 >= r3).to(tl.int32) < 2
    low = tl.where(keep0, w0, tl.where(keep1, w1, w2))
    high = tl.where(keep3, w3, tl.where(keep2, w2, w1))
    place_low = tl.where(keep0, 0, tl.where(keep1, 1, 2))
    place_high = tl.where(keep3, 3, tl.where(keep2, 2, 1))

    kept = 2 * first + tl.arange(0, 2 * GROUPS)
    pairs = tl.reshape(tl.join(low, high), [2 * GROUPS])
    tl.store(values + row * (2 * groups) + kept, pairs, mask=kept < 2 * groups)
    halves = tl.reshape(place_low | (place_high << 2), [GROUPS // 2, 2])
    first_half, second_half = tl.split(halves)
    byte = first // 2 + tl.arange(0, GROUPS // 2)
    bytes_per_row = (groups + 1) // 2
    packed = (first_half | (second_half << 4)).to(tl.uint8)
    tl.store(metadata + row * bytes_per_row + byte, packed, mask=byte < bytes_per_row)


def prune_to_semi_structured(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`engine::prune_to_semi_structured` for CUDA: `weight` [n, k]."""
    fits = weight.dtype in FLOAT_DTYPES and weight.dim() == 2
    expect(fits, "prune_to_semi_structured", "expected a matrix of floats")
    rows, columns = weight.shape
    groups = triton.cdiv(columns, 4)
    values = weight.new_empty((rows, 2 * groups))
    metadata = weight.new_empty((rows, (groups + 1) // 2), dtype=torch.uint8)
    if values.numel() == 0:
        return values, metadata
    block = min(GROUPS, max(32, triton.next_power_of_2(groups)))
    blocks_per_row = triton.cdiv(groups, block)
    with torch.cuda.device_of(weight):
        prune_to_semi_structured_kernel[(rows * blocks_per_row,)](
            weight.contiguous(),
            values,
            metadata,
            columns,
            groups,
            blocks_per_row,
            GROUPS=block,
            num_warps=max(1, block // 128),
        )
    return values, metadata


def register() -> None:
    """Makes this kernel the owner of `engine::prune_to_semi_structured` for CUDA."""
    own_cuda("prune_to_semi_structured", prune_to_semi_structured)

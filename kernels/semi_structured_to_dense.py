"""semi_structured_to_dense on NVIDIA GPUs: one read of what is kept, one write of the matrix.

The host waits once, at the end, to learn whether the metadata was consistent.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels._device import FLOAT_DTYPES, expect, own_cuda, same_device

GROUPS = 1024  # groups of four of a program: 8 warps write 16 weights a thread
PADDING = tl.constexpr(0b0100)  # of half a byte of metadata beyond the last group


@triton.jit
def semi_structured_to_dense_kernel(
    values,  # [rows, 2 * groups], a float dtype or int8
    metadata,  # uint8 [rows, ceil(groups / 2)]
    dense,  # [rows, columns], of the dtype of the values
    bad,  # int32 [1], 0 at first
    columns,
    groups,  # ceil(columns / 4)
    blocks_per_row,
    GROUPS: tl.constexpr,
):
    """GROUPS groups of a row."""
    program = tl.program_id(0).to(tl.int64)
    row, first = program // blocks_per_row, program % blocks_per_row * GROUPS
    kept = 2 * first + tl.arange(0, 2 * GROUPS)
    v = tl.load(values + row * (2 * groups) + kept, mask=kept < 2 * groups, other=0)
    low, high = tl.split(tl.reshape(v, [GROUPS, 2]))
    byte, bytes_per_row = first // 2 + tl.arange(0, GROUPS // 2), (groups + 1) // 2
    packed = tl.load(metadata + row * bytes_per_row + byte, mask=byte < bytes_per_row, other=PADDING * 17).to(tl.int32)
    halves = tl.reshape(tl.join(packed & 15, packed >> 4), [GROUPS])
    place_low, place_high = halves & 3, halves >> 2

    group = first + tl.arange(0, GROUPS)
    left = columns - 4 * group  # columns from the group's first on
    wrong = (place_low >= place_high) | ((group >= groups) & (halves != PADDING))
    wrong |= (place_low >= left) & (low != 0) | (place_high >= left) & (high != 0)
    if tl.max(wrong.to(tl.int32), axis=0) != 0:
        tl.store(bad, 1)

    zero = tl.zeros([GROUPS], v.dtype)
    w0 = tl.where(place_high == 0, high, tl.where(place_low == 0, low, zero))
    w1 = tl.where(place_high == 1, high, tl.where(place_low == 1, low, zero))
    w2 = tl.where(place_high == 2, high, tl.where(place_low == 2, low, zero))
    w3 = tl.where(place_high == 3, high, tl.where(place_low == 3, low, zero))
    spread = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [4 * GROUPS])
    column = 4 * first + tl.arange(0, 4 * GROUPS)
    tl.store(dense + row * columns + column, spread, mask=column < columns)


def semi_structured_to_dense(values: Tensor, metadata: Tensor, columns: int) -> Tensor:
    """`engine::semi_structured_to_dense` for CUDA: `values` [n, 2 * ceil(columns / 4)], `metadata` uint8."""
    op = "semi_structured_to_dense"
    expect(values.dtype in (*FLOAT_DTYPES, torch.int8) and values.dim() == 2, op, "expected a matrix of values")
    groups = triton.cdiv(max(0, columns), 4)
    rows = values.shape[0]
    expect(columns >= 0 and values.shape[1] == 2 * groups, op, "expected values [n, 2 * ceil(columns / 4)]")
    fits = metadata.dtype == torch.uint8 and metadata.shape == (rows, (groups + 1) // 2)
    expect(fits, op, "expected uint8 metadata [n, ceil(columns / 8)]")
    same_device(op, values, metadata)
    dense = values.new_empty((rows, columns))
    if dense.numel() == 0:
        return dense
    bad = torch.zeros(1, dtype=torch.int32, device=values.device)
    block = min(GROUPS, max(32, triton.next_power_of_2(groups)))
    blocks_per_row = triton.cdiv(groups, block)
    with torch.cuda.device_of(values):
        semi_structured_to_dense_kernel[(rows * blocks_per_row,)](
            values.contiguous(),
            metadata.contiguous(),
            dense,
            bad,
            columns,
            groups,
            blocks_per_row,
            GROUPS=block,
            num_warps=max(1, block // 128),
        )
    expect(not bad.item(), op, "expected consistent metadata")
    return dense


def register() -> None:
    """Makes this kernel the owner of `engine::semi_structured_to_dense` for CUDA."""
    own_cuda("semi_structured_to_dense", semi_structured_to_dense)

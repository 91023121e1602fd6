"""The product of both block ops on NVIDIA GPUs: only kept blocks are read and multiplied.

A program has a tile of the result: some tokens, and the rows of one row of blocks. It goes through that row's blocks.
Many tokens are the rows of the tensor cores' tile, so that even a block of 16 rows keeps them busy; for few tokens,
swapped, the block's rows are. No one has checked the indices: where blocks do not lie in the matrix, NaN is written.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import _device
from engine.kernels._device import FLOAT_DTYPES, Device, expect, same_device
from engine.kernels._tiles import is_aligned, load_tile, operand, tile_of

LONGEST_SUM = 131072  # |products| are at most 128 · 127, so that int32 holds the sum of so many


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How y = x @ weight.T is cut."""

    swapped: bool  # the block's rows are the tile's rows, the tokens its columns; otherwise the other way round
    tokens: int
    rows: int  # of a block, or a part of them
    block_k: int  # columns of a block at a time
    warps: int
    stages: int


def block_config(
    m: int, k: int, block_rows: int, block_columns: int, dtype: torch.dtype, device: Device
) -> BlockConfig:
    """For M, K, the shape of the blocks, what is multiplied and the card.

    Where columns of floats are cut off, few rows keep from wgmma, which Triton 3.6 lets read the registers of one step
    while the next one's are written.
    """
    rows, tokens = min(128, triton.next_power_of_2(block_rows)), max(16, min(128, triton.next_power_of_2(m)))
    swapped = tokens <= 32
    if swapped or dtype == torch.float32:
        rows = min(64, rows)  # more programs, or what the registers hold
    if swapped and dtype != torch.int8 and k % block_columns:
        rows = min(32, rows)
    if dtype == torch.float32 or (dtype == torch.int8 and k > LONGEST_SUM):
        tokens = min(64, tokens)
    elif m >= 1024 and rows == 128 and dtype == torch.int8 and device.capability == 90:
        tokens = 256
    longest = {1: 128, 2: 64, 4: 16}[dtype.itemsize]
    block_k = min(longest, block_columns & -block_columns)  # a power of two that divides them
    if dtype == torch.int8:
        block_k = max(32, block_k)  # the least of a tensor core instruction; of 16 columns the other 16 count as zeros
    area = tokens * rows
    warps = 8 if area > 128 * 64 or (dtype in (torch.float32, torch.int8) and area > 32 * 64 and tokens == 64) else 4
    room = device.shared_memory // (1 if area > 128 * 64 else 4 if swapped else 2) - 2048
    stages = max(2, min(6, room // ((tokens + rows) * block_k * dtype.itemsize)))
    return BlockConfig(swapped, tokens, rows, block_k, warps, stages)


@triton.jit
def multiply_blocks(
    acc,  # the sum so far, [TOKENS, ROWS] or, SWAPPED, [ROWS, TOKENS]
    bad,  # whether a column of blocks outside the matrix was met
    x,  # [m, k], as in block_kernel
    values,  # [kept_rows, BLOCK_COLUMNS], likewise
    col_indices,  # int32, one a block
    begin,  # the first of the blocks
    end,  # the one after the last
    first,  # the tile's first token
    part,  # the tile's first row within a block
    m,
    k,
    kept_rows,  # of all blocks
    x_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    INT8: tl.constexpr,
    COMPUTE: tl.constexpr,
    CUT: tl.constexpr,
):
    """Adds the products with blocks begin to end."""
    STEPS: tl.constexpr = (BLOCK_COLUMNS + BLOCK_K - 1) // BLOCK_K
    following = tl.load(col_indices + begin, mask=begin < end, other=0)
    for step in tl.range(begin * STEPS, end * STEPS):
        block, within = step // STEPS, step % STEPS * BLOCK_K
        # Loaded a step ahead, or every copy would begin with a wait for its address.
        column, after = following, (step + 1) // STEPS
        following = tl.load(col_indices + after, mask=after < end, other=0)
        outside = (column < 0) | (column >= tl.cdiv(k, BLOCK_COLUMNS))
        bad = bad | outside
        left = tl.where(outside, 0, column) * BLOCK_COLUMNS + within
        row = block * BLOCK_ROWS + part
        w = load_tile(values, row, within, kept_rows, BLOCK_COLUMNS, BLOCK_COLUMNS, ROWS, BLOCK_K, BY_DESCRIPTOR)
        t = load_tile(x, first, left, m, k, x_stride, TOKENS, BLOCK_K, BY_DESCRIPTOR)
        if INT8:
            if SWAPPED:
                acc = tl.dot(w, t.T, acc, out_dtype=tl.int32)
            else:
                acc = tl.dot(t, w.T, acc, out_dtype=tl.int32)
        else:
            if CUT:  # x counts as 0 there, and 0 times what a block may hold there is NaN if that is not finite
                w = tl.where((left + tl.arange(0, BLOCK_K) < k)[None, :], w, 0.0)
            if SWAPPED:
                acc = tl.dot(w.to(COMPUTE), t.to(COMPUTE).T, acc, input_precision="ieee")
            else:
                acc = tl.dot(t.to(COMPUTE), w.to(COMPUTE).T, acc, input_precision="ieee")
    return acc, bad


@triton.jit(do_not_specialize=["m", "count"])
def block_kernel(
    x,  # int8 or float [m, k], a row every x_stride elements: a descriptor or a pointer
    crow_indices,  # int32 [high + 1]
    col_indices,  # int32 [count]
    values,  # [count, BLOCK_ROWS, BLOCK_COLUMNS] as a matrix of as many rows: a descriptor or a pointer
    token_term,  # float32 [m]: a token's scale; for floats 0, or NaN where the token is not finite
    scale,  # float32 [n]; None for floats
    bias,  # [n], a float dtype, or None
    y,  # [m, n], a float dtype
    m,
    n,
    k,
    x_stride,
    count,
    parts,  # of a block's rows: one program each
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    AT_ONCE: tl.constexpr,  # blocks whose sum int32 holds; None: all that there can be
    INT8: tl.constexpr,  # int8 is multiplied
    COMPUTE: tl.constexpr,  # otherwise the float type that is
    CUT: tl.constexpr,  # the last column of blocks goes beyond k
):
    """y = sum * (s_x * s_w) + bias, or for floats y = sum + bias, in float32 in that order, then cast."""
    high = tl.cdiv(n, BLOCK_ROWS)
    high_tile, tile_m = tile_of(tl.program_id(0), high * parts, tl.cdiv(m, TOKENS), 8)
    block_row, part, first = high_tile // parts, high_tile % parts * ROWS, tile_m * TOKENS
    begin, end = tl.load(crow_indices + block_row), tl.load(crow_indices + block_row + 1)
    bad = (begin < 0) | (end < begin) | (end > count)
    end = tl.where(bad, begin, end)
    kept_rows = count.to(tl.int64) * BLOCK_ROWS
    if SWAPPED:
        acc = tl.zeros([ROWS, TOKENS], tl.int32 if INT8 else tl.float32)
    else:
        acc = tl.zeros([TOKENS, ROWS], tl.int32 if INT8 else tl.float32)
    if AT_ONCE is not None:
        total = acc.to(tl.int64)
        for start in range(begin, end, AT_ONCE):
            some, bad = multiply_blocks(
                acc, bad, x, values, col_indices, start, min(end, start + AT_ONCE), first, part, m, k, kept_rows,
                x_stride, BLOCK_ROWS, BLOCK_COLUMNS, TOKENS, ROWS, BLOCK_K, SWAPPED, BY_DESCRIPTOR, INT8, COMPUTE, CUT,
            )  # fmt: skip
            total += some.to(tl.int64)
    else:
        total, bad = multiply_blocks(
            acc, bad, x, values, col_indices, begin, end, first, part, m, k, kept_rows, x_stride,
            BLOCK_ROWS, BLOCK_COLUMNS, TOKENS, ROWS, BLOCK_K, SWAPPED, BY_DESCRIPTOR, INT8, COMPUTE, CUT,
        )  # fmt: skip

    tokens, within = first + tl.arange(0, TOKENS), part + tl.arange(0, ROWS)
    if SWAPPED:
        token, at_row = tokens[None, :], within[:, None]
    else:
        token, at_row = tokens[:, None], within[None, :]
    output = block_row * BLOCK_ROWS + at_row
    there = (at_row < BLOCK_ROWS) & (output < n)
    term = tl.load(token_term + token, mask=token < m)
    if scale is not None:
        result = total.to(tl.float32) * (term * tl.load(scale + output, mask=there))
    else:
        result = total + term
    if bias is not None:
        result += tl.load(bias + output, mask=there).to(tl.float32)
    result = tl.where(bad, float("nan"), result)
    tl.store(y + token.to(tl.int64) * n + output, result.to(y.dtype.element_ty), mask=there & (token < m))


def check_block(
    op: str, x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, n: int, bias: Tensor | None
) -> None:
    """Raises RuntimeError unless dtypes and shapes fit, those of `values` and of a scale aside."""
    expect(x.dtype in FLOAT_DTYPES and x.dim() >= 1, op, "expected a float x")
    expect(values.dim() == 3 and n >= 0, op, "expected values [B, R, C]")
    sizes = values.shape[1:]
    expect(all(16 <= size <= 256 and size % 16 == 0 for size in sizes), op, "expected another block shape")
    indices = crow_indices.dtype == col_indices.dtype == torch.int32
    expect(indices, op, "expected int32 indices")
    expect(crow_indices.shape == (triton.cdiv(n, sizes[0]) + 1,), op, "expected crow_indices for n rows")
    expect(col_indices.shape == values.shape[:1], op, "expected a column for each block")
    if bias is not None:
        expect(bias.dtype in FLOAT_DTYPES and bias.shape == (n,), op, "expected a float bias of shape [n]")
    same_device(op, x, crow_indices, col_indices, values, bias)


def multiply(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    token_term: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """Launches :func:`block_kernel` over checked tensors: `x` [m, k], int8 where `values` are; `y` is not empty."""
    (count, block_rows, block_columns), (m, k), n = values.shape, x.shape, y.shape[-1]
    device, values = _device.describe(x.device), values.contiguous().view(count * block_rows, block_columns)
    compute = x.dtype if x.dtype == values.dtype else torch.float32
    config = block_config(m, k, block_rows, block_columns, compute, device)
    by_descriptor = device.has_tensor_maps and is_aligned(x, values)
    parts = triton.cdiv(block_rows, config.rows)
    names = {torch.int8: tl.int8, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    with torch.cuda.device_of(x):
        block_kernel[(triton.cdiv(n, block_rows) * parts * triton.cdiv(m, config.tokens),)](
            operand(x, config.tokens, config.block_k, by_descriptor),
            crow_indices.contiguous(),
            col_indices.contiguous(),
            operand(values, config.rows, config.block_k, by_descriptor),
            token_term,
            None if scale is None else scale.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            m,
            n,
            k,
            x.stride(0),
            count,
            parts,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            TOKENS=config.tokens,
            ROWS=config.rows,
            BLOCK_K=config.block_k,
            SWAPPED=config.swapped,
            BY_DESCRIPTOR=by_descriptor,
            AT_ONCE=LONGEST_SUM // block_columns if compute == torch.int8 and k > LONGEST_SUM else None,
            INT8=compute == torch.int8,
            COMPUTE=names[compute],
            CUT=k % block_columns != 0,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=False,
        )

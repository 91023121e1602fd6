"""int8_quantize on NVIDIA GPUs: one read of the row where it fits a block's registers, two otherwise."""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from engine.kernels import _device
from engine.kernels._device import FLOAT_DTYPES, expect, own_cuda

INFINITY_BITS = tl.constexpr(0x7F800000)
SMALLEST_AMAX = tl.constexpr(2.0**-100)  # below it a row counts as zero: 127 / amax must not overflow
ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """How the rows are cut: a program has `rows` rows and goes through them `block` columns at a time."""

    rows: int
    block: int
    warps: int


ELEMENTS = 4096  # of a program, where the row allows: 4 warps with 32 elements a thread
WIDEST_BLOCK = 16384  # 32 elements a thread of 16 warps; more would spill


def quantize_config(m: int, k: int, multiprocessors: int) -> QuantizeConfig:
    """Short rows share a program, but never so many that a multiprocessor is left without one; long rows are looped."""
    block = min(WIDEST_BLOCK, max(32, triton.next_power_of_2(k)))
    rows = max(1, min(ELEMENTS // block, 64))
    while rows > 1 and triton.cdiv(m, rows) < 2 * multiprocessors:
        rows //= 2
    return QuantizeConfig(rows, block, warps=min(16, max(1, rows * block // 1024)))


@triton.jit
def amax_bits(x):
    """The bits of each row's largest |x|: [ROWS, BLOCK] to int32 [ROWS].

    Without sign, floats order as their bits do, infinity above every number and NaN above infinity: one integer
    maximum also finds what is not finite.
    """
    return tl.max(x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def row_scale(bits):
    """Scale, its inverse (0 where q is all 0) and whether the row is finite, from :func:`amax_bits`."""
    finite = bits < INFINITY_BITS
    amax = bits.to(tl.float32, bitcast=True)
    usable = finite & (amax >= SMALLEST_AMAX)
    amax = tl.where(usable, amax, 1.0)
    full = tl.full(amax.shape, 127.0, tl.float32)
    inverse = tl.where(usable, tl.div_rn(full, amax), 0.0)
    scale = tl.where(usable, tl.div_rn(amax, full), 1.0)
    return tl.where(finite, scale, float("nan")), inverse, finite


@triton.jit
def reciprocal(scale):
    """1 / scale, and whether it can be multiplied by: of a scale that is positive, both finite."""
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    infinity = float("inf")
    return inverse, (scale > 0) & (scale < infinity) & (inverse < infinity)


@triton.jit
def given_scale(bits, input_scale):
    """The same three as of :func:`row_scale` where the scale is given, for every row alike."""
    scale = tl.full(bits.shape, 1.0, tl.float32) * input_scale
    inverse, usable = reciprocal(scale)
    usable &= bits < INFINITY_BITS
    return tl.where(usable, scale, float("nan")), tl.where(usable, inverse, 0.0), usable


@triton.jit
def channel_inverses(input_scale, column, inside):
    """Reciprocals of the channels' scales, [BLOCK], and the bits of infinity where one can't be used, 0 otherwise.

    The latter joins the rows' largest |x|: such a scale is then as bad for a row as an infinity in it.
    """
    inverse, usable = reciprocal(tl.load(input_scale + column, mask=inside, other=1.0))
    return inverse, tl.max(tl.where(usable, 0, INFINITY_BITS), axis=0)


@triton.jit
def quantize(x, inverse, finite):
    """[ROWS, BLOCK] by inverse scales, [ROWS, 1] or [1, BLOCK], to int8; 0 where the row is not finite.

    Adding 1.5 · 2^23 rounds half to even and leaves the integer in the low bits.
    """
    v = tl.where(finite[:, None], x.to(tl.float32), 0.0) * inverse
    v = tl.minimum(tl.maximum(v, -127.0), 127.0)
    return (v + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit(do_not_specialize=["m", "counter_count"])
def int8_quantize_kernel(
    x,  # [m, k], float32, float16 or bfloat16
    input_scale,  # float32, one element, or [k] where BY_CHANNEL; None: each row has its own scale
    q,  # int8 [m, k], a row every q_stride bytes
    scale,  # float32 [m]
    counters,  # int32 [counter_count], to be set to 0 for the kernel that follows; None: nothing to set
    m,
    k,
    q_stride,
    counter_count,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # k <= BLOCK: the row stays in registers
    BY_CHANNEL: tl.constexpr,  # the weights hold the channels' scales already: a row's own is 1
    DEPENDENT: tl.constexpr,  # the next kernel may start before this one ends: it waits itself
):
    """Each row's scale, then its int8 values; a row that fits one block is read once."""
    if DEPENDENT:
        gdc_launch_dependents()
    program = tl.program_id(0).to(tl.int64)
    if counters is not None and program == 0:
        for start in range(0, counter_count, 1024):
            at = start + tl.arange(0, 1024)
            tl.store(counters + at, tl.zeros([1024], tl.int32), mask=at < counter_count)

    row = program * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    x_row, q_row = x + row[:, None] * k, q + row[:, None] * q_stride
    in_rows = row < m
    if ONE_BLOCK:
        inside = in_rows[:, None] & (column < k)[None, :]
        values = tl.load(x_row + column[None, :], mask=inside, other=0.0)
        bits = amax_bits(values)
        if BY_CHANNEL:
            inverses, unusable = channel_inverses(input_scale, column, column < k)
            bits = tl.maximum(bits, unusable)
    else:
        bits = tl.zeros([ROWS], tl.int32)
        for start in range(0, k, BLOCK):
            inside = in_rows[:, None] & (start + column < k)[None, :]
            block = tl.load(x_row + (start + column)[None, :], mask=inside, other=0.0)
            bits = tl.maximum(bits, amax_bits(block))
            if BY_CHANNEL:
                _, unusable = channel_inverses(input_scale, start + column, start + column < k)
                bits = tl.maximum(bits, unusable)
    if input_scale is None:
        s, inverse, finite = row_scale(bits)
    elif BY_CHANNEL:
        s, inverse, finite = given_scale(bits, 1.0)
    else:
        s, inverse, finite = given_scale(bits, tl.load(input_scale))
    tl.store(scale + row, s, mask=in_rows)
    if ONE_BLOCK:
        factor = inverses[None, :] if BY_CHANNEL else inverse[:, None]
        tl.store(q_row + column[None, :], quantize(values, factor, finite), mask=inside)
    else:
        for start in range(0, k, BLOCK):
            inside = in_rows[:, None] & (start + column < k)[None, :]
            block = tl.load(x_row + (start + column)[None, :], mask=inside, other=0.0)
            factor = inverse[:, None]
            if BY_CHANNEL:
                inverses, _ = channel_inverses(input_scale, start + column, start + column < k)
                factor = inverses[None, :]
            tl.store(q_row + (start + column)[None, :], quantize(block, factor, finite), mask=inside)


def quantize_rows(
    x: Tensor,
    multiprocessors: int,
    input_scale: Tensor | None = None,
    align: int = 1,
    counters: Tensor | None = None,
    dependent: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rows of contiguous `x` [m, k] as int8 [m, k] and their scales [m]; for kernels that multiply them.

    Args:
        x: contiguous `[m, k]`.
        multiprocessors: of the card.
        input_scale: float32, one scale for all, or `[k]`, one for each channel; or None: by row.
        align: a row of `q` begins at a multiple of so many bytes.
        counters: int32, set to 0 on the way: saves the next kernel a launch.
        dependent: the next kernel is launched as a dependent one (`launch_pdl`) and waits for this one itself.
    """
    m, k = x.shape
    q_stride = triton.cdiv(max(1, k), align) * align
    q = x.new_empty((m, q_stride), dtype=torch.int8)[:, :k]
    scale = x.new_empty(m, dtype=torch.float32)
    config = quantize_config(m, k, multiprocessors)
    if m == 0:
        return q, scale
    with torch.cuda.device_of(x):
        int8_quantize_kernel[(triton.cdiv(m, config.rows),)](
            x,
            None if input_scale is None else input_scale.contiguous(),
            q,
            scale,
            counters,
            m,
            k,
            q_stride,
            0 if counters is None else counters.numel(),
            ROWS=config.rows,
            BLOCK=config.block,
            ONE_BLOCK=k <= config.block,
            BY_CHANNEL=input_scale is not None and input_scale.numel() != 1,
            DEPENDENT=dependent,
            num_warps=config.warps,
            enable_fp_fusion=False,
        )
    return q, scale


def int8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`engine::int8_quantize` for CUDA: `x` of one dimension at least."""
    expect(x.dtype in FLOAT_DTYPES and x.dim() >= 1, "int8_quantize", "expected floats of at least one dimension")
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    q, scale = quantize_rows(flat, _device.describe(x.device).multiprocessors)
    return q.reshape(x.shape), scale.reshape(x.shape[:-1])


def register() -> None:
    """Makes this kernel the owner of `engine::int8_quantize` for CUDA."""
    own_cuda("int8_quantize", int8_quantize)

"""int8_weight_linear on NVIDIA GPUs: the weight is read as int8 and turned to floats in registers, never in memory.

One token is a sum of products, row by row of the weight. More go through the tensor cores, for which int8 is exact in
float16 and bfloat16; the outputs always fill their rows, since that operand may come from registers. float32 goes
through ordinary arithmetic, as the tensor cores would round it.

A row of x that is not finite makes each of its sums infinite or NaN. So only where a sum is, x is looked at again.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import _device
from engine.kernels._device import FLOAT_DTYPES, Device, expect, own_cuda, same_device
from engine.kernels._tiles import is_aligned, load_tile, operand, tile_of
from engine.kernels.int8_quantize import INFINITY_BITS, amax_bits

FEWEST_BY_DESCRIPTOR = 8  # tokens: on an H200 tiles with fewer rows inside x come a third slower that way


@dataclasses.dataclass(frozen=True)
class WeightConfig:
    """How y = x @ weight.T is cut: [outputs, tokens] of y a program, block_k of K at a time, K in `splits` parts."""

    outputs: int
    tokens: int
    block_k: int
    splits: int
    warps: int
    stages: int

    def tiles(self, m: int, n: int) -> int:
        """Tiles of the result."""
        return triton.cdiv(n, self.outputs) * triton.cdiv(m, self.tokens)

    def k_per_split(self, k: int) -> int:
        """How much of K one part sums: whole blocks."""
        return triton.cdiv(triton.cdiv(k, self.block_k), self.splits) * self.block_k


def weight_config(m: int, n: int, k: int, dtype: torch.dtype, aligned: bool, device: Device) -> WeightConfig:
    """Small tiles of many K where the weight's bytes are what takes the time, large ones where the arithmetic is.

    Up to 32 tokens two warps share a tile: Triton then takes mma, for which a thread loads four bytes of the weight at
    a time, instead of wgmma, for which it loads two.
    """
    tokens = max(16, triton.next_power_of_2(m))
    if m == 1:
        block_k = min(512, max(32, triton.next_power_of_2(k)))
        outputs = 8 if n >= 16 * device.multiprocessors else 4
        return WeightConfig(outputs, 1, block_k, 1, 4, 3)
    blocks = 2  # programs a multiprocessor
    if dtype == torch.float32:
        config = WeightConfig(64, 16, 32, 1, 4, 2) if tokens == 16 else WeightConfig(64, min(tokens, 64), 16, 1, 8, 3)
    elif not aligned:
        config = WeightConfig(64, min(tokens, 64), 32, 1, 4, 3)
    else:
        if m < FEWEST_BY_DESCRIPTOR:
            config, blocks = WeightConfig(64, 16, 256, 1, 2, 4), 3
        elif tokens == 16:
            config, blocks = WeightConfig(32, 16, 256, 1, 2, 4), 4
        elif tokens == 32:
            config = WeightConfig(128, 32, 128, 1, 2, 4)
        elif tokens == 64:
            config = WeightConfig(64, 64, 128, 1, 4, 3)
        elif tokens == 128:
            config = WeightConfig(128, 128, 64, 1, 4 if device.capability == 90 else 8, 4)  # mma takes more registers
        elif tokens == 256:
            config = WeightConfig(64, 128, 64, 1, 4, 3)
        else:
            config = WeightConfig(64, 256, 64, 1, 8, 3)
        room = (device.shared_memory // blocks - 2048) // (config.block_k * (config.outputs + 2 * config.tokens))
        config = dataclasses.replace(config, stages=max(2, min(config.stages, room)))
    # More parts only where multiprocessors would stay idle, and each part long enough to be worth adding.
    splits = min(2 * device.multiprocessors // config.tiles(m, n), k // (8 * config.block_k))
    return dataclasses.replace(config, splits=max(1, min(16, splits)))


@triton.jit
def widen(q, dtype: tl.constexpr, BY_BITS: tl.constexpr):
    """int8 as floats, exactly. By bits four at once take 8 instructions as 16-bit floats and 9 as float32; Triton's 18.

    The byte becomes the lower bits of a number whose unit is 1, and what that adds is taken off again: for bfloat16,
    whose lower bits are only seven, 128 + (q & 127) less 128 or, where q < 0, less 256.
    """
    if not BY_BITS:
        floats = q.to(dtype)
    elif dtype == tl.bfloat16:
        floats = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, less;
            mov.b32 less, 0xbf80bf80;
            prmt.b32 a, $2, 0x43434343, 0x4140;
            prmt.b32 b, $2, 0x43434343, 0x4342;
            and.b32 c, a, 0xff80ff80;
            and.b32 d, b, 0xff80ff80;
            and.b32 a, a, 0xff7fff7f;
            and.b32 b, b, 0xff7fff7f;
            fma.rn.bf16x2 $0, c, less, a;
            fma.rn.bf16x2 $1, d, less, b;
            }""",
            "=r,=r,r",
            [q],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    elif dtype == tl.float16:
        floats = tl.inline_asm_elementwise(
            """{
            .reg .b32 u, a, b, less;
            mov.b32 less, 0xe480e480;
            xor.b32 u, $2, 0x80808080;
            prmt.b32 a, u, 0x64646464, 0x4140;
            prmt.b32 b, u, 0x64646464, 0x4342;
            add.rn.f16x2 $0, a, less;
            add.rn.f16x2 $1, b, less;
            }""",
            "=r,=r,r",
            [q],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        floats = tl.inline_asm_elementwise(
            """{
            .reg .b32 u;
            xor.b32 u, $4, 0x80808080;
            prmt.b32 $0, u, 0x4b000000, 0x7440;
            prmt.b32 $1, u, 0x4b000000, 0x7441;
            prmt.b32 $2, u, 0x4b000000, 0x7442;
            prmt.b32 $3, u, 0x4b000000, 0x7443;
            add.rn.f32 $0, $0, 0fcb000080;
            add.rn.f32 $1, $1, 0fcb000080;
            add.rn.f32 $2, $2, 0fcb000080;
            add.rn.f32 $3, $3, 0fcb000080;
            }""",
            "=r,=r,=r,=r,r",
            [q],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    return floats


@triton.jit
def token_kernel(
    x,  # [k], float32, float16 or bfloat16
    weight,  # int8 [n, k]
    scale,  # float32 [n]
    bias,  # [n], a float dtype, or None
    y,  # [n], of the dtype of x
    n,
    k,
    OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    BY_BITS: tl.constexpr,
):
    """OUTPUTS rows of the weight times the one token."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, BLOCK_K)
    row = weight + output.to(tl.int64)[:, None] * k
    acc = tl.zeros([OUTPUTS, BLOCK_K], tl.float32)
    for at in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        inside = at + column < k
        w = tl.load(row + (at + column)[None, :], mask=(output < n)[:, None] & inside[None, :], other=0)
        values = tl.load(x + (at + column)[None, :], mask=inside[None, :], other=0.0)
        acc += widen(w, tl.float32, BY_BITS) * values.to(tl.float32)
    result = tl.sum(acc, axis=1)
    if tl.max(is_unusual(result), axis=0) != 0:
        bits = tl.zeros([1], tl.int32)
        for at in range(0, k, BLOCK_K):
            values = tl.load(x + (at + column)[None, :], mask=(at + column < k)[None, :], other=0.0)
            bits = tl.maximum(bits, amax_bits(values))
        result = tl.where(bits < INFINITY_BITS, result, float("nan"))
    result *= tl.load(scale + output, mask=output < n)
    if bias is not None:
        result += tl.load(bias + output, mask=output < n).to(tl.float32)
    tl.store(y + output, result.to(y.dtype.element_ty), mask=output < n)


@triton.jit
def is_unusual(sums):
    """1 where a sum is infinite or NaN, as each is in a row of x that is not finite, otherwise 0."""
    return ((sums.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= INFINITY_BITS).to(tl.int32)


@triton.jit
def write_out(
    acc,  # float32 [OUTPUTS, TOKENS]: weight @ x.T
    x,  # [m, k]: a descriptor or a pointer
    scale,  # float32 [n]
    bias,  # [n], a float dtype, or None
    y,  # [m, n]
    row,  # the tile's first output
    first,  # the tile's first token
    m,
    n,
    k,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
):
    """y = acc * scale + bias in float32, then cast; NaN for tokens that are not finite."""
    output = row + tl.arange(0, OUTPUTS)[:, None]
    token = first + tl.arange(0, TOKENS)[None, :]
    # By one axis after the other Triton 3.6 finds no layout on sm_100, whose sums lie in tensor memory.
    if tl.max(tl.ravel(is_unusual(acc), can_reorder=True), axis=0) != 0:
        bits = tl.zeros([TOKENS], tl.int32)
        for at in range(0, k, BLOCK_K):
            values = load_tile(x, first, at, m, k, k, TOKENS, BLOCK_K, BY_DESCRIPTOR)
            bits = tl.maximum(bits, amax_bits(values))
        acc = tl.where(bits[None, :] < INFINITY_BITS, acc, float("nan"))
    result = acc * tl.load(scale + output, mask=output < n)
    if bias is not None:
        result += tl.load(bias + output, mask=output < n).to(tl.float32)
    at = y + token.to(tl.int64) * n + output
    tl.store(at, result.to(y.dtype.element_ty), mask=(token < m) & (output < n))


@triton.jit(do_not_specialize=["m"])
def int8_weight_kernel(
    weight,  # int8 [n, k]: a descriptor or a pointer
    x,  # [m, k], float32, float16 or bfloat16: a descriptor or a pointer
    scale,  # float32 [n]
    bias,  # [n], a float dtype, or None
    y,  # [m, n], of the dtype of x
    parts,  # float32 [tiles, SPLITS, OUTPUTS, TOKENS]: the parts of each tile's sum; None: K is not split
    counters,  # int32 [tiles], 0: how many parts are there; None: K is not split
    m,
    n,
    k,
    k_per_split,
    BY_DESCRIPTOR: tl.constexpr,
    X_BY_DESCRIPTOR: tl.constexpr,
    SPLITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BY_BITS: tl.constexpr,
):
    """One part of one tile. The parts are added in their order, by whichever program finishes last."""
    item = tl.program_id(0)
    tile, split = item // SPLITS, item % SPLITS
    tile_n, tile_m = tile_of(tile, tl.cdiv(n, OUTPUTS), tl.cdiv(m, TOKENS), 8)
    row, first = tile_n * OUTPUTS, tile_m * TOKENS
    # The sums go from step to step as integers, or Triton 3.6 lets one product go on while the next one's weights are
    # written into the registers that it reads: wgmma, on an H200, with wrong sums here and there.
    bits = tl.zeros([OUTPUTS, TOKENS], tl.int32)
    for at in tl.range(split * k_per_split, min(k, (split + 1) * k_per_split), BLOCK_K):
        w = load_tile(weight, row, at, n, k, k, OUTPUTS, BLOCK_K, BY_DESCRIPTOR)
        values = load_tile(x, first, at, m, k, k, TOKENS, BLOCK_K, X_BY_DESCRIPTOR)
        acc = bits.to(tl.float32, bitcast=True)
        acc = tl.dot(widen(w, values.dtype, BY_BITS), values.T, acc, input_precision="ieee")
        bits = acc.to(tl.int32, bitcast=True)
    acc = bits.to(tl.float32, bitcast=True)
    if SPLITS == 1:
        write_out(acc, x, scale, bias, y, row, first, m, n, k, OUTPUTS, TOKENS, BLOCK_K, X_BY_DESCRIPTOR)
    else:
        within = tl.arange(0, OUTPUTS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        part = parts + tile * tl.full([], SPLITS * OUTPUTS * TOKENS, tl.int64) + within
        tl.store(part + split * (OUTPUTS * TOKENS), acc)
        tl.debug_barrier()  # the whole block has written before one thread says so
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros([OUTPUTS, TOKENS], tl.float32)
            for i in range(SPLITS):
                total += tl.load(part + i * (OUTPUTS * TOKENS), cache_modifier=".cg")
            write_out(total, x, scale, bias, y, row, first, m, n, k, OUTPUTS, TOKENS, BLOCK_K, X_BY_DESCRIPTOR)


def int8_weight_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`engine::int8_weight_linear` for CUDA: `x` [..., k], `weight` int8 [n, k], `scale` float32 [n]."""
    op = "int8_weight_linear"
    expect(weight.dtype == torch.int8 and weight.dim() == 2, op, "expected an int8 matrix")
    n, k = weight.shape
    expect(x.dtype in FLOAT_DTYPES and x.dim() >= 1 and x.shape[-1] == k, op, "expected a float x of shape [..., k]")
    expect(scale.dtype == torch.float32 and scale.shape == (n,), op, "expected a float32 scale of shape [n]")
    if bias is not None:
        expect(bias.dtype in FLOAT_DTYPES and bias.shape == (n,), op, "expected a float bias of shape [n]")
        bias = bias.contiguous()
    same_device(op, x, weight, scale, bias)

    flat, weight, scale = x.reshape(x.shape[:-1].numel(), k).contiguous(), weight.contiguous(), scale.contiguous()
    m, y = flat.shape[0], x.new_empty((*x.shape[:-1], n))
    if y.numel() == 0:
        return y
    device, aligned = _device.describe(x.device), is_aligned(flat, weight)
    by_bits = aligned and x.device.type != "cpu"  # the interpreter has no assembly
    config = weight_config(m, n, k, x.dtype, aligned, device)
    if m == 1:
        with torch.cuda.device_of(x):
            token_kernel[(triton.cdiv(n, config.outputs),)](
                flat,
                weight,
                scale,
                bias,
                y,
                n,
                k,
                OUTPUTS=config.outputs,
                BLOCK_K=config.block_k,
                STAGES=config.stages,
                BY_BITS=by_bits,
                num_warps=config.warps,
            )
        return y
    tiles, parts, counters = config.tiles(m, n), None, None
    if config.splits > 1:
        parts = x.new_empty(tiles * config.splits * config.outputs * config.tokens, dtype=torch.float32)
        counters = x.new_zeros(tiles, dtype=torch.int32)
    by_descriptor = aligned and device.has_tensor_maps
    x_by_descriptor = by_descriptor and m >= FEWEST_BY_DESCRIPTOR
    with torch.cuda.device_of(x):
        int8_weight_kernel[(tiles * config.splits,)](
            operand(weight, config.outputs, config.block_k, by_descriptor),
            operand(flat, config.tokens, config.block_k, x_by_descriptor),
            scale,
            bias,
            y,
            parts,
            counters,
            m,
            n,
            k,
            config.k_per_split(k),
            BY_DESCRIPTOR=by_descriptor,
            X_BY_DESCRIPTOR=x_by_descriptor,
            SPLITS=config.splits,
            OUTPUTS=config.outputs,
            TOKENS=config.tokens,
            BLOCK_K=config.block_k,
            BY_BITS=by_bits,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return y


def register() -> None:
    """Makes these kernels the owner of `engine::int8_weight_linear` for CUDA."""
    own_cuda("int8_weight_linear", int8_weight_linear)

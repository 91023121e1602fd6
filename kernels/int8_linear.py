"""int8_linear on NVIDIA GPUs: rows are quantised by one kernel, multiplied on the tensor cores by a second.

The second is persistent. Its operands are both K-major, as they lie in memory: the tensor cores take int8 no other way.
For few tokens the operands are swapped, so that the outputs fill the 64 rows that a tensor core instruction has at
least and the tokens its columns, of which 16 are enough; and K is split, so that every multiprocessor reads weights.
The parts of one tile are added by whichever program finishes last: integers, so that the order does not matter.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from engine.kernels import _device
from engine.kernels._device import FLOAT_DTYPES, Device, expect, own_cuda, same_device
from engine.kernels._tiles import is_aligned, load_tile, operand, tile_of
from engine.kernels.int8_quantize import quantize_rows

LONGEST_SUM = 131072  # |products| are at most 128 · 127, so that int32 holds the sum of so many
MOST_SWAPPED = 256  # tokens
SHORTEST_PART = 1024  # of K


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """How y = x @ weight.T is cut: A holds the tile's rows, B its columns."""

    swapped: bool  # A is the weight and B the activations; otherwise the other way round
    block_a: int
    block_b: int
    block_k: int
    splits: int  # of K
    warps: int
    stages: int
    blocks_per_multiprocessor: int

    def tiles(self, m: int, n: int) -> int:
        """Tiles of the result."""
        a, b = (n, m) if self.swapped else (m, n)
        return triton.cdiv(a, self.block_a) * triton.cdiv(b, self.block_b)

    def k_per_split(self, k: int) -> int:
        """How much of K one part sums: whole blocks."""
        return triton.cdiv(triton.cdiv(k, self.block_k), self.splits) * self.block_k


def _tile(m: int, n: int, wide: bool, aligned: bool, device: Device) -> tuple[bool, int, int, int, int, int]:
    """swapped, block_a, block_b, block_k, warps and blocks a multiprocessor: what was fastest on an H200.

    Triton 3.6 lets the tensor cores finish each step of int8 before it goes on. So two blocks share a multiprocessor
    where they can: one multiplies while the other waits. Between 129 and 256 tokens one large tile reads less from L2.
    """
    tokens = max(16, triton.next_power_of_2(m))
    if not aligned:
        return m < 128, 128, min(tokens, 64 if m < 128 else 128), 32, 8, 1
    if device.capability != 90:
        return (True, 128, tokens, 128, 4, 2) if tokens <= 64 else (m < 128, 128, 128, 128, 8, 1)
    if tokens <= 64:
        return True, 64, tokens, 256, 4, 2
    if tokens <= 128:
        return True, 64, 128, 128, 4, 2
    if tokens <= MOST_SWAPPED and not wide:  # whose accumulators leave no registers for sums in int64
        return True, 128, 256, 128, 8, 1
    large = triton.cdiv(m, 128) * triton.cdiv(n, 128)
    if large > device.multiprocessors:
        return False, 128, 128, 128, 8, 2
    return (False, 64, 128, 128, 4, 2) if large > device.multiprocessors // 2 else (False, 64, 64, 128, 4, 3)


@functools.lru_cache(maxsize=4096)
def gemm_config(m: int, n: int, k: int, aligned: bool, device: Device) -> GemmConfig:
    """The configuration for M, N, K and the card; rows that are not `aligned` to 16 bytes are loaded byte by byte.

    K is split where the tiles leave multiprocessors idle, into as many parts as run at the same time, none too short to
    be worth adding.
    """
    swapped, block_a, block_b, block_k, warps, blocks = _tile(m, n, k > LONGEST_SUM, aligned, device)
    room = device.shared_memory // blocks - 2048  # barriers and the system take a kilobyte or two
    stages = max(2, min(6, room // ((block_a + block_b) * block_k)))
    config = GemmConfig(swapped, block_a, block_b, block_k, 1, warps, stages, blocks)
    splits, tiles = 1, config.tiles(m, n)
    if tiles < 0.9 * device.multiprocessors:
        splits = min(32, blocks * device.multiprocessors // tiles, k // SHORTEST_PART)
    if k > LONGEST_SUM:
        splits = max(splits, triton.cdiv(k, LONGEST_SUM - block_k))
    return dataclasses.replace(config, splits=max(1, splits))


@functools.cache
def _library_multiplies() -> bool:
    """Whether the CUDA C++ kernel is loaded that lets a product go on while the next step is waited for."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("engine::int8_scaled_mm", "CUDA")


def use_library(m: int, n: int, k: int, aligned: bool, device: Device) -> bool:
    """Whether CUDA C++ multiplies: on Hopper, from 65 tokens on, where small tiles give work to half of the card."""
    fits = device.capability == 90 and aligned and m > 64 and 0 < k < LONGEST_SUM and k % 16 == 0
    enough = 2 * triton.cdiv(m, 128) * triton.cdiv(n, 64) >= device.multiprocessors
    return fits and enough and _library_multiplies()


@triton.jit
def write_out(
    acc,  # int32 or int64 [A, B], exact
    row_a,  # the tile's first row
    row_b,  # the tile's first column
    token_scale,  # float32 [m]
    scale,  # float32 [n]
    bias,  # [n], a float dtype, or None
    y,  # [m, n], a float dtype
    m,
    n,
    SWAPPED: tl.constexpr,
):
    """y = float(acc) * (s_x * s_w) + bias in float32, in that order, then cast."""
    a = row_a + tl.arange(0, acc.shape[0])[:, None]
    b = row_b + tl.arange(0, acc.shape[1])[None, :]
    if SWAPPED:
        token, output = b, a
    else:
        token, output = a, b
    factor = tl.load(token_scale + token, mask=token < m) * tl.load(scale + output, mask=output < n)
    result = acc.to(tl.float32) * factor
    if bias is not None:
        result += tl.load(bias + output, mask=output < n).to(tl.float32)
    at = y + token.to(tl.int64) * n + output
    tl.store(at, result.to(y.dtype.element_ty), mask=(token < m) & (output < n))


@triton.jit(do_not_specialize=["m"])
def int8_gemm_kernel(
    a,  # int8 [n, k] where SWAPPED, otherwise [m, k]: a descriptor or a pointer
    b,  # the other one
    token_scale,  # float32 [m]
    scale,  # float32 [n]
    bias,  # [n], a float dtype, or None
    y,  # [m, n], a float dtype
    parts,  # int32 [tiles, SPLITS, BLOCK_A, BLOCK_B]: the parts of each tile's sum; None: K is not split
    counters,  # int32 [tiles], 0: how many parts are there; None: K is not split
    m,
    n,
    k,
    a_stride,
    b_stride,
    k_per_split,
    SWAPPED: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,  # the sum over all of K may need int64
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DEPENDENT: tl.constexpr,  # launched before the kernel that quantises has ended
):
    """Every program goes through tiles, and parts of tiles, in steps of the number of programs."""
    if DEPENDENT:
        gdc_wait()
    if SWAPPED:
        rows_a, rows_b = n, m
    else:
        rows_a, rows_b = m, n
    tiles_a, tiles_b = tl.cdiv(rows_a, BLOCK_A), tl.cdiv(rows_b, BLOCK_B)
    items = tiles_a * tiles_b * SPLITS
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        tile, split = item // SPLITS, item % SPLITS
        tile_a, tile_b = tile_of(tile, tiles_a, tiles_b, GROUP)
        row_a, row_b = tile_a * BLOCK_A, tile_b * BLOCK_B
        acc = tl.zeros([BLOCK_A, BLOCK_B], tl.int32)
        for at in tl.range(split * k_per_split, min(k, (split + 1) * k_per_split), BLOCK_K):
            rows = load_tile(a, row_a, at, rows_a, k, a_stride, BLOCK_A, BLOCK_K, BY_DESCRIPTOR)
            columns = load_tile(b, row_b, at, rows_b, k, b_stride, BLOCK_B, BLOCK_K, BY_DESCRIPTOR)
            acc = tl.dot(rows, columns.T, acc, out_dtype=tl.int32)
        if SPLITS == 1:
            write_out(acc, row_a, row_b, token_scale, scale, bias, y, m, n, SWAPPED)
        else:
            within = tl.arange(0, BLOCK_A)[:, None] * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
            part = parts + tile * tl.full([], SPLITS * BLOCK_A * BLOCK_B, tl.int64) + within
            tl.store(part + split * (BLOCK_A * BLOCK_B), acc)
            tl.debug_barrier()  # the whole block has written before one thread says so
            if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1:
                total = tl.zeros([BLOCK_A, BLOCK_B], tl.int64 if WIDE else tl.int32)
                for i in range(SPLITS):
                    total += tl.load(part + i * (BLOCK_A * BLOCK_B), cache_modifier=".cg")
                write_out(total, row_a, row_b, token_scale, scale, bias, y, m, n, SWAPPED)


def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, input_scale: Tensor | None = None
) -> Tensor:
    """`engine::int8_linear` for CUDA: `x` [..., k], `weight` int8 [n, k], `scale` float32 [n]."""
    op = "int8_linear"
    expect(weight.dtype == torch.int8 and weight.dim() == 2, op, "expected an int8 matrix")
    n, k = weight.shape
    expect(x.dtype in FLOAT_DTYPES and x.dim() >= 1 and x.shape[-1] == k, op, "expected a float x of shape [..., k]")
    expect(scale.dtype == torch.float32 and scale.shape == (n,), op, "expected a float32 scale of shape [n]")
    if bias is not None:
        expect(bias.dtype in FLOAT_DTYPES and bias.shape == (n,), op, "expected a float bias of shape [n]")
        bias = bias.contiguous()
    if input_scale is not None:
        fits = input_scale.dtype == torch.float32 and (input_scale.numel() == 1 or input_scale.shape == (k,))
        expect(fits, op, "expected a float32 input_scale of one element or shape [k]")
    same_device(op, x, weight, scale, bias, input_scale)

    flat, weight = x.reshape(x.shape[:-1].numel(), k).contiguous(), weight.contiguous()
    m, sizes = flat.shape[0], (*x.shape[:-1], n)
    if m == 0 or n == 0:
        return x.new_empty(sizes)
    device = _device.describe(x.device)
    aligned = is_aligned(weight)
    if x.is_cuda and use_library(m, n, k, aligned, device):
        q, token_scale = quantize_rows(flat, device.multiprocessors, input_scale, align=16)
        return torch.ops.engine.int8_scaled_mm(q, token_scale, weight, scale, bias, x.dtype).view(sizes)
    config, y = gemm_config(m, n, k, aligned, device), x.new_empty(sizes)
    by_descriptor = aligned and device.has_tensor_maps
    tiles, parts, counters = config.tiles(m, n), None, None
    if config.splits > 1:
        parts = x.new_empty(tiles * config.splits * config.block_a * config.block_b, dtype=torch.int32)
        counters = x.new_empty(tiles, dtype=torch.int32)  # which quantize_rows sets to 0
    # One launch less to wait for, where that counts. With many tokens, programs that wait keep others from running.
    dependent = x.device.type != "cpu" and config.swapped and device.has_tensor_maps
    q, token_scale = quantize_rows(flat, device.multiprocessors, input_scale, 16, counters, dependent)
    a, b = (weight, q) if config.swapped else (q, weight)
    programs = min(tiles * config.splits, device.multiprocessors * config.blocks_per_multiprocessor)
    with torch.cuda.device_of(x):
        int8_gemm_kernel[(programs,)](
            operand(a, config.block_a, config.block_k, by_descriptor),
            operand(b, config.block_b, config.block_k, by_descriptor),
            token_scale,
            scale.contiguous(),
            bias,
            y,
            parts,
            counters,
            m,
            n,
            k,
            a.stride(0),
            b.stride(0),
            config.k_per_split(k),
            SWAPPED=config.swapped,
            BY_DESCRIPTOR=by_descriptor,
            SPLITS=config.splits,
            WIDE=k > LONGEST_SUM,
            BLOCK_A=config.block_a,
            BLOCK_B=config.block_b,
            BLOCK_K=config.block_k,
            GROUP=8,
            DEPENDENT=dependent,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=False,
            **({"launch_pdl": True} if dependent else {}),
        )
    return y


def register() -> None:
    """Makes these kernels the owner of `engine::int8_linear` for CUDA."""
    own_cuda("int8_linear", int8_linear)

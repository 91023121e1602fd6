"""ring_encode, ring_prune_encode and ring_decode on NVIDIA GPUs, to the bit as on the CPU (`csrc/ring/codec.h`).

Encoding never waits for the host. Decoding a bitmap does, once: it may contradict itself, and `x` is not touched then.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine._ring_codec import BLOCK, HEADER, bitmap_bytes, bitmap_capacity, dense_bytes, threshold_of
from engine.kernels._device import expect, own_cuda, same_device
from engine.kernels.int8_quantize import INFINITY_BITS, amax_bits, quantize, row_scale

ELEMENTS = 2048  # of a program
BFLOAT16_NAN = tl.constexpr(0x7FC0)


@triton.jit
def finite(x):
    """Whether it is a number; fast-math could not take this away."""
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < INFINITY_BITS


@triton.jit
def bfloat16_bits(x):
    """Rounded half to even, as int16; every NaN has the same bits."""
    return tl.where(x == x, x.to(tl.bfloat16).to(tl.int16, bitcast=True), tl.full(x.shape, BFLOAT16_NAN, tl.int16))


@triton.jit
def sum_of(x, residual, at, inside):
    """What is encoded: x, and what was left the last time."""
    value = tl.load(x + at, mask=inside, other=0.0)
    if residual is not None:
        value += tl.load(residual + at, mask=inside, other=0.0)
    return value


@triton.jit
def encode_bf16_kernel(
    x,  # float32 [n]
    residual,  # float32 [n], or None
    sent,  # int16 [n]: the wire
    n,
    ELEMENTS: tl.constexpr,
):
    """Rounds, and keeps what rounding takes away."""
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < n
    value = sum_of(x, residual, at, inside)
    bits = bfloat16_bits(value)
    tl.store(sent + at, bits, mask=inside)
    if residual is not None:
        received = bits.to(tl.bfloat16, bitcast=True).to(tl.float32)
        tl.store(residual + at, value - received, mask=inside & finite(received))


@triton.jit
def encode_int8_kernel(
    x,  # float32 [n]
    residual,  # float32 [n], or None
    scale,  # float32 [blocks]: the wire's first part
    sent,  # int8 [n]: the wire's second
    n,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # blocks of a program
):
    """Quantises blocks as int8_quantize does rows, and keeps what that takes away."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < n
    value = sum_of(x, residual, at, inside)
    s, inverse, usable = row_scale(amax_bits(value))
    q = quantize(value, inverse[:, None], usable)
    tl.store(scale + block, s, mask=block * BLOCK < n)
    tl.store(sent + at, q, mask=inside)
    if residual is not None:
        received = q.to(tl.float32) * s[:, None]
        tl.store(residual + at, value - received, mask=inside & finite(received))


@triton.jit
def deliver(x, at, value, inside, ADD: tl.constexpr):
    """Stores what was received, or adds it."""
    if ADD:
        value = tl.load(x + at, mask=inside) + value
    tl.store(x + at, value, mask=inside)


@triton.jit
def decode_bf16_kernel(sent, x, factor, n, ADD: tl.constexpr, ELEMENTS: tl.constexpr):
    """`sent` int16 [n] times factor, into float32 [n]."""
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < n
    value = tl.load(sent + at, mask=inside, other=0).to(tl.bfloat16, bitcast=True).to(tl.float32)
    deliver(x, at, value * factor, inside, ADD)


@triton.jit
def decode_int8_kernel(scale, sent, x, factor, n, ADD: tl.constexpr, BLOCK: tl.constexpr, ELEMENTS: tl.constexpr):
    """`sent` int8 [n] times (`scale` float32 [blocks] times factor), into float32 [n]."""
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < n
    s = tl.load(scale + at // BLOCK, mask=inside, other=0.0) * factor
    deliver(x, at, tl.load(sent + at, mask=inside, other=0).to(tl.float32) * s, inside, ADD)


@triton.jit
def is_kept(value, limit):
    """A NaN is kept."""
    return (tl.abs(value) <= limit) == 0


@triton.jit
def count_kept_kernel(
    x,  # float32 [n]
    residual,  # float32 [n], or None
    threshold,  # float32, one element
    counts,  # int32 [2, programs]: how many each keeps, and of how many groups of 8
    not_finite,  # int32 [1], 0 at first: whether any is a NaN or an infinity
    n,
    ELEMENTS: tl.constexpr,
):
    """The first of two passes over x."""
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < n
    value = sum_of(x, residual, at, inside)
    kept = (is_kept(value, tl.load(threshold)) & inside).to(tl.int32)
    each = tl.sum(tl.reshape(kept, [ELEMENTS // 8, 8]), axis=1)
    tl.store(counts + tl.program_id(0), tl.sum(each, axis=0))
    tl.store(counts + tl.num_programs(0) + tl.program_id(0), tl.sum((each != 0).to(tl.int32), axis=0))
    if tl.max((finite(value) == 0).to(tl.int32), axis=0) != 0:
        tl.store(not_finite, 1)


@triton.jit
def pack(bits, COUNT: tl.constexpr):
    """`bits` [COUNT], 0 or 1, eight a number, the first in its least significant bit: [COUNT / 8]."""
    return tl.sum(tl.reshape(bits, [COUNT // 8, 8]) << tl.arange(0, 8)[None, :], axis=1)


@triton.jit(do_not_specialize=["capacity"])
def send_kept_kernel(
    x,  # float32 [n], which becomes 0
    residual,  # float32 [n], or None
    threshold,  # float32, one element
    through,  # int64 [2, programs]: how many all programs up to each keep, and of how many groups
    mask,  # uint8 [8 * ceil(n / 512)], 0 at first: a bit for each group, whether any of it is sent
    sent,  # int16 [capacity]
    groups,  # uint8 [groups that are sent]: which of each
    n,
    capacity,
    ELEMENTS: tl.constexpr,
):
    """The second: what is sent of each group, the values, and the rest into the residual."""
    program = tl.program_id(0).to(tl.int64)
    at = program * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < n
    value = sum_of(x, residual, at, inside)
    kept = (is_kept(value, tl.load(threshold)) & inside).to(tl.int32)
    count = tl.sum(kept, axis=0)
    rank = tl.load(through + program) - count + tl.cumsum(kept, axis=0) - kept
    goes = (kept != 0) & (rank < capacity)
    bits = bfloat16_bits(value)
    tl.store(sent + rank, bits, mask=goes)
    octet = pack(goes.to(tl.int32), ELEMENTS)
    # What there is no room for comes last, so that groups of it come after all groups that are sent.
    some = tl.max(tl.reshape(kept, [ELEMENTS // 8, 8]), axis=1)
    before = tl.load(through + tl.num_programs(0) + program) - tl.sum(some, axis=0)
    tl.store(groups + before + tl.cumsum(some, axis=0) - some, octet.to(tl.uint8), mask=octet != 0)
    byte = program * (ELEMENTS // 64) + tl.arange(0, ELEMENTS // 64)
    tl.store(mask + byte, pack((octet != 0).to(tl.int32), ELEMENTS // 8).to(tl.uint8), mask=byte * 64 < n)
    if residual is not None:
        received = tl.where(goes, bits.to(tl.bfloat16, bitcast=True).to(tl.float32), 0.0)
        rest = tl.where(finite(value) & finite(received), value - received, 0.0)
        tl.store(residual + at, rest, mask=inside)
    tl.store(x + at, tl.zeros([ELEMENTS], tl.float32), mask=inside)


@triton.jit
def count_groups_kernel(mask, counts, ELEMENTS: tl.constexpr):
    """Of how many groups of its ELEMENTS each program has something: int32 [programs]."""
    byte = tl.program_id(0).to(tl.int64) * (ELEMENTS // 64) + tl.arange(0, ELEMENTS // 64)
    bits = tl.load(mask + byte).to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :] & 1
    tl.store(counts + tl.program_id(0), tl.sum(tl.sum(bits, axis=1), axis=0))


@triton.jit
def octets_of(mask, through, groups, room, ELEMENTS: tl.constexpr):
    """Which of each group are sent, 0 where none: int32 [ELEMENTS / 8]; and whether a group has something."""
    program = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, ELEMENTS // 8)
    byte = tl.load(mask + program * (ELEMENTS // 64) + group // 8).to(tl.int32)
    some = byte >> (group % 8) & 1
    rank = tl.load(through + program) - tl.sum(some, axis=0) + tl.cumsum(some, axis=0) - some
    return tl.load(groups + rank, mask=(some != 0) & (rank < room), other=0).to(tl.int32), some


@triton.jit(do_not_specialize=["room"])
def count_values_kernel(
    mask,  # uint8 [programs * ELEMENTS / 64]
    through,  # int64 [programs]: of how many groups all programs up to each have something
    groups,  # uint8 [room]
    counts,  # int32 [2, programs]: how many values each has, and how much in it contradicts itself
    n,
    room,
    ELEMENTS: tl.constexpr,
):
    """Before anything is decoded."""
    program = tl.program_id(0).to(tl.int64)
    octet, some = octets_of(mask, through, groups, room, ELEMENTS)
    bits = octet[:, None] >> tl.arange(0, 8)[None, :] & 1
    at = program * ELEMENTS + tl.arange(0, ELEMENTS // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    wrong = tl.sum(((some != 0) & (octet == 0)).to(tl.int32), axis=0)  # no byte is there for it, or an empty one
    wrong += tl.sum(tl.sum(tl.where(at >= n, bits, 0), axis=1), axis=0)
    tl.store(counts + program, tl.sum(tl.sum(bits, axis=1), axis=0))
    tl.store(counts + tl.num_programs(0) + program, wrong)


@triton.jit(do_not_specialize=["room"])
def decode_bitmap_kernel(
    mask,
    through,  # int64 [programs], as above
    values_through,  # int64 [programs]: how many values all programs up to each have
    groups,
    sent,
    x,
    factor,
    n,
    room,
    ADD: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """`sent` int16 at the places whose bit is set, times factor, and 0 elsewhere, into float32 [n]."""
    program = tl.program_id(0).to(tl.int64)
    octet, _ = octets_of(mask, through, groups, room, ELEMENTS)
    bits = octet[:, None] >> tl.arange(0, 8)[None, :] & 1
    each = tl.sum(bits, axis=1)
    before = tl.load(values_through + program) - tl.sum(each, axis=0) + tl.cumsum(each, axis=0) - each
    rank = before[:, None] + tl.cumsum(bits, axis=1) - bits
    value = tl.load(sent + rank, mask=bits != 0, other=0).to(tl.bfloat16, bitcast=True).to(tl.float32)
    at = program * ELEMENTS + tl.arange(0, ELEMENTS // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    deliver(x, at, tl.where(bits != 0, value * factor, 0.0), at < n, ADD)


def parts_of_bitmap(wire: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The groups' bits, the values as int16, and the groups' bytes."""
    begin, capacity = bitmap_bytes(n), bitmap_capacity(n, wire.numel())
    end = begin + 2 * capacity
    return wire[HEADER:begin], wire[begin:end].view(torch.int16), wire[end:]


def check_wire(op: str, wire: Tensor, codec: str, *floats: Tensor | None) -> int:
    """Raises RuntimeError unless they fit together; returns n."""
    given = [t for t in floats if t is not None]
    n = given[0].numel()
    same = all(t.dtype == torch.float32 and t.shape == (n,) and t.is_contiguous() for t in given)
    expect(same, op, "expected contiguous float32 tensors of one size")
    expect(wire.dtype == torch.uint8 and wire.dim() == 1 and wire.is_contiguous(), op, "expected a contiguous wire")
    expect(codec in ("bf16", "int8", "bitmap"), op, "expected another codec")
    size = wire.numel()
    fits = bitmap_capacity(n, size) >= 0 if codec == "bitmap" else size == dense_bytes(codec, n)
    expect(fits, op, "expected a wire of another size")
    same_device(op, wire, *given)
    return n


def aligned(wire: Tensor) -> bool:
    """Whether its words can be read where they lie: it may be any slice of a buffer."""
    return wire.storage_offset() % 8 == 0 and wire.data_ptr() % 8 == 0


def programs(n: int) -> tuple[int]:
    """One for each ELEMENTS."""
    return (triton.cdiv(n, ELEMENTS),)


def ring_encode(x: Tensor, residual: Tensor | None, codec: str, wire: Tensor) -> None:
    """`engine::ring_encode` for CUDA."""
    op = "ring_encode"
    expect(codec in ("bf16", "int8"), op, "expected bf16 or int8")
    n = check_wire(op, wire, codec, x, residual)
    if n == 0:
        return
    to = wire if aligned(wire) else torch.empty_like(wire)
    with torch.cuda.device_of(x):
        if codec == "bf16":
            encode_bf16_kernel[programs(n)](x, residual, to.view(torch.int16), n, ELEMENTS=ELEMENTS, num_warps=8)
        else:
            scales, rows = 4 * triton.cdiv(n, BLOCK), ELEMENTS // BLOCK
            scale, sent = to[:scales].view(torch.float32), to[scales:].view(torch.int8)
            encode_int8_kernel[programs(n)](
                x, residual, scale, sent, n, BLOCK=BLOCK, ROWS=rows, num_warps=8, enable_fp_fusion=False
            )
    if to is not wire:
        wire.copy_(to)


def ring_prune_encode(x: Tensor, residual: Tensor | None, density: float, wire: Tensor) -> None:
    """`engine::ring_prune_encode` for CUDA."""
    op = "ring_prune_encode"
    expect(0 < density <= 1, op, "expected a density in (0, 1]")
    n = check_wire(op, wire, "bitmap", x, residual)
    wire.zero_()
    if n == 0:
        return
    to = wire if aligned(wire) else torch.zeros_like(wire)
    threshold = threshold_of(x, residual, density)
    counts = torch.empty((2, *programs(n)), dtype=torch.int32, device=x.device)
    header = torch.zeros(2, dtype=torch.int32, device=x.device)
    mask, sent, groups = parts_of_bitmap(to, n)
    with torch.cuda.device_of(x):
        count_kept_kernel[programs(n)](x, residual, threshold, counts, header[1:], n, ELEMENTS=ELEMENTS, num_warps=8)
        through = counts.cumsum(1)
        send_kept_kernel[programs(n)](
            x, residual, threshold, through, mask, sent, groups, n, sent.numel(), ELEMENTS=ELEMENTS, num_warps=8
        )
    header[:1] = through[0, -1:].clamp(max=sent.numel())
    to[:HEADER].copy_(header.view(torch.uint8))
    if to is not wire:
        wire.copy_(to)


def ring_decode(wire: Tensor, codec: str, factor: float, add: bool, x: Tensor) -> None:
    """`engine::ring_decode` for CUDA."""
    n = check_wire("ring_decode", wire, codec, x)
    if not aligned(wire):
        wire = wire.clone()
    how = {"ADD": add, "ELEMENTS": ELEMENTS, "num_warps": 8, "enable_fp_fusion": False}
    with torch.cuda.device_of(x):
        if codec == "bitmap":
            decode_bitmap(wire, factor, x, how)
        elif n > 0 and codec == "bf16":
            decode_bf16_kernel[programs(n)](wire.view(torch.int16), x, factor, n, **how)
        elif n > 0:
            scales = 4 * triton.cdiv(n, BLOCK)
            scale, sent = wire[:scales].view(torch.float32), wire[scales:].view(torch.int8)
            decode_int8_kernel[programs(n)](scale, sent, x, factor, n, BLOCK=BLOCK, **how)


def decode_bitmap(wire: Tensor, factor: float, x: Tensor, how: dict) -> None:
    """Of "bitmap", after it was looked at whether it agrees with itself."""
    n = x.numel()
    mask, sent, groups = parts_of_bitmap(wire, n)
    grid = programs(n)
    mask = torch.nn.functional.pad(mask, (0, grid[0] * (ELEMENTS // 64) - mask.numel()))  # whole programs
    counts = torch.zeros((3, *grid), dtype=torch.int32, device=x.device)
    through = values_through = counts
    if n:
        count_groups_kernel[grid](mask, counts, ELEMENTS=ELEMENTS, num_warps=8)
        through = counts[0].cumsum(0)
        count_values_kernel[grid](mask, through, groups, counts[1:], n, groups.numel(), ELEMENTS=ELEMENTS, num_warps=8)
        values_through = counts[1].cumsum(0)
    looked_at = torch.cat([wire[:HEADER].view(torch.int32).long(), counts[1:].sum(1)])
    count, flags, found, wrong = looked_at.tolist()  # the one wait
    good = 0 <= count <= sent.numel() and flags in (0, 1)
    if good and flags:
        x.fill_(torch.nan)
        return
    expect(good and found == count and wrong == 0, "ring_decode", "wire: expected a bitmap that agrees with itself")
    if n:
        decode_bitmap_kernel[grid](mask, through, values_through, groups, sent, x, factor, n, groups.numel(), **how)


def register() -> None:
    """Makes these kernels the owners of the codec's ops for CUDA."""
    own_cuda("ring_encode", ring_encode)
    own_cuda("ring_prune_encode", ring_prune_encode)
    own_cuda("ring_decode", ring_decode)

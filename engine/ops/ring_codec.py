"""ring_encode, ring_prune_encode, ring_decode: what a collective sends instead of float32.

They write into tensors of the caller, who reuses them piece after piece. The layouts stand in `csrc/ring/codec.h`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from engine._ring_codec import BLOCK, GROUP, HEADER, bitmap_bytes, bitmap_capacity, dense_bytes, threshold_of
from engine.ops import _check
from engine.ops._library import REFERENCES, define_mutating, explained_by
from engine.ops.int8_quantize import int8_quantize  # noqa: F401  (defines the reference that this one builds on)
from engine.ops.prune_to_bitmap import prune_to_bitmap  # noqa: F401  (the same)

CODECS = ("bf16", "int8", "bitmap")
ROOM = 1.25  # how many more values than the density asks for "bitmap" has room for: its threshold is an estimate


def wire_bytes(codec: str, n: int, density: float = 0.01) -> int:
    """Bytes that `n` elements take by `codec`; the same on every rank, whatever the values are."""
    _check.expect(codec in CODECS, "ring_codec", "codec", f"one of {', '.join(CODECS)}", repr(codec))
    if codec != "bitmap":
        return dense_bytes(codec, n)
    capacity = min(n, math.ceil(ROOM * density * n) + 32)
    return bitmap_bytes(n) + 2 * capacity + min(capacity, -(-n // GROUP))


def _check_floats(op: str, name: str, t: Tensor, n: int) -> None:
    _check.is_dtype(op, name, t, torch.float32)
    _check.has_shape(op, name, t, (n,))
    _check.expect(t.is_contiguous(), op, name, "a contiguous tensor", f"strides {t.stride()}")


def _check_wire(op: str, codec: str, wire: Tensor, n: int) -> None:
    _check.is_dtype(op, "wire", wire, torch.uint8)
    _check.has_shape(op, "wire", wire, ("bytes",))
    _check.expect(wire.is_contiguous(), op, "wire", "a contiguous tensor", f"strides {wire.stride()}")
    size = wire.shape[0]
    if codec == "bitmap":
        what = f"{bitmap_bytes(n)} bytes, 2 for each value, 1 for each group of {GROUP} elements"
        _check.expect(bitmap_capacity(n, size) >= 0, op, "wire", what, size)
    else:
        _check.expect(size == wire_bytes(codec, n), op, "wire", f"{wire_bytes(codec, n)} bytes", size)


def _check_encode(x: Tensor, residual: Tensor | None, codec: str, wire: Tensor) -> None:
    _check.expect(codec in CODECS[:2], "ring_encode", "codec", "one of bf16, int8", repr(codec))
    _check_floats("ring_encode", "x", x, x.numel())
    if residual is not None:
        _check_floats("ring_encode", "residual", residual, x.numel())
    _check_wire("ring_encode", codec, wire, x.numel())


def _check_prune_encode(x: Tensor, residual: Tensor | None, density: float, wire: Tensor) -> None:
    _check_floats("ring_prune_encode", "x", x, x.numel())
    if residual is not None:
        _check_floats("ring_prune_encode", "residual", residual, x.numel())
    _check.expect(0 < density <= 1, "ring_prune_encode", "density", "a number in (0, 1]", density)
    _check_wire("ring_prune_encode", "bitmap", wire, x.numel())


def _check_decode(wire: Tensor, codec: str, x: Tensor, factor: float = 1.0, add: bool = False) -> None:
    _check.expect(codec in CODECS, "ring_decode", "codec", f"one of {', '.join(CODECS)}", repr(codec))
    _check_floats("ring_decode", "x", x, x.numel())
    _check_wire("ring_decode", codec, wire, x.numel())


def _with_address(op: str, check: Callable, place: int) -> Callable:
    """`check`, and whether the wire, argument `place`, lies where kernels read it: apart, as fakes have no address."""

    def explain(*args) -> None:
        check(*args)
        _check.expect(args[place].data_ptr() % 8 == 0, op, "wire", "an address that is a multiple of 8", "another")

    return explain


def _in_blocks(x: Tensor) -> Tensor:
    """[n] to [blocks, BLOCK], the last filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[0] % BLOCK)).view(-1, BLOCK)


def _bfloat16_bits(values: Tensor) -> Tensor:
    """Rounded half to even, as bytes; every NaN has the same bits."""
    bits = values.bfloat16().view(torch.int16)
    return torch.where(values.isnan(), 0x7FC0, bits).to(torch.int16).view(torch.uint8)


def _reference_encode(x: Tensor, residual: Tensor | None, codec: str, wire: Tensor) -> None:
    _check_encode(x, residual, codec, wire)
    values = x if residual is None else x + residual
    if codec == "bf16":
        wire.copy_(_bfloat16_bits(values))
    else:
        q, scale = REFERENCES["int8_quantize"](_in_blocks(values))
        wire.copy_(torch.cat([scale.view(torch.uint8), q.view(-1)[: x.shape[0]].view(torch.uint8)]))
    if residual is not None:
        received = _values_of(wire, codec, x.shape[0], 1.0)
        residual.copy_(torch.where(received.isfinite(), values - received, residual))


def _reference_prune_encode(x: Tensor, residual: Tensor | None, density: float, wire: Tensor) -> None:
    _check_prune_encode(x, residual, density, wire)
    n = x.shape[0]
    values = x.clone() if residual is None else x + residual
    capacity = bitmap_capacity(n, wire.shape[0])
    bitmask, _, kept = REFERENCES["prune_to_bitmap"](values.unsqueeze(0), threshold_of(values, None, density))
    places = _places(bitmask[0], n)
    count = min(capacity, places.shape[0])
    sent = _bfloat16_bits(kept[:count])
    mask = torch.zeros(n, dtype=torch.bool, device=x.device).index_fill_(0, places[:count], True)
    finite = bool(kept.isfinite().all())
    header = torch.tensor([count, 0 if finite else 1], dtype=torch.int32, device=x.device).view(torch.uint8)
    groups = _packed(torch.nn.functional.pad(mask, (0, -n % (64 * GROUP))))
    some = groups.ne(0)
    room = sent.new_zeros(wire.shape[0] - bitmap_bytes(n))
    room[: 2 * count] = sent
    room[2 * capacity :][: int(some.sum())] = groups[some]
    wire.copy_(torch.cat([header, _packed(some), room]))
    if residual is not None:
        received = torch.zeros_like(x).index_copy_(0, places[:count], sent.view(torch.bfloat16).float())
        residual.copy_(torch.where(values.isfinite() & received.isfinite(), values - received, 0.0))
    x.zero_()


def _packed(bits: Tensor) -> Tensor:
    """Eight booleans a byte, the first in its least significant bit."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 8).to(torch.uint8) << places).sum(-1, dtype=torch.uint8)


def _places(bitmask: Tensor, n: int) -> Tensor:
    """Indices of the bits that are set, int64."""
    bits = bitmask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bitmask.device) & 1
    return bits.view(-1)[:n].nonzero().view(-1)


def _values_of(wire: Tensor, codec: str, n: int, factor: float) -> Tensor:
    """What the receiver sees, float32 [n]."""
    wire = wire.clone()  # to an address of its own, whatever slice of a buffer it is
    if codec == "bf16":
        return wire.view(torch.bfloat16).float() * factor
    if codec == "int8":
        blocks = -(-n // BLOCK)
        scale = wire[: 4 * blocks].view(torch.float32) * factor
        q = _in_blocks(wire[4 * blocks :].view(torch.int8).float())
        return (q * scale.unsqueeze(-1)).view(-1)[:n]
    count, flags = wire[:HEADER].view(torch.int32).tolist()
    begin, capacity = bitmap_bytes(n), bitmap_capacity(n, wire.shape[0])
    values, masks = wire[begin:][: 2 * capacity].view(torch.bfloat16).float(), wire[begin + 2 * capacity :]
    some = _places(wire[HEADER:begin], 8 * (begin - HEADER))
    good = 0 <= count <= capacity and flags in (0, 1)
    if good and flags:
        return torch.full((n,), torch.nan, dtype=torch.float32, device=wire.device)
    masks = masks[: some.shape[0]]
    bits = _places(masks, 8 * masks.shape[0])
    good = good and masks.shape == some.shape and bool(masks.all()) and bits.shape[0] == count
    places = GROUP * some[bits // 8] + bits % 8 if good else bits
    good = good and not bool((places >= n).any())
    _check.expect(good, "ring_decode", "wire", "a header, bitmasks and values that agree", "others", RuntimeError)
    return torch.zeros(n, dtype=torch.float32, device=wire.device).index_copy_(0, places, values[:count] * factor)


def _reference_decode(wire: Tensor, codec: str, factor: float, add: bool, x: Tensor) -> None:
    _check_decode(wire, codec, x)
    values = _values_of(wire, codec, x.shape[0], factor)
    x.copy_(x + values if add else values)


_encode = define_mutating(
    "ring_encode(Tensor x, Tensor(a!)? residual, str codec, Tensor(b!) wire) -> ()",
    reference=_reference_encode,
    fake=_check_encode,
)
_prune_encode = define_mutating(
    "ring_prune_encode(Tensor(a!) x, Tensor(b!)? residual, float density, Tensor(c!) wire) -> ()",
    reference=_reference_prune_encode,
    fake=_check_prune_encode,
)
_decode = define_mutating(
    "ring_decode(Tensor wire, str codec, float factor, bool add, Tensor(a!) x) -> ()",
    reference=_reference_decode,
    fake=lambda wire, codec, factor, add, x: _check_decode(wire, codec, x),
)


@explained_by(_with_address("ring_encode", _check_encode, 3))
def ring_encode(x: Tensor, residual: Tensor | None, codec: str, wire: Tensor) -> None:
    """Encodes `x + residual` into `wire`; the residual becomes what the receiver will not see of it.

    "bf16" rounds half to even. "int8" quantises blocks of 256 as :func:`engine.ops.int8_quantize` does its rows; a
    block that holds a NaN or an infinity is NaN as a whole when decoded. Where what the receiver sees is no finite
    number, the residual stays as it was. The result is the same to the bit on every backend.

    Args:
        x: float32 `[n]`, contiguous.
        residual: like `x`, changed in place; None: nothing is added and nothing kept.
        codec: "bf16" or "int8".
        wire: uint8 `[wire_bytes(codec, n)]` at an address that is a multiple of 8, overwritten.

    Raises:
        TypeError: another dtype.
        ValueError: another codec, shape or layout.
    """
    _encode(x, residual, codec, wire)


@explained_by(_with_address("ring_prune_encode", _check_prune_encode, 3))
def ring_prune_encode(x: Tensor, residual: Tensor | None, density: float, wire: Tensor) -> None:
    """Moves the largest magnitudes of `x + residual` into `wire` and the rest into the residual; `x` becomes 0.

    They are sent as bfloat16 values and two bitmasks: which groups of 8 elements send any, and which of each such
    group. About a fraction `density` is sent: the threshold comes from evenly spread samples of this very call, the
    same from run to run. What finds no room in the wire goes into the residual too, and zeros are never sent. Where any
    value is a NaN or an infinity, all of `x` is NaN when decoded, and the residual of those elements is 0. The result
    is the same to the bit on every backend.

    Args:
        x: float32 `[n]`, contiguous, changed in place.
        residual: like `x`, changed in place; None: what is not sent is lost.
        density: in (0, 1].
        wire: uint8 `[wire_bytes("bitmap", n, density)]` at an address that is a multiple of 8, overwritten; the room
            for values follows from its size.

    Raises:
        TypeError: another dtype.
        ValueError: another density, shape or layout.
    """
    _prune_encode(x, residual, density, wire)


@explained_by(_with_address("ring_decode", _check_decode, 0))
def ring_decode(wire: Tensor, codec: str, x: Tensor, factor: float = 1.0, add: bool = False) -> None:
    """Decodes `wire` into `x`, or adds it to `x`, each value times `factor` (for an average).

    Args:
        wire: uint8, as an encoder made it from as many elements as `x` has, at an address that is a multiple of 8.
        codec: "bf16", "int8" or "bitmap".
        x: float32 `[n]`, contiguous, changed in place.
        factor: multiplies every value ("int8": every scale) before it is used.
        add: adds to `x` in place of overwriting it.

    Raises:
        TypeError: another dtype.
        ValueError: another codec, shape or layout.
        RuntimeError: the bitmap contradicts itself.
    """
    _decode(wire, codec, factor, add, x)

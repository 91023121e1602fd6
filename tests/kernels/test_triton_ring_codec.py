"""The Triton kernels of the codec: interpreted, compiled for GPUs that are not there, and run where one is."""

import pytest
import torch
from triton_tools import compile_launches, compiled, hopper_first, interpreted, meta, needs_gpu, same_bits

pytest.importorskip("triton")
from engine.kernels import ring_codec as module
from engine.ops._library import REFERENCES
from engine.ops.ring_codec import wire_bytes

CODECS = ("bf16", "int8", "bitmap")
SIZES = (0, 1, 63, 64, 257, 2048, 5000)
DENSITY = 0.05


def on(device, *tensors):
    return [t.to(device) if isinstance(t, torch.Tensor) else t for t in tensors]


def run(function, codec, x, residual, wire):
    if codec == "bitmap":
        function(x, residual, DENSITY, wire)
    else:
        function(x, residual, codec, wire)


def check(x, residual, codec, offset=0, device="cpu"):
    """Encodes and decodes, the wire at `offset` of a buffer, beside the reference."""
    op = "ring_prune_encode" if codec == "bitmap" else "ring_encode"
    size = wire_bytes(codec, x.numel(), DENSITY)
    want = [x.clone(), None if residual is None else residual.clone(), torch.full((size,), 0xCC, dtype=torch.uint8)]
    buffer = torch.full((size + 16,), 0xCC, dtype=torch.uint8, device=device)
    got = [*on(device, x.clone(), None if residual is None else residual.clone()), buffer[offset : offset + size]]
    run(REFERENCES[op], codec, *want)
    run(getattr(module, op), codec, *got)
    for have, expected in zip(got, want, strict=True):
        if expected is not None:
            same_bits(have.cpu(), expected)
    assert (buffer[offset + size :] == 0xCC).all() and (buffer[:offset] == 0xCC).all()
    for factor, add in ((1.0, False), (1 / 3, True)):
        to, expected = x.to(device).clone(), x.clone()
        module.ring_decode(got[2], codec, factor, add, to)
        REFERENCES["ring_decode"](want[2], codec, factor, add, expected)
        same_bits(to.cpu(), expected)


@interpreted
@pytest.mark.parametrize("codec", CODECS)
def test_interpreted_is_reference_to_the_bit(codec):
    for i, n in enumerate(SIZES):
        check(torch.randn(n), torch.randn(n) / 3 if i % 2 else None, codec, offset=(0, 8, 3, 2)[i % 4])
    check(torch.randn(5000), torch.randn(5000), codec)


@interpreted
@pytest.mark.parametrize("codec", CODECS)
def test_special_values(codec):
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, 3e38, -3.4e38, 1e-38, 0.5])
    for values in (special, special[3:], special[1:2], special[3:5]):
        x = torch.cat([values.repeat(70), torch.randn(2000)])
        check(x, torch.randn_like(x), codec)
    column = torch.arange(6000).remainder(16)
    check(torch.randn(6000) * column.ne(0), torch.randn(6000) * column.gt(1), codec)
    check(torch.zeros(300), torch.zeros(300), codec)
    check(torch.ones(3000), torch.zeros(3000), codec)  # more of one size than there is room for


@interpreted
def test_a_bitmap_that_contradicts_itself_is_refused_and_touches_nothing():
    n = 1000
    wire = torch.empty(wire_bytes("bitmap", n, DENSITY), dtype=torch.uint8)
    module.ring_prune_encode(torch.randn(n), None, DENSITY, wire)
    groups = module.bitmap_bytes(n) + 2 * module.bitmap_capacity(n, wire.numel())  # where their bytes begin
    for at, bits in ((0, 1), (3, 0x80), (4, 2), (8 + 6, 1), (8 + 15, 0x20), (8 + 15, 0x80), (groups, 0xFF)):
        damaged, x = wire.clone(), torch.ones(n)
        damaged[at] ^= bits
        with pytest.raises(RuntimeError, match="ring_decode: wire: expected"):
            module.ring_decode(damaged, "bitmap", 1.0, True, x)
        assert x.eq(1).all()


@interpreted
def test_refuses():
    x, wire = torch.zeros(100), torch.zeros(200, dtype=torch.uint8)
    for args in (
        (x.double(), None, "bf16", wire),
        (x, x[:3], "bf16", wire),
        (x, None, "bf16", wire[:-1]),
        (x, None, "int8", wire),
        (x, None, "bitmap", wire),
        (x, None, "bf16", wire.to(torch.int8)),
        (x[::2], None, "bf16", wire[:100]),
    ):
        with pytest.raises(RuntimeError, match="ring_encode: expected"):
            module.ring_encode(*args)
    for density, size in ((0.0, 200), (1.5, 200), (0.1, 3)):
        with pytest.raises(RuntimeError, match="ring_prune_encode: expected"):
            module.ring_prune_encode(x, None, density, wire[:size])


@compiled
@hopper_first
def test_compiles_to_vectors_without_spills(card):
    n = 1 << 20
    x = meta((n,))
    for codec in ("bf16", "int8"):
        wire = meta((wire_bytes(codec, n),), torch.uint8)
        (encoding,) = compile_launches(card, module.ring_encode, x, x, codec, wire)
        (decoding,) = compile_launches(card, module.ring_decode, wire, codec, 0.5, True, x)
        assert encoding.count("LDG.E.128") and decoding.count("STG.E.128")
    compile_launches(card, module.ring_prune_encode, x, x, 0.01, meta((wire_bytes("bitmap", n),), torch.uint8))
    compile_launches(card, decode_bitmap_of, n)


def decode_bitmap_of(n):
    """The launches of decode_bitmap, which itself needs to read what the first ones found."""
    programs, room, how = module.programs(n), 10_000, {"ELEMENTS": module.ELEMENTS, "num_warps": 8}
    mask, groups = meta((n // 64,), torch.uint8), meta((room,), torch.uint8)
    counts, through = meta((3, *programs), torch.int32), meta(programs, torch.int64)
    module.count_groups_kernel[programs](mask, counts, **how)
    module.count_values_kernel[programs](mask, through, groups, counts[1:], n, room, **how)
    sent, x = meta((room,), torch.int16), meta((n,))
    module.decode_bitmap_kernel[programs](
        mask, through, through, groups, sent, x, 0.5, n, room, ADD=True, enable_fp_fusion=False, **how
    )


@needs_gpu
@pytest.mark.parametrize("codec", CODECS)
def test_on_a_gpu_is_reference_to_the_bit(codec):
    for n in (*SIZES, 300_000):
        for offset in (0, 8, 3):
            check(torch.randn(n), torch.randn(n) / 3, codec, offset, "cuda")
            check(torch.randn(n), None, codec, offset, "cuda")

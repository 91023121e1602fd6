"""ring_encode, ring_prune_encode, ring_decode: reference against float64, native against reference, edges, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import engine
from engine._ring_codec import threshold_of
from engine.ops import ring_decode, ring_encode, ring_prune_encode
from engine.ops._library import REFERENCES
from engine.ops.ring_codec import wire_bytes

SIZES = {
    0: "nothing",
    1: "one",
    63: "below a mask word",
    64: "one",
    257: "over a block",
    5000: "odd",
    300000: "threads",
}
CODECS = ("bf16", "int8", "bitmap")
DENSITY = 0.05


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def encode(x, residual, codec, how=engine.ops, density=DENSITY):
    """Returns wire, x and residual after it; `how` is engine.ops or REFERENCES' functions."""
    x, residual = x.clone(), None if residual is None else residual.clone()
    wire = torch.full((wire_bytes(codec, x.numel(), density),), 0xCC, dtype=torch.uint8)
    native = how is engine.ops
    if codec == "bitmap":
        (ring_prune_encode if native else REFERENCES["ring_prune_encode"])(x, residual, density, wire)
    else:
        (ring_encode if native else REFERENCES["ring_encode"])(x, residual, codec, wire)
    return wire, x, residual


def decode(wire, codec, n, **how):
    x = torch.full((n,), torch.nan)
    ring_decode(wire, codec, x, **how)
    return x


def check_all(x, residual, codec):
    for left in (None, residual):
        got, want = encode(x, left, codec), encode(x, left, codec, REFERENCES)
        for g, w in zip(got, want, strict=True):
            if g is not None:
                assert_same(g, w)
        for factor, add in ((1.0, False), (1 / 3, True)):
            to = [x.clone(), x.clone()]
            ring_decode(got[0], codec, to[0], factor, add)
            REFERENCES["ring_decode"](got[0], codec, factor, add, to[1])
            assert_same(*to)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("n", SIZES)
def test_native_is_reference_to_the_bit(variant, n, codec):
    check_all(torch.randn(n), 0.3 * torch.randn(n), codec)


@given(st.lists(st.floats(width=32), max_size=300), st.sampled_from(CODECS), st.sampled_from([1, 7]))
def test_any_values(values, codec, repeat):
    x = torch.tensor(values, dtype=torch.float32).repeat(repeat)
    for name in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(name):
            check_all(x, torch.zeros_like(x).uniform_(-1, 1), codec)


@pytest.mark.parametrize("codec", CODECS)
def test_what_rounds_up_to_an_infinity(variant, codec):
    x = torch.tensor([torch.finfo(torch.float32).max, 1.0, -torch.finfo(torch.float32).max]).repeat(100)
    check_all(x, torch.zeros_like(x).uniform_(-1, 1), codec)


@pytest.mark.parametrize("density", [1e-17, 1e-19, 1e-300, 5e-324])
def test_the_smallest_densities(variant, density):
    x = torch.randn(5000)
    wires = [torch.empty(wire_bytes("bitmap", 5000, density), dtype=torch.uint8) for _ in range(2)]
    for function, wire in zip((ring_prune_encode, REFERENCES["ring_prune_encode"]), wires, strict=True):
        function(x.clone(), None, density, wire)
    assert_same(*wires)
    assert wires[0][:4].view(torch.int32) == 1


def test_errors_of_the_codecs(variant):
    x = torch.randn(10000, dtype=torch.float64)
    for codec, most in (("bf16", 0.002), ("int8", 0.01)):
        seen = decode(encode(x.float(), None, codec)[0], codec, 10000).double()
        assert (seen - x).norm() / x.norm() < most
    seen = decode(encode(x.float(), None, "bitmap")[0], "bitmap", 10000).double()
    kept = seen != 0
    assert 0.8 * DENSITY < kept.double().mean() < 1.25 * DENSITY + 0.005
    assert x[kept].abs().min() >= x[~kept].abs().max()
    assert ((seen - x)[kept].abs() <= x[kept].abs() * 2**-8).all()


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_is_lost_with_a_residual(variant, codec):
    x, residual = torch.randn(3000), torch.randn(3000) / 10
    wire, left, after = encode(x, residual, codec)
    seen = decode(wire, codec, 3000)
    assert_same(after, (x + residual) - seen)
    assert_same(left, torch.zeros(3000) if codec == "bitmap" else x)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_one_and_poisons_no_residual(variant, codec, bad):
    x, residual = torch.randn(1000), torch.ones(1000)
    x[300], x[999] = bad, bad
    wire, _, after = encode(x, residual, codec)
    seen = decode(wire, codec, 1000)
    assert after.isfinite().all()
    whole = {"bf16": [(300, 301), (999, 1000)], "int8": [(256, 512), (768, 1000)], "bitmap": [(0, 1000)]}[codec]
    expected = torch.zeros(1000, dtype=torch.bool)
    for begin, end in whole:
        expected[begin:end] = True
    assert torch.equal(~seen.isfinite(), expected)
    assert codec == "bf16" or seen[expected].isnan().all()


def test_a_flood_of_what_is_no_number(variant):
    """More than there is room for."""
    wire, _, after = encode(torch.full((1000,), torch.inf), torch.ones(1000), "bitmap")
    assert decode(wire, "bitmap", 1000).isnan().all() and after.eq(0).all()


# What gradients look like: a dead input, one of larger values, inputs of many scales, tokens that don't occur.
STRUCTURES = {
    "plain": lambda x: x,
    "a dead column": lambda x: x.index_fill(1, torch.tensor(0), 0),
    "a large column": lambda x: torch.cat([4 * x[:, :1], x[:, 1:]], 1),
    "large columns": lambda x: x * (1 + 7 * torch.arange(x.shape[1]).remainder(64).eq(0)),
    "columns of many scales": lambda x: x * torch.linspace(-1, 1, x.shape[1]).exp(),
    "few columns": lambda x: x * torch.arange(x.shape[1]).remainder(5).eq(3),
    "few rows": lambda x: x * torch.arange(x.shape[0]).remainder(5).eq(3).unsqueeze(1),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rows, columns", [(1024, 128), (256, 512), (100, 1280), (131, 1001)])
def test_a_structured_gradient_is_sent_at_the_density(rows, columns, structure):
    """128 columns are the distance between samples, the next two shapes multiples of it."""
    shares = []
    for _ in range(5):
        x = STRUCTURES[structure](torch.randn(rows, columns)).flatten()
        shares.append(encode(x, None, "bitmap")[0][:4].view(torch.int32).item() / x.numel() / DENSITY)
    assert 0.7 < sum(shares) / 5 < 1.2 and min(shares) > 0.4, shares


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_element_of_a_structured_gradient_is_sent_in_time(structure):
    residual, sent = torch.zeros(1024 * 128), torch.zeros(1024 * 128, dtype=torch.bool)
    for _ in range(120):
        x = STRUCTURES[structure](torch.randn(1024, 128).abs()).flatten()
        wire, _, residual = encode(x, residual, "bitmap")
        sent |= decode(wire, "bitmap", x.numel()).ne(0)
    assert sent[x.ne(0)].all()
    first, second = (half.norm().item() for half in residual.chunk(2))
    assert first == pytest.approx(second, rel=0.1)


def test_a_threshold_among_more_elements_than_32_bits_count():
    x = torch.ones(1).expand(1 << 33)
    assert threshold_of(x, None, 1e-3) == torch.tensor(0x3F7FFFFF, dtype=torch.int32).view(torch.float32)


def test_equal_values_are_sent_in_turns(variant):
    """None is above the threshold alone: as many as there is room for go, and the residual sees to the others."""
    x, residual, total = torch.ones(1000), torch.zeros(1000), torch.zeros(1000)
    for _ in range(40):
        wire, _, residual = encode(x, residual, "bitmap")
        total += decode(wire, "bitmap", 1000)
    assert total.gt(0).all()
    assert_same(total + residual, torch.full((1000,), 40.0))
    wire, _, _ = encode(torch.zeros(1000), None, "bitmap")
    assert decode(wire, "bitmap", 1000).eq(0).all()


def test_rounding_up_to_infinity_does_not_poison_a_residual(variant):
    for codec in ("bf16", "bitmap"):
        assert encode(torch.full((8,), 3.4e38), torch.zeros(8), codec)[2].isfinite().all()


def test_threads_give_the_same_bits():
    x = torch.randn(400000)
    for codec in CODECS:
        wires = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            wires.append(encode(x, torch.ones(400000), codec))
        torch.set_num_threads(2)
        for a, b in zip(*wires, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("damage", ["count", "group", "bit", "empty", "flags", "beyond"])
def test_a_bitmap_that_contradicts_itself_is_an_error(variant, damage):
    x = torch.randn(104)
    x[101] = 50.0
    wire, _, _ = encode(x if damage == "beyond" else x[:100], None, "bitmap")
    if damage == "count":
        wire[0] += 1
    if damage == "group":
        wire[8] ^= 1
    if damage == "bit":
        first = len(wire) - 13
        wire[first] ^= 1 << 3
    if damage == "empty":
        wire[0] -= int(wire[-13]).bit_count()
        wire[-13] = 0
    if damage == "flags":
        wire[4] = 2
    with pytest.raises(RuntimeError, match="contradict"):
        decode(wire, "bitmap", 100)
    with pytest.raises(RuntimeError, match="agree"):
        REFERENCES["ring_decode"](wire, "bitmap", 1.0, False, torch.zeros(100))


def test_opcheck():
    ops, x, residual = torch.ops.engine, torch.randn(300), torch.randn(300)
    for codec in ("bf16", "int8"):
        wire = torch.zeros(wire_bytes(codec, 300), dtype=torch.uint8)
        torch.library.opcheck(ops.ring_encode.default, (x, residual, codec, wire))
        torch.library.opcheck(ops.ring_encode.default, (x, None, codec, wire))
        torch.library.opcheck(ops.ring_decode.default, (wire, codec, 0.5, True, x))
    wire = torch.zeros(wire_bytes("bitmap", 300, 0.1), dtype=torch.uint8)
    torch.library.opcheck(ops.ring_prune_encode.default, (x, residual, 0.1, wire))


def test_compiles():
    def through(x, wire):
        ring_encode(x, None, "int8", wire)
        ring_decode(wire, "int8", x)
        return x

    x = torch.randn(300)
    want = decode(encode(x, None, "int8")[0], "int8", 300)
    wire = torch.zeros(wire_bytes("int8", 300), dtype=torch.uint8)
    assert_same(torch.compile(through, fullgraph=True, backend="aot_eager")(x, wire), want)


def test_errors():
    x, wire = torch.randn(300), torch.zeros(308, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"ring_encode: x: expected a float32 tensor, got torch.float64"):
        ring_encode(x.double(), None, "int8", wire)
    with pytest.raises(ValueError, match=r"ring_encode: codec: expected one of bf16, int8, got 'int4'"):
        ring_encode(x, None, "int4", wire)
    with pytest.raises(ValueError, match=r"ring_encode: wire: expected 600 bytes, got 308"):
        ring_encode(x, None, "bf16", wire)
    with pytest.raises(ValueError, match=r"ring_encode: residual: expected shape \[300\], got \[299\]"):
        ring_encode(x, x[:299], "int8", wire)
    with pytest.raises(ValueError, match=r"ring_prune_encode: density: expected a number in \(0, 1\]"):
        ring_prune_encode(x, None, 0.0, wire)
    with pytest.raises(ValueError, match=r"ring_decode: x: expected a contiguous tensor"):
        ring_decode(wire, "int8", torch.randn(600)[::2])
    odd = torch.zeros(309, dtype=torch.uint8)[1:]
    with pytest.raises(ValueError, match=r"ring_encode: wire: expected an address that is a multiple of 8"):
        ring_encode(x, None, "int8", odd)
    with pytest.raises(ValueError, match=r"ring_prune_encode: wire: expected an address that is a multiple of 8"):
        ring_prune_encode(x, None, 0.01, odd[: wire_bytes("bitmap", 300, 0.01)])
    with pytest.raises(ValueError, match=r"ring_decode: wire: expected an address that is a multiple of 8"):
        ring_decode(odd, "int8", x)
    with pytest.raises(ValueError, match=r"ring_codec: codec: expected one of bf16, int8, bitmap, got 'zip'"):
        wire_bytes("zip", 3)

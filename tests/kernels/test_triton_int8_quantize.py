"""The Triton kernel of int8_quantize: interpreted, compiled for GPUs that are not there, and run where one is."""

import pytest
import torch
from shapes import MATRICES
from triton_tools import compile_launches, compiled, hopper_first, interpreted, meta, needs_gpu, same_bits, slow_but

pytest.importorskip("triton")
from engine.kernels import int8_quantize as module
from engine.ops._check import FLOAT_DTYPES
from engine.ops._int8_linear import quantize_by
from engine.ops._library import REFERENCES

reference = REFERENCES["int8_quantize"]
WIDE = (3, module.WIDEST_BLOCK + 33)  # does not fit a block's registers


def special(dtype):
    """Rows that are zero, tiny, not finite, or end halfway between two integers."""
    x = torch.randn(9, 70).to(dtype)
    x[0], x[1, 5], x[2, 69], x[3] = 0, torch.nan, -torch.inf, 2.0**-101 if dtype != torch.float16 else 0
    x[4, 0], x[4, 1:] = 127, torch.arange(69) - 34.5
    x[5] = -0.0
    x[6] = torch.finfo(dtype).max
    return x


def check(x, run):
    for got, want in zip(run(x), reference(x), strict=True):
        same_bits(got.cpu(), want)


@interpreted
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_interpreted_is_reference_to_the_bit(dtype):
    which = FLOAT_DTYPES.index(dtype)
    for shape in [*MATRICES, WIDE][which::3]:  # each with one of the dtypes: the interpreter is slow
        check(torch.randn(shape).to(dtype), module.int8_quantize)
    check(special(dtype), module.int8_quantize)
    check(torch.randn(3, 4, 10).to(dtype).transpose(0, 2), module.int8_quantize)
    check(torch.randn(5).to(dtype), module.int8_quantize)


@interpreted
def test_a_given_scale_and_aligned_rows():
    for shape in ((5, 31), WIDE):
        x = torch.randn(shape)
        x[1, 3], x[2, 30] = torch.inf, torch.nan
        for s in (0.01,) if shape == WIDE else (0.01, 0.0, -1.0, torch.nan, torch.inf, 1e-39, 3e38):
            counters = torch.full((1500,), 7, dtype=torch.int32)
            q, scale = module.quantize_rows(x, 3, torch.tensor([s]), align=16, counters=counters)
            want, want_scale = quantize_by(x, torch.tensor([s]))
            same_bits(q, want.to(torch.int8))
            same_bits(scale, want_scale)
            assert q.stride(0) % 16 == 0 and not counters.any()


@interpreted
def test_a_scale_for_each_channel():
    for shape in ((5, 31), (3, 0), WIDE):
        x, channels = torch.randn(shape), torch.rand(shape[1] * 2)[::2] / 20 + 1e-3
        x[1, 3:4], x[2, 30:31] = torch.inf, torch.nan
        worst = (0.0,) if shape == WIDE else (1e-30, 3e38, 0.0, -1.0, torch.nan, torch.inf, 1e-39)
        for s in (0.01, *worst):
            channels[-1:] = s
            q, scale = module.quantize_rows(x, 3, channels, align=16)
            want, want_scale = quantize_by(x, channels)
            same_bits(q, want.to(torch.int8))
            same_bits(scale, want_scale)


@interpreted
def test_refuses():
    with pytest.raises(RuntimeError, match="expected floats"):
        module.int8_quantize(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="expected floats"):
        module.int8_quantize(torch.tensor(1.0))


@compiled
def test_config():
    assert module.quantize_config(8192, 8192, 132) == module.QuantizeConfig(rows=1, block=8192, warps=8)
    assert module.quantize_config(8192, 384, 132) == module.QuantizeConfig(rows=8, block=512, warps=4)
    assert module.quantize_config(1, 384, 132) == module.QuantizeConfig(rows=1, block=512, warps=1)
    assert module.quantize_config(9, 10**6, 132) == module.QuantizeConfig(rows=1, block=module.WIDEST_BLOCK, warps=16)
    assert module.quantize_config(0, 0, 132) == module.QuantizeConfig(rows=1, block=32, warps=1)


@compiled
@hopper_first
@pytest.mark.parametrize(
    "case",
    slow_but(
        (torch.bfloat16, (8192, 8192)),
        [(torch.bfloat16, (8192, 8192)), (torch.float32, (64, 11008)), (torch.bfloat16, (8, 40000))],
    ),
    ids=str,
)
def test_compiles_to_vectors_without_spills(card, case):
    dtype, shape = case
    (binary,) = compile_launches(card, module.int8_quantize, meta(shape, dtype))
    assert binary.count("LDG.E.128") and binary.count("STG.E.128")
    assert "div.rn.f32" in binary.ptx and "div.full" not in binary.ptx and "fma.rn.f32" not in binary.ptx


@compiled
@hopper_first
@pytest.mark.parametrize("k", slow_but(16384, [384, 16384, 40000]))
def test_a_scale_for_each_channel_compiles_without_spills(card, k):
    x, channels = meta((8192, k), torch.bfloat16), meta((k,))
    (binary,) = compile_launches(card, module.quantize_rows, x, card.multiprocessors, channels, 16)
    assert binary.count("LDG.E.128") and binary.count("STG.E.128" if k > 384 else "STG")
    assert "div.rn.f32" in binary.ptx and "div.full" not in binary.ptx and "fma.rn.f32" not in binary.ptx


@needs_gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_on_a_gpu_is_reference_to_the_bit(dtype):
    for shape in (*MATRICES, WIDE):
        check(torch.randn(shape).to(dtype), lambda x: module.int8_quantize(x.cuda()))
    check(special(dtype), lambda x: module.int8_quantize(x.cuda()))
    for m, k in (*MATRICES, WIDE):
        x, channels = torch.randn(m, k).to(dtype), torch.rand(k) / 20 + 1e-3
        q, scale = module.quantize_rows(x.cuda(), 132, channels.cuda())
        want, want_scale = quantize_by(x, channels)
        same_bits(q.cpu(), want.to(torch.int8))
        same_bits(scale.cpu(), want_scale)

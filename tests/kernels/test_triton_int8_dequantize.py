"""The Triton kernel of int8_dequantize: interpreted, compiled for GPUs that are not there, and run where one is."""

import pytest
import torch
from shapes import MATRICES
from triton_tools import compile_launches, compiled, hopper_first, interpreted, meta, needs_gpu, same_bits, slow_but

pytest.importorskip("triton")
from engine.kernels import int8_dequantize as module
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES

reference = REFERENCES["int8_dequantize"]


def check(shape, dtype, device):
    q, scale = torch.randint(-128, 128, shape, dtype=torch.int8), torch.randn(shape[:-1]).exp()
    if scale.numel() > 1:
        scale.view(-1)[0], scale.view(-1)[1] = torch.nan, 1e-42
    same_bits(module.int8_dequantize(q.to(device), scale.to(device), dtype).cpu(), reference(q, scale, dtype))


@interpreted
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_interpreted_is_reference_to_the_bit(dtype):
    which = FLOAT_DTYPES.index(dtype)
    for shape in [*MATRICES, (2, 3, 4), (5,), (2, module.BLOCK + 5)][which::3]:
        check(shape, dtype, "cpu")


@interpreted
def test_strides():
    q, scale = torch.randint(-128, 128, (40, 6), dtype=torch.int8).t(), torch.randn(12)[::2]
    same_bits(module.int8_dequantize(q, scale, torch.float16), reference(q, scale, torch.float16))


@interpreted
def test_refuses():
    q, scale = torch.zeros(2, 3, dtype=torch.int8), torch.ones(2)
    for args in ((q.float(), scale), (q, scale.double()), (q, scale[:1]), (q[0, 0], scale[0])):
        with pytest.raises(RuntimeError, match="int8_dequantize: expected"):
            module.int8_dequantize(*args, torch.float32)
    with pytest.raises(RuntimeError, match="float dtype"):
        module.int8_dequantize(q, scale, torch.float64)


@compiled
@hopper_first
@pytest.mark.parametrize("dtype", slow_but(torch.bfloat16, FLOAT_DTYPES))
@pytest.mark.parametrize("k", slow_but(8192, [384, 8192]))
def test_compiles_to_vectors_without_spills(card, dtype, k):
    (binary,) = compile_launches(card, module.int8_dequantize, meta((512, k), torch.int8), meta((512,)), dtype)
    assert binary.count("STG.E.128") and binary.usage["REG"] <= 64


@needs_gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_on_a_gpu_is_reference_to_the_bit(dtype):
    for shape in (*MATRICES, (2, 3, 4)):
        check(shape, dtype, "cuda")

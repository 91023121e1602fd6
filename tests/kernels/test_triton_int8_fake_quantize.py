"""The Triton kernel of int8_fake_quantize: interpreted, compiled for GPUs that are not there, and run where one is."""

import pytest
import torch
from shapes import MATRICES
from triton_tools import compile_launches, compiled, hopper_first, interpreted, meta, needs_gpu, same_bits

pytest.importorskip("triton")
from engine.kernels import int8_fake_quantize as module
from engine.kernels import int8_quantize
from engine.ops._check import FLOAT_DTYPES
from engine.ops.int8_fake_quantize import _reference as reference


def check(x, scale=None, device="cpu"):
    got = module.int8_fake_quantize(x.to(device), None if scale is None else scale.to(device))
    same_bits(got.cpu(), reference(x, scale))


def cases(dtype):
    for shape in MATRICES:
        yield torch.randn(shape).to(dtype)
    bad = torch.randn(5, 40).to(dtype)
    bad[1, 3], bad[2, 0], bad[3] = torch.nan, -torch.inf, 0.0
    yield bad


@interpreted
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_interpreted_is_reference_to_the_bit(dtype):
    for i, x in enumerate(cases(dtype)):
        check(x, (None, torch.tensor(0.02), torch.tensor([0.5]))[i % 3] if x.shape[0] != 5 else None)
    for scale in (0.02, 0.0, torch.inf, 1e-39):
        check(x, torch.tensor(scale))


@interpreted
def test_long_rows_strides_and_leading_dimensions(monkeypatch):
    monkeypatch.setattr(int8_quantize, "WIDEST_BLOCK", 64)
    for scale in (None, torch.tensor(0.03)):
        check(torch.randn(2, 3, 200).transpose(0, 1), scale)
        check(torch.randn(70), scale)


@interpreted
def test_refuses():
    for args in ((torch.zeros(3).double(),), (torch.zeros(()),), (torch.zeros(3), torch.ones(2))):
        with pytest.raises(RuntimeError, match="int8_fake_quantize: expected"):
            module.int8_fake_quantize(*args)


@compiled
@hopper_first
@pytest.mark.parametrize("k", [8192, pytest.param(20000, marks=pytest.mark.slow)])
def test_compiles_to_vectors_without_spills(card, k):
    (binary,) = compile_launches(card, module.int8_fake_quantize, meta((8192, k), torch.bfloat16))
    assert binary.count("LDG.E.128") and binary.count("STG.E.128")


@needs_gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_on_a_gpu_is_reference_to_the_bit(dtype):
    for x in [*cases(dtype), torch.randn(3, 40000).to(dtype)]:
        check(x, None, "cuda")
        check(x, torch.tensor(0.02), "cuda")

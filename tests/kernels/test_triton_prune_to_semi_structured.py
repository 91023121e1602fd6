"""The Triton kernel of prune_to_semi_structured: interpreted, compiled for absent GPUs, and run where one is."""

import itertools

import pytest
import torch
from shapes import MATRICES
from triton_tools import compile_launches, compiled, hopper_first, interpreted, meta, needs_gpu, same_bits, slow_but

pytest.importorskip("triton")
from engine.kernels import prune_to_semi_structured as module
from engine.ops._check import FLOAT_DTYPES
from engine.ops.prune_to_semi_structured import _reference as reference


def check(weight, device="cpu"):
    for got, want in zip(module.prune_to_semi_structured(weight.to(device)), reference(weight), strict=True):
        same_bits(got.cpu(), want)


def every_order(dtype):
    """Groups with every order of four values, equal ones and NaN among them."""
    pool = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, torch.inf, torch.nan], dtype=dtype)
    return torch.stack([torch.stack(group) for group in itertools.product(pool, repeat=4)]).reshape(7, -1)


@interpreted
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_interpreted_is_reference_to_the_bit(dtype):
    few_rows = [shape for shape in MATRICES if shape[0] <= 5]  # a program each, in which the interpreter is slow
    for shape in [*few_rows, (1, 4 * module.GROUPS + 5)][FLOAT_DTYPES.index(dtype) :: 3]:
        check(torch.randint(-2, 3, shape).to(dtype) if shape[1] % 2 else torch.randn(shape).to(dtype))
    check(every_order(dtype))
    check(torch.randn(20, 3).to(dtype).t())


@interpreted
def test_refuses():
    for weight in (torch.zeros(3, 4, dtype=torch.float64), torch.zeros(4)):
        with pytest.raises(RuntimeError, match="expected a matrix of floats"):
            module.prune_to_semi_structured(weight)


@compiled
@hopper_first
@pytest.mark.parametrize("dtype", slow_but(torch.bfloat16, FLOAT_DTYPES))
def test_compiles_to_vectors_without_spills(card, dtype):
    (binary,) = compile_launches(card, module.prune_to_semi_structured, meta((8192, 8192), dtype))
    assert binary.count("LDG.E.128") and binary.count("STG.E.128") and binary.usage["REG"] <= 80


@needs_gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_on_a_gpu_is_reference_to_the_bit(dtype):
    for shape in (*MATRICES, (2, 4 * module.GROUPS + 5)):
        check(torch.randn(shape).to(dtype), "cuda")
    check(every_order(dtype), "cuda")

"""The Triton kernel of int8_embedding: interpreted, compiled for GPUs that are not there, and run where one is."""

import itertools

import pytest
import torch
from triton_tools import compile_launches, compiled, hopper_first, interpreted, meta, needs_gpu, same_bits, slow_but

pytest.importorskip("triton")
from engine.kernels import int8_embedding as module
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES

reference = REFERENCES["int8_embedding"]
SHAPES = [  # indices, rows, dim
    ((0,), 5, 8),
    ((), 1, 1),
    ((3, 4), 5, 0),
    ((2, 3), 7, 31),
    ((5, 1, 2), 30, 384),
    ((1030,), 9, 100),
    ((3,), 4, module.BLOCK + 7),
]


def check(shape, rows, dim, dtype, index_dtype=torch.int64, device="cpu"):
    weight, scale = torch.randint(-128, 128, (rows, dim), dtype=torch.int8), torch.randn(rows)
    indices = torch.randint(0, rows, shape, dtype=index_dtype)
    got = module.int8_embedding(indices.to(device), weight.to(device), scale.to(device), dtype)
    same_bits(got.cpu(), reference(indices, weight, scale, dtype))


def check_outside(device):
    weight, scale = torch.randint(-128, 128, (3, 5), dtype=torch.int8), torch.rand(3)
    indices = torch.tensor([2, -1, 3, 0, 2**40, -(2**62)])
    got = module.int8_embedding(indices.to(device), weight.to(device), scale.to(device), torch.float32).cpu()
    assert got.isnan().all(1).tolist() == [False, True, True, False, True, True]
    same_bits(got[[0, 3]], reference(indices[[0, 3]], weight, scale, torch.float32))


@interpreted
def test_interpreted_is_reference_to_the_bit():
    for shape, dtype in zip(SHAPES, itertools.cycle(FLOAT_DTYPES)):
        check(*shape, dtype)
    check((4, 4), 20, 64, torch.bfloat16, torch.int32)
    indices, weight = torch.tensor([[0, 1], [2, 3]]).t(), torch.randint(-9, 9, (6, 4), dtype=torch.int8).t()
    got = module.int8_embedding(indices, weight, torch.ones(8)[::2], torch.float16)
    same_bits(got, reference(indices, weight, torch.ones(4), torch.float16))


@interpreted
def test_an_index_outside_makes_its_row_nan():
    check_outside("cpu")


@interpreted
def test_refuses():
    indices, weight, scale = torch.zeros(2, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int8), torch.ones(3)
    for args in (
        (indices.float(), weight, scale, torch.float32),
        (indices, weight.float(), scale, torch.float32),
        (indices, weight[0], scale, torch.float32),
        (indices, weight, scale[:2], torch.float32),
        (indices, weight, scale, torch.float64),
        (indices.to("meta"), weight, scale, torch.float32),
    ):
        with pytest.raises(RuntimeError, match="int8_embedding: expected"):
            module.int8_embedding(*args)


@compiled
@hopper_first
@pytest.mark.parametrize("case", slow_but((8192, 384), [(8192, 384), (16, 4096)]), ids=str)
def test_compiles_to_vectors_without_spills(card, case):
    count, dim = case
    args = meta((count,), torch.int64), meta((30522, dim), torch.int8), meta((30522,)), torch.bfloat16
    (binary,) = compile_launches(card, module.int8_embedding, *args)
    assert binary.count("STG.E.128") or binary.count("STG.E.64")
    assert binary.usage["REG"] <= 64


@needs_gpu
def test_on_a_gpu_is_reference_to_the_bit():
    for shape, dtype in itertools.product(SHAPES, FLOAT_DTYPES):
        check(*shape, dtype, device="cuda")
    check_outside("cuda")

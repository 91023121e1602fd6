"""The Triton kernel of semi_structured_to_dense: interpreted, compiled for absent GPUs, and run where one is."""

import pytest
import torch
from shapes import MATRICES
from triton_tools import compiled, hopper_first, interpreted, needs_gpu, same_bits, written_down

pytest.importorskip("triton")
from engine.kernels import semi_structured_to_dense as module
from engine.ops.prune_to_semi_structured import _reference as prune
from engine.ops.semi_structured_to_dense import _reference as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def kept(rows, columns, dtype):
    values, metadata = prune(torch.randint(-128, 128, (rows, columns)).float())
    return values.to(dtype), metadata


def check(rows, columns, dtype, device="cpu"):
    values, metadata = kept(rows, columns, dtype)
    got = module.semi_structured_to_dense(values.to(device), metadata.to(device), columns)
    same_bits(got.cpu(), reference(values, metadata, columns))


@interpreted
def test_interpreted_is_reference_to_the_bit():
    for i, shape in enumerate(MATRICES):
        check(*shape, DTYPES[i % 4])
    for columns in range(1, 10):
        check(3, columns, DTYPES[columns % 4])


@interpreted
def test_refuses_what_does_not_fit_together():
    values, metadata = kept(5, 50, torch.int8)
    for row, byte, wrong in ((2, 1, 0b0100_0000), (3, 0, 0b1110_0001), (1, 6, 0b0100_1011), (4, 6, 0b1000_0100)):
        damaged = metadata.clone()
        damaged[row, byte] = wrong
        with pytest.raises(RuntimeError, match="semi_structured_to_dense: expected consistent metadata"):
            module.semi_structured_to_dense(values, damaged, 50)
    beyond, damaged = values.clone(), metadata.clone()
    damaged[0, 6], beyond[0, 25] = 0b0100_1100, 1  # the second value of the last group at column 51
    with pytest.raises(RuntimeError, match="consistent"):
        module.semi_structured_to_dense(beyond, damaged, 50)
    for args in (
        (values.double(), metadata, 50),
        (values, metadata.to(torch.int8), 50),
        (values, metadata[:, 1:], 50),
        (values, metadata, 40),
        (values, metadata, -1),
    ):
        with pytest.raises(RuntimeError, match="semi_structured_to_dense: expected"):
            module.semi_structured_to_dense(*args)


@compiled
@hopper_first
def test_compiles_to_vectors_without_spills(card):
    with written_down(card) as launches:
        module.semi_structured_to_dense(*kept(8, 8192, torch.bfloat16), 8192)
    binary = launches[0].compile(card.capability)
    binary.check(card)
    assert binary.count("STG.E.128") and binary.count("LDG.E.128") + binary.count("LDG.E.64")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_is_reference_to_the_bit(dtype):
    for shape in MATRICES:
        check(*shape, dtype, "cuda")

"""The Triton kernel of prune_to_block: interpreted, compiled for GPUs that are not there, and run where one is."""

import pytest
import torch
from triton_tools import compiled, hopper_first, interpreted, needs_gpu, same_bits, slow_but, written_down

pytest.importorskip("triton")
from engine.kernels import prune_to_block as module
from engine.ops.prune_to_block import _reference as reference

CASES = [  # rows, columns, block shape
    (0, 8, (16, 16)),
    (3, 0, (16, 16)),
    (1, 1, (16, 16)),
    (130, 1027, (32, 32)),
    (70, 130, (48, 16)),
    (300, 260, (256, 256)),
    (64, 96, (16, 48)),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def check(rows, columns, shape, dtype, fraction=0.5, device="cpu"):
    weight = torch.randint(-128, 128, (rows, columns)).to(dtype)
    keep = torch.rand(-(-rows // shape[0]), -(-columns // shape[1])) < fraction
    got = module.prune_to_block(weight.to(device), keep.to(device), *shape)
    for have, want in zip(got, reference(weight, keep, *shape), strict=True):
        same_bits(have.cpu(), want)


@interpreted
def test_interpreted_is_reference_to_the_bit():
    for i, case in enumerate(CASES):
        check(*case, DTYPES[i % 4])
    for fraction in (0.0, 1.0):
        check(40, 40, (16, 16), torch.bfloat16, fraction)


@interpreted
def test_refuses():
    weight, keep = torch.zeros(32, 32), torch.ones(2, 2, dtype=torch.bool)
    for args in (
        (weight.double(), keep, 16, 16),
        (weight[0], keep, 16, 16),
        (weight, keep, 16, 8),
        (weight, keep, 512, 16),
        (weight, keep[:1], 16, 16),
        (weight, keep.int(), 16, 16),
        (weight, keep.to("meta"), 16, 16),
    ):
        with pytest.raises(RuntimeError, match="prune_to_block: expected"):
            module.prune_to_block(*args)


@compiled
@hopper_first
@pytest.mark.parametrize("shape", slow_but((32, 32), [(32, 32), (128, 128)]), ids=str)
def test_compiles_to_vectors_without_spills(card, shape):
    with written_down(card) as launches:
        keep = torch.ones(256 // shape[0], 256 // shape[1], dtype=torch.bool)
        module.prune_to_block(torch.zeros(256, 256, dtype=torch.bfloat16), keep, *shape)
    binary = launches[0].compile(card.capability)
    binary.check(card)
    assert binary.count("LDG.E.128") and binary.count("STG.E.128")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_is_reference_to_the_bit(dtype):
    for case in CASES:
        check(*case, dtype, device="cuda")

"""The Triton kernels of block_to_dense: interpreted, compiled for GPUs that are not there, and run where one is."""

import pytest
import torch
from triton_tools import compiled, hopper_first, interpreted, needs_gpu, same_bits, written_down

pytest.importorskip("triton")
from engine.kernels import block_to_dense as module
from engine.ops.block_to_dense import _reference as reference
from engine.ops.prune_to_block import _reference as prune_to_block

CASES = [  # rows, columns, block shape
    (0, 8, (16, 16)),
    (3, 0, (16, 16)),
    (1, 1, (16, 16)),
    (130, 300, (32, 32)),
    (70, 130, (48, 16)),
    (300, 260, (256, 256)),
    (64, 96, (16, 48)),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def blocks(rows, columns, shape, dtype, fraction=0.5):
    weight = torch.randint(-128, 128, (rows, columns)).to(dtype)
    return prune_to_block(weight, torch.rand(-(-rows // shape[0]), -(-columns // shape[1])) < fraction, *shape)


def check(rows, columns, shape, dtype, fraction=0.5, device="cpu"):
    kept = blocks(rows, columns, shape, dtype, fraction)
    got = module.block_to_dense(*(t.to(device) for t in kept), rows, columns)
    same_bits(got.cpu(), reference(*kept, rows, columns))


@interpreted
def test_interpreted_is_reference_to_the_bit():
    for i, case in enumerate(CASES):
        check(*case, DTYPES[i % 4])
    for fraction in (0.0, 1.0):
        check(40, 40, (16, 16), torch.bfloat16, fraction)


@interpreted
def test_many_blocks_a_row(monkeypatch):
    monkeypatch.setattr(module, "INDICES", 4)
    check(40, 300, (16, 16), torch.int8, 1.0)


@interpreted
def test_refuses_what_does_not_fit_together():
    crow, col, values = blocks(64, 64, (16, 16), torch.float32, 1.0)
    for where, index, value in (
        (crow, 0, 1),
        (crow, 1, 2**30),
        (crow, 2, 3),
        (crow, 4, 15),
        (col, 3, 4),
        (col, 4, -1),
        (col, 1, 0),
    ):
        damaged = where.clone()
        damaged[index] = value
        with pytest.raises(RuntimeError, match="block_to_dense: expected consistent indices"):
            module.block_to_dense(*((damaged, col) if where is crow else (crow, damaged)), values, 64, 64)
    with pytest.raises(RuntimeError, match="consistent"):
        module.block_to_dense(crow[:1] + 1, col[:0], values[:0], 0, 64)
    for args in (
        (crow.long(), col, values, 64, 64),
        (crow, col, values.double(), 64, 64),
        (crow, col, values[:, :8], 64, 64),
        (crow, col, values, 65, 64),
        (crow, col[:3], values, 64, 64),
    ):
        with pytest.raises(RuntimeError, match="block_to_dense: expected"):
            module.block_to_dense(*args)


@compiled
@hopper_first
def test_compiles_to_vectors_without_spills(card):
    with written_down(card) as launches:
        kept = blocks(256, 512, (32, 32), torch.bfloat16)
        module.block_to_dense(*kept, 256, 512)
    for launch in launches:
        binary = launch.compile(card.capability)
        binary.check(card)
    assert binary.count("LDG.E.128") and binary.count("STG.E.128")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_is_reference_to_the_bit(dtype):
    for case in CASES:
        check(*case, dtype, device="cuda")

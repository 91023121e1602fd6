"""The CUDA kernel of int8_scaled_mm against its reference, to the bit."""

import pytest
import torch
from device import DEVICE, assert_same, on, on_device

from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES

pytestmark = on_device
# M, N, K. Emulated, on four multiprocessors, the last has three tiles of 256 tokens for each block; on a card the
# larger ones have tiles of each size, and several for each.
SHAPES = [(1, 5, 16), (17, 130, 272), (64, 64, 128), (300, 200, 400), (257, 300, 1040), (700, 390, 1040)]
if DEVICE == "cuda":
    SHAPES += [(640, 3392, 1040), (1000, 3000, 528), (5000, 4104, 272)]


def check(m, n, k, dtype=torch.bfloat16, bias=None):
    q, weight = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    token_scale = torch.rand(m)
    token_scale[m // 2] = torch.nan
    args = (q, token_scale, weight, torch.rand(n) / 100, bias, dtype)
    want = REFERENCES["int8_scaled_mm"](*args)
    assert_same([torch.ops.engine.int8_scaled_mm(*on(*args))], [want])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_dtype(shape, dtype):
    check(*shape, dtype, torch.randn(shape[1]).to(dtype) if shape[0] != 64 else None)


def test_refuses():
    q, weight = (torch.zeros(rows, 32, dtype=torch.int8) for rows in (3, 4))
    good = (q, torch.ones(3), weight, torch.ones(4), None, torch.float32)
    for at, bad in (
        (0, q[:, :16]),
        (0, q.float()),
        (1, torch.ones(4)),
        (2, weight.float()),
        (3, torch.ones(4).double()),
    ):
        with pytest.raises(RuntimeError, match=r"int8_scaled_mm: .*: expected"):
            torch.ops.engine.int8_scaled_mm(*on(*good[:at], bad, *good[at + 1 :]))
    with pytest.raises(RuntimeError, match="int8_scaled_mm: K: expected"):
        torch.ops.engine.int8_scaled_mm(*on(q[:, :24].contiguous(), good[1], weight[:, :24].contiguous(), *good[3:]))

"""The CUDA kernels of magnitude_threshold against the reference, which sorts."""

import pytest
import torch
from device import DEVICE, assert_same, on, on_device
from shapes import MATRICES

from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.magnitude_threshold import magnitude_threshold

pytestmark = on_device


def check(weight, sparsity):
    for scope in ("tensor", "row") if weight.dim() == 2 else ("tensor",):
        want = REFERENCES["magnitude_threshold"](weight, sparsity, scope)
        assert_same([magnitude_threshold(weight.to(DEVICE), sparsity, scope)], [want])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_shape(dtype):
    for shape in MATRICES:
        for sparsity in (0.0, 0.5, 0.999):
            check((torch.randn(shape) if shape[0] < 100 else torch.randn(9, 1027)).to(dtype), sparsity)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_equal_and_special_values(dtype):
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 0.5, -0.5, 1e-7, 1e-30, 3e38, -1.0])
    for sparsity in (0.1, 0.5, 0.7, 0.8, 0.95):
        check(special.repeat(3, 7).to(dtype), sparsity)
    check(torch.zeros(3, 50).to(dtype), 0.5)
    check(torch.where(torch.rand(4, 300) < 0.6, 0.0, 1 + torch.arange(300) * 2.0**-20).to(dtype), 0.75)


def test_off_the_alignment_strides_and_no_dimensions():
    weight = torch.randn(6 * 64 + 1)
    assert_same([magnitude_threshold(weight.to(DEVICE)[1:], 0.3)], [REFERENCES["magnitude_threshold"](weight[1:], 0.3)])
    check(torch.randn(70, 9).t(), 0.5)
    check(torch.tensor(-2.0), 0.6)


def test_lists_of_several_dtypes():
    weights = [torch.randn(40, 70), torch.randn(300).half(), torch.randn(3, 4, 5).bfloat16(), torch.randn(0)]
    for some in (weights, weights[1:], weights[3:]):
        want = REFERENCES["magnitude_threshold_of_list"](some, 0.7)
        assert_same([magnitude_threshold(on(*some), 0.7)], [want])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_pass_over_millions(dtype):
    n = 1 << 22
    weight = torch.randn(n + 5).to(dtype)
    sampled = torch.full((n,), 5.0).to(dtype)
    place = torch.arange(8192)
    looked_at = 64 * place + ((place * 0x9E3779B9 & 0xFFFFFFFF) * 64 >> 32)  # as bracket.cuh's sample_kernel
    sampled.view(-1, 8)[looked_at] = 1  # says nothing about the rest
    special = torch.where(torch.rand(n) < 0.4, torch.nan, torch.rand(n).sub(0.5)).to(dtype)
    for some, sparsities in (
        (weight, (1e-6, 0.5, 0.999999)),
        (weight.abs().sort().values, (0.9,)),
        (sampled, (0.01, 0.5)),
        (special, (0.3, 0.7)),
        (torch.zeros(n, dtype=dtype), (0.5,)),
    ):
        for sparsity in sparsities:
            key = some.abs().float().sort().values[round(sparsity * some.numel()) - 1]
            assert_same([magnitude_threshold(some.to(DEVICE), sparsity)], [key])
    parts = on(weight[: n // 2].clone(), weight[n // 2 : n // 2 + 3].clone(), weight[n // 2 + 3 :].clone())
    assert_same([magnitude_threshold(parts, 0.7)], [weight.abs().float().sort().values[round(0.7 * (n + 5)) - 1]])

"""The Triton kernel of threshold_prune: interpreted, compiled for GPUs that are not there, and run where one is."""

import pytest
import torch
from shapes import MATRICES
from triton_tools import compile_launches, compiled, hopper_first, interpreted, meta, needs_gpu, same_bits, slow_but

pytest.importorskip("triton")
from engine.kernels import threshold_prune as module

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
THRESHOLDS = {
    "scalar": lambda rows, k: torch.tensor(0.7),
    "one": lambda rows, k: torch.tensor([[0.7]]),
    "rows": lambda rows, k: torch.rand(rows, 1),
    "columns": lambda rows, k: torch.rand(k),
    "elements": lambda rows, k: torch.rand(k, rows).t(),
    "nan": lambda rows, k: torch.full((rows, 1), torch.nan),
}


def truth(weight, threshold):
    return torch.where(weight.float().abs() <= threshold, torch.zeros_like(weight), weight)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreted_is_truth_to_the_bit(dtype):
    for i, shape in enumerate(MATRICES):
        for make in list(THRESHOLDS.values())[i % 3 :: 3]:  # some of them: the interpreter is slow
            weight, threshold = torch.randn(shape).to(dtype), make(*shape)
            same_bits(module.threshold_prune(weight, threshold), truth(weight, threshold))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    special = [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 0.5, -0.5, 1e-7]
    weight = torch.tensor(special).to(dtype)
    for threshold in (-1.0, 0.0, 0.5, torch.inf, torch.nan):
        limit = torch.tensor(threshold)
        same_bits(module.threshold_prune(weight, limit), truth(weight, limit))


@interpreted
def test_any_rank_and_strides():
    weight = torch.randn(6, 5, 4).transpose(0, 2)
    for shape in ((), (1,), (6,), (5, 1), (4, 1, 6), (4, 1, 1), (4, 5, 6)):
        threshold = torch.rand(shape)
        same_bits(module.threshold_prune(weight, threshold), truth(weight, threshold))
    same_bits(module.threshold_prune(torch.tensor(0.5), torch.tensor(0.6)), torch.tensor(0.0))
    same_bits(module.threshold_prune(torch.randn(9000)[::2], torch.tensor(9.0)), torch.zeros(4500))


@interpreted
def test_refuses():
    with pytest.raises(RuntimeError, match="float weight"):
        module.threshold_prune(torch.zeros(3, dtype=torch.float64), torch.tensor(0.1))
    with pytest.raises(RuntimeError, match="float32 threshold"):
        module.threshold_prune(torch.zeros(3), torch.tensor(0.1, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        module.threshold_prune(torch.zeros(3), torch.rand(2))


@compiled
@hopper_first
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("dtype", slow_but(torch.bfloat16, DTYPES))
def test_compiles_to_vectors_without_spills(card, by_row, dtype):
    threshold = meta((64, 1)) if by_row else meta((64, 8192))
    (binary,) = compile_launches(card, module.threshold_prune, meta((64, 8192), dtype), threshold)
    assert "ld.global.v4.b32" in binary.ptx and "st.global.v4.b32" in binary.ptx
    assert binary.usage["REG"] <= 64


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_is_truth_to_the_bit(dtype):
    for shape in MATRICES:
        for make in THRESHOLDS.values():
            weight, threshold = torch.randn(shape).to(dtype), make(*shape)
            got = module.threshold_prune(weight.cuda(), threshold.cuda())
            same_bits(got.cpu(), truth(weight, threshold))

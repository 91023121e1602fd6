"""The Triton kernel of threshold_prune: interpreted, compiled for GPUs that are not there, and run where one is."""

import importlib

import pytest
import torch
from shapes import MATRICES
from triton_tools import compile_for, compiled, interpreted, resource_usage, run_interpreted

pytest.importorskip("triton")
from engine.kernels import threshold_prune as module

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
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


def same_bits(got, want):
    as_int = torch.int32 if want.dtype == torch.float32 else torch.int16
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.contiguous().view(as_int), want.contiguous().view(as_int))


@compiled
def test_in_interpreter_mode():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreted_is_truth_to_the_bit(dtype):
    for shape in MATRICES:
        for make in THRESHOLDS.values():
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
def test_registers_once():
    importlib.import_module("engine.ops.threshold_prune")  # defines the op
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("engine::threshold_prune", "CUDA")
    module.register()
    module.register()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("engine::threshold_prune", "CUDA")


@interpreted
def test_refuses():
    with pytest.raises(RuntimeError, match="float weight"):
        module.threshold_prune(torch.zeros(3, dtype=torch.float64), torch.tensor(0.1))
    with pytest.raises(RuntimeError, match="float32 threshold"):
        module.threshold_prune(torch.zeros(3), torch.tensor(0.1, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        module.threshold_prune(torch.zeros(3), torch.rand(2))


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiles_to_vectors_without_spills(capability, by_row, dtype, tmp_path):
    pointer = "*" + TRITON_NAMES[dtype]
    signature = {
        "weight": pointer,
        "threshold": "*fp32",
        "pruned": pointer,
        "columns": "i64",
        "blocks_per_row": "i64",
        "row_stride": "i64",
    }
    constants = {"column_stride": 0 if by_row else 1, "BY_ROW": by_row, "BLOCK": module.BLOCK}
    divisible = ("weight", "threshold", "pruned", "columns", "row_stride")
    asm = compile_for(capability, module.threshold_prune_kernel, signature, constants, divisible, num_warps=8)
    assert "ld.global.v4.b32" in asm["ptx"] and "st.global.v4.b32" in asm["ptx"]
    usage = resource_usage(asm["cubin"], tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0 and usage["REG"] <= 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_is_truth_to_the_bit(dtype):
    for shape in MATRICES:
        for make in THRESHOLDS.values():
            weight, threshold = torch.randn(shape).to(dtype), make(*shape)
            got = module.threshold_prune(weight.cuda(), threshold.cuda())
            same_bits(got.cpu(), truth(weight, threshold))

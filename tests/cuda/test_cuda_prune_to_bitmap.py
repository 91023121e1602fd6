"""The CUDA kernels of prune_to_bitmap: on a GPU where one is, and everywhere over emulated CUDA on CPU tensors."""

import os
import shutil

import pytest
import torch
from build_tools import CXX, LINK, ROOT, cached, headers_text, run, run_pytest
from shapes import MATRICES

from engine.ops._bitmap import pack_mask

ops = pytest.importorskip("engine.ops.prune_to_bitmap", exc_type=ImportError)

SOURCE = ROOT / "csrc/cuda/prune_to_bitmap.cu"
EMULATED = "ENGINE_EMULATED_CUDA" in os.environ
DEVICE = "cpu" if EMULATED else "cuda"
on_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(not EMULATED and not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BIG = {
    (2, 4104): "two steps of a block",
    (3, 5001): "three, not aligned",
    (9000, 1): "more rows than a step of the scan",
}


@pytest.mark.skipif(EMULATED, reason="this is the process that runs over emulated CUDA")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_over_emulated_cuda():
    """The file compiled by g++: tests/cuda/emulated/cuda/launch.h says what that shows and what not."""
    command = [*CXX, "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared"]
    command += ["-I", ROOT / "tests/cuda/emulated", "-I", ROOT / "csrc", "-x", "c++", SOURCE, ROOT / "csrc/cpu/isa.cpp"]
    depends_on = [*command, SOURCE.read_text(), headers_text("csrc", "tests/cuda")]
    library = cached("emulated_cuda.so", depends_on, lambda path: run([*command, "-o", path, "-x", "none", *LINK]))
    out = run_pytest([__file__, "-rN"], ENGINE_CPU_LIBRARY=str(library), ENGINE_EMULATED_CUDA="1")
    assert "passed" in out and "failed" not in out, out


def assert_packs(weight, threshold):
    keep = ~(weight.float().abs() <= threshold)
    as_int = torch.int32 if weight.dtype == torch.float32 else torch.int16
    bitmask, row_offsets, values = ops.prune_to_bitmap(weight.to(DEVICE), threshold.to(DEVICE))
    assert torch.equal(bitmask.cpu(), pack_mask(keep))
    assert torch.equal(row_offsets.cpu(), torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0)))
    assert values.dtype == weight.dtype and torch.equal(values.cpu().view(as_int), weight[keep].view(as_int))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
class TestOnDevice:
    pytestmark = on_device

    def test_every_shape_and_kind_of_threshold(self, dtype):
        for rows, columns in MATRICES:
            weight = torch.randn(rows, columns).to(dtype)
            for threshold in (
                torch.tensor(0.7),
                torch.tensor([torch.nan]),
                torch.rand(rows, 1),
                torch.rand(columns),
                torch.rand(columns, rows).t(),
            ):
                assert_packs(weight, threshold)

    def test_many_steps(self, dtype):
        for shape in BIG:
            assert_packs(torch.randn(shape).to(dtype), torch.tensor(0.7))

    def test_special_values(self, dtype):
        special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 0.5, -0.5, 1e-7])
        for threshold in (-1.0, 0.0, 0.5, torch.inf, torch.nan):
            assert_packs(special.repeat(3, 7).to(dtype), torch.tensor(threshold))

    def test_rows_off_the_alignment_and_strides(self, dtype):
        storage = torch.randn(8 * 64 + 1).to(dtype).to(DEVICE)
        shifted = storage[1:].view(8, 64)  # contiguous, but not on 16 bytes
        assert shifted.is_contiguous()
        keep = ~(shifted.float().abs() <= 0.5)
        got = ops.prune_to_bitmap(shifted, 0.5)
        assert torch.equal(got[0], pack_mask(keep)) and torch.equal(got[2], shifted[keep])
        assert_packs(torch.randn(65, 9).to(dtype).t(), torch.tensor(0.5))

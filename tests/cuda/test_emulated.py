"""Every test of the CUDA kernels in this folder, over emulated CUDA, in a process where they stand in for the CPU's."""

import shutil
from pathlib import Path

import pytest
from build_tools import run_pytest
from device import EMULATED, emulated_library


@pytest.mark.skipif(EMULATED, reason="this is the process that runs over emulated CUDA")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_over_emulated_cuda():
    files = sorted(Path(__file__).parent.glob("test_cuda_*.py"))
    out = run_pytest([*files, "-rN"], ENGINE_CPU_LIBRARY=str(emulated_library()), ENGINE_EMULATED_CUDA="1")
    assert "passed" in out and "failed" not in out and "skipped" not in out, out

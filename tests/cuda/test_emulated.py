"""Every test of the CUDA kernels in this folder, over emulated CUDA, in a process where they stand in for the CPU's."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from build_tools import run_pytest
from device import EMULATED, emulated_library


@pytest.mark.skipif(EMULATED, reason="this is the process that runs over emulated CUDA")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_over_emulated_cuda():
    files = sorted(Path(__file__).parent.glob("test_cuda_*.py"))
    library = str(emulated_library())

    def run_some(some):
        return run_pytest([*some, "-rN"], ENGINE_CPU_LIBRARY=library, ENGINE_EMULATED_CUDA="1")

    with ThreadPoolExecutor() as pool:
        for out in pool.map(run_some, (files[::2], files[1::2])):
            assert "passed" in out and "failed" not in out and "skipped" not in out, out

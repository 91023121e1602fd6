"""Builds the native libraries; everything else about the package stands in pyproject.toml.

Three libraries, each only where its compiler is: `_cpu` (ops for the CPU, libtorch's stable ABI, no Python ABI),
`_cuda` (the same for CUDA, where nvcc is found) and `_native` (pybind11: what is no tensor op).
"""

import os
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent.resolve()
CPU_OPS = [
    "bitmap_int8_linear",
    "bitmap_linear",
    "bitmap_linear_backward",
    "bitmap_to_dense",
    "block_int8_linear",
    "block_linear",
    "block_to_dense",
    "csr_linear",
    "int8_dequantize",
    "int8_embedding",
    "int8_fake_quantize",
    "int8_linear",
    "int8_quantize",
    "int8_weight_linear",
    "magnitude_threshold",
    "prune_quantize_to_bitmap",
    "prune_to_bitmap",
    "prune_to_block",
    "prune_to_csr",
    "ring_codec",
    "prune_to_semi_structured",
    "semi_structured_int8_linear",
    "semi_structured_linear",
    "semi_structured_to_dense",
    "threshold_prune",
    "transpose",
]
CPU_SOURCES = ["csrc/cpu/isa.cpp", *(f"csrc/cpu/{op}.cpp" for op in CPU_OPS)]
MODULE_SOURCES = ["csrc/module/native.cpp", "csrc/module/limits.cpp", "csrc/module/ring.cpp", "csrc/cpu/isa.cpp"]
MODULE_SOURCES += [f"csrc/ring/{part}.cpp" for part in ("collectives", "reduce", "shared_memory")]
CUDA_OPS = [
    "bitmap_int8_linear",
    "bitmap_linear",
    "bitmap_to_dense",
    "block_to_dense",
    "int8_scaled_mm",
    "magnitude_threshold",
    "prune_quantize_to_bitmap",
    "prune_to_bitmap",
    "prune_to_block",
    "prune_to_csr",
    "prune_to_semi_structured",
    "semi_structured_int8_linear",
    "semi_structured_linear",
    "semi_structured_to_dense",
]
CUDA_SOURCES = [f"csrc/cuda/{op}.cu" for op in CUDA_OPS]
COMMON = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# Contraction into fused multiply-add would round differently from the reference: only kernels that ask for it get it.
CXX = [*COMMON, "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
CXX += ["-fno-wrapv"]  # what Python was built with: signed counters that may wrap cost some loops a tenth
CXX += ["-falign-loops=32"]  # a short loop that lies across two fetch blocks runs at 0.6 of its speed, by chance
# GCC for x86 keeps addresses that don't fit the integer registers in vector or mask registers. To fetch one back waits
# in line with the products: up to a fifth of a loop's speed. Of these two the first has a processor's true costs for
# mask registers, and the second leaves it the stack alone.
TUNING = ["-mtune=icelake-server", "-mtune-ctrl=^inter_unit_moves_to_vec"]
# constexpr functions of the standard library (std::max, std::bit_cast) run on both sides.
NVCC = [*COMMON, "-fmad=false", "--expt-relaxed-constexpr", "-gencode=arch=compute_80,code=sm_80"]
NVCC += ["-gencode=arch=compute_90a,code=sm_90a"]
NVCC += ["-gencode=arch=compute_90,code=compute_90"]


def accepts(compiler: str, flags: list[str]) -> bool:
    command = [*shlex.split(compiler), *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def extensions():
    compiler = os.environ.get("CXX") or "c++"  # as torch's BuildExtension takes it
    if shutil.which(shlex.split(compiler)[0]) is None:
        warnings.warn("no C++ compiler: engine installs without native kernels, by its references", stacklevel=1)
        return []
    if accepts(compiler, TUNING):
        CXX.extend(TUNING)
    from pybind11.setup_helpers import Pybind11Extension

    how = {"include_dirs": [str(ROOT / "csrc")], "py_limited_api": True}
    found = [
        CppExtension("engine._cpu", CPU_SOURCES, extra_compile_args=CXX, **how),
        Pybind11Extension("engine._native", MODULE_SOURCES, extra_compile_args=CXX, include_dirs=how["include_dirs"]),
    ]
    # A CPU-only torch has nothing for a CUDA library to link against.
    if torch.version.cuda is not None and CUDA_HOME is not None and shutil.which("nvcc"):
        found.append(CUDAExtension("engine._cuda", CUDA_SOURCES, extra_compile_args={"cxx": CXX, "nvcc": NVCC}, **how))
    return found


if __name__ == "__main__":  # bench/build_cuda.py reads the lists above
    if sys.platform != "linux":
        raise SystemExit(f"compression-engine runs on Linux alone (futexes, memfd, fcntl), and this is {sys.platform}")
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})

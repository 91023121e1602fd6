"""Builds the native libraries; everything else about the package stands in pyproject.toml.

Three libraries, each only where its compiler is: `_cpu` (ops for the CPU, libtorch's stable ABI, no Python ABI),
`_cuda` (the same for CUDA, where nvcc is found) and `_native` (pybind11: what is no tensor op).
"""

import os
import shutil
import warnings
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
CPU_SOURCES = [
    "csrc/cpu/bitmap_int8_linear.cpp",
    "csrc/cpu/bitmap_linear.cpp",
    "csrc/cpu/bitmap_to_dense.cpp",
    "csrc/cpu/csr_linear.cpp",
    "csrc/cpu/int8_dequantize.cpp",
    "csrc/cpu/int8_embedding.cpp",
    "csrc/cpu/int8_linear.cpp",
    "csrc/cpu/int8_quantize.cpp",
    "csrc/cpu/int8_weight_linear.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/magnitude_threshold.cpp",
    "csrc/cpu/prune_quantize_to_bitmap.cpp",
    "csrc/cpu/prune_to_bitmap.cpp",
    "csrc/cpu/prune_to_csr.cpp",
    "csrc/cpu/threshold_prune.cpp",
]
CUDA_SOURCES = ["csrc/cuda/prune_to_bitmap.cu"]
COMMON = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# Contraction into fused multiply-add would round differently from the reference: only kernels that ask for it get it.
CXX = [*COMMON, "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
NVCC = [*COMMON, "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
NVCC += ["-gencode=arch=compute_90,code=compute_90"]


def extensions():
    import torch
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension

    if shutil.which(os.environ.get("CXX", "g++")) is None:
        warnings.warn(
            "no C++ compiler: engine installs without native kernels and runs by its references", stacklevel=1
        )
        return []
    found = [
        CppExtension(
            "engine._cpu", CPU_SOURCES, include_dirs=[str(ROOT / "csrc")], extra_compile_args=CXX, py_limited_api=True
        ),
        Pybind11Extension("engine._native", ["csrc/module/native.cpp"], cxx_std=17),
    ]
    # A CPU-only torch has nothing for a CUDA library to link against.
    if torch.version.cuda is not None and CUDA_HOME is not None and shutil.which("nvcc"):
        flags = {"cxx": CXX, "nvcc": NVCC}
        found.append(
            CUDAExtension(
                "engine._cuda",
                CUDA_SOURCES,
                include_dirs=[str(ROOT / "csrc")],
                extra_compile_args=flags,
                py_limited_api=True,
            )
        )
    return found


def build_ext():
    from torch.utils.cpp_extension import BuildExtension

    return BuildExtension


setup(ext_modules=extensions(), cmdclass={"build_ext": build_ext()})

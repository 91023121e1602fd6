"""Where the CUDA kernels run in a test: on a GPU where there is one, and everywhere on CPU tensors by emulation."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from build_tools import CXX, LINK, ROOT, cached, headers_text, run

SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
EMULATED = "ENGINE_EMULATED_CUDA" in os.environ
DEVICE = "cpu" if EMULATED else "cuda"
on_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(not EMULATED and not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def emulated_library():
    """Every .cu compiled by g++, in two parts at once; tests/cuda/emulated says what that shows and what not."""
    compiler = [*CXX, "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    compiler += ["-I", ROOT / "tests/cuda/emulated", "-I", ROOT / "csrc", "-c"]
    depends_on = [*compiler, *(source.read_text() for source in SOURCES), headers_text("csrc", "tests/cuda")]

    def compile_some(scratch, sources):
        scratch.with_suffix(".cpp").write_text("".join(f'#include "{source}"\n' for source in sources))
        run([*compiler, scratch.with_suffix(".cpp"), "-o", scratch])
        scratch.with_suffix(".cpp").unlink()
        return scratch

    def make(path):
        half = len(SOURCES) // 2
        with ThreadPoolExecutor() as pool:
            scratch = [path.with_suffix(f".{i}.o") for i in range(3)]
            parts = (SOURCES[:half], SOURCES[half:], [ROOT / "csrc/cpu/isa.cpp"])
            objects = list(pool.map(compile_some, scratch, parts))
        run(["g++", "-shared", *objects, "-o", path, *LINK])
        for each in objects:
            each.unlink()

    return cached("emulated_cuda.so", depends_on, make)


def on(*tensors):
    """The tensors on the device under test."""
    return [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in tensors]


def assert_same(got, want):
    """Equal to the bit, dtype and shape included; NaN equals NaN."""
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        torch.testing.assert_close(g.cpu(), w, rtol=0, atol=0, equal_nan=True)

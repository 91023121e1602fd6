"""Every CUDA kernel compiled for the GPUs it is made for, without one: no spills, and the loads that were meant."""

import re
import shutil
from pathlib import Path

import pytest
from build_tools import ROOT, STABLE_ABI, TORCH_INCLUDES, cached, headers_text, run
from device import SOURCES

ARCHITECTURES = ("sm_80", "sm_90a")
VECTOR_LOADS = {"prune_to_bitmap": "LDG.E.128"}  # instructions that must be in the machine code

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def compiled(source: Path, architecture: str) -> tuple[str, Path]:
    """What ptxas says of each kernel, and the cubin."""
    target = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
    command = ["nvcc", "-O3", "-fmad=false", "--expt-relaxed-constexpr", *STABLE_ABI, target, "-I", ROOT / "csrc"]
    command += [*TORCH_INCLUDES, "-Xptxas", "-v", "-cubin"]

    def make(log):
        log.write_text(run([*command, source, "-o", cubin_of(log)]))
        cubin_of(log).rename(cubin_of(log).with_name(f"{source.stem}-{architecture}.cubin"))

    def cubin_of(log):
        return log.with_suffix(".cubin")

    depends_on = [*command, source.read_text(), headers_text("csrc/cuda", "csrc/common")]
    log = cached(f"{source.stem}_{architecture}.ptxas", depends_on, make)
    return log.read_text(), log.with_name(f"{source.stem}-{architecture}.cubin")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(source, architecture):
    log, cubin = compiled(source, architecture)
    kernels = re.findall(r"Compiling entry function '(\S+)'", log)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert kernels and len(frames) >= len(kernels), log
    assert all(frame == ("0", "0", "0") for frame in frames), log
    if source.stem in VECTOR_LOADS and shutil.which("cuobjdump"):
        assert VECTOR_LOADS[source.stem] in run(["cuobjdump", "--dump-sass", cubin])

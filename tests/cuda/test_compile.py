"""Every CUDA kernel compiled for the GPUs it is made for, without one: no spills, the instructions that were meant."""

import functools
import importlib.util
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from build_tools import ROOT, STABLE_ABI, TORCH_INCLUDES, cached, headers_text, run
from device import SOURCES

ARCHITECTURES = ["sm_90a", pytest.param("sm_80", marks=pytest.mark.slow)]  # each half a minute on two cores
COPY_ASIDE, MATRICES = "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4"  # cp.async past L1, ldmatrix
INSTRUCTIONS = {  # that must be in the machine code
    "bitmap_int8_linear": ("IMMA.16832.S8.S8", COPY_ASIDE, MATRICES, "PRMT"),
    "bitmap_linear": ("HMMA.16816.F32 ", "HMMA.16816.F32.BF16", COPY_ASIDE, MATRICES, "PRMT"),
    "bitmap_to_dense": (COPY_ASIDE, "STG.E.128"),
    "block_to_dense": ("LDG.E.128", "STG.E.128"),
    "prune_quantize_to_bitmap": ("LDG.E.128", "STG.E.128"),
    "prune_to_bitmap": ("LDG.E.128", "STG.E.128"),
    "prune_to_block": ("LDG.E.128", "STG.E.128"),
    "prune_to_csr": ("LDG.E.128", "STG.E.128"),
    "semi_structured_to_dense": ("LDG.E.128", "STG.E.128"),
    "prune_to_semi_structured": ("LDG.E.128", "STG.E.128", "STG.E.64"),
    "semi_structured_int8_linear": ("IMMA.SP.16864.S8.S8", COPY_ASIDE, MATRICES),
    "semi_structured_linear": ("HMMA.SP.16832.F32 ", "HMMA.SP.16832.F32.BF16", COPY_ASIDE, MATRICES),
}
# And in sm_90a's: wgmma and wgmma.sp, tiles by TMA, stmatrix.
BY_WARPGROUPS = {
    "bitmap_int8_linear": ("IGMMA.64x256x32.S8.S8", "UBLKCP"),
    "bitmap_linear": ("HGMMA.64x256x16.F32 ", "HGMMA.64x256x16.F32.BF16", "UBLKCP"),
    "int8_scaled_mm": ("IGMMA.64x256x32.S8.S8", "UTMALDG.2D", "STSM.16.MT88.4"),
    "semi_structured_int8_linear": ("IGMMA.SP.64x256x64.S8.S8", "UTMALDG.2D", "STSM.16.MT88.4"),
    "semi_structured_linear": (
        "HGMMA.SP.64x256x32.F32 ",
        "HGMMA.SP.64x256x32.F32.BF16",
        "UTMALDG.2D",
        "STSM.16.MT88.4",
    ),
}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def compiled(source: Path, architecture: str) -> tuple[str, Path]:
    """What ptxas says of each kernel, and the machine code."""
    command = ["nvcc", "-O3", "-fmad=false", "--expt-relaxed-constexpr", *STABLE_ABI]
    command += [f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"]
    command += ["-I", ROOT / "csrc", *TORCH_INCLUDES, "-Xptxas", "-v", "-fatbin"]

    def make(log):
        log.write_text(run([*command, source, "-o", log.with_suffix(".fatbin")]))
        log.with_suffix(".fatbin").rename(log.with_name(f"{source.stem}.{architecture}.fatbin"))

    depends_on = [*command, source.read_text(), headers_text("csrc/cuda", "csrc/common")]
    log = cached(f"{source.stem}.{architecture}.ptxas", depends_on, make)
    return log.read_text(), log.with_name(f"{source.stem}.{architecture}.fatbin")


def disassembler() -> str | None:
    """Triton carries one."""
    triton = importlib.util.find_spec("triton")
    carried = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(carried) if carried and carried.exists() else shutil.which("cuobjdump")


@functools.cache
def compiled_at_once(architecture: str) -> dict[Path, tuple[str, Path]]:
    """Two files at a time, which is what takes the time here."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SOURCES, pool.map(lambda source: compiled(source, architecture), SOURCES), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(source, architecture):
    log, machine_code = compiled_at_once(architecture)[source]
    kernels = re.findall(r"Compiling entry function '\S+' for '(\S+)'", log)
    assert set(kernels) == {architecture}, log
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) >= len(kernels) and all(frame == ("0", "0", "0") for frame in frames), log
    shared = [int(size) for size in re.findall(r"(\d+) bytes smem", log)]
    assert max(shared, default=0) <= 48 << 10, "more than a block has without asking"
    if source.stem in INSTRUCTIONS and disassembler():
        assembly = run([disassembler(), "--dump-sass", "--gpu-architecture", architecture, machine_code])
        meant = INSTRUCTIONS[source.stem] + (BY_WARPGROUPS.get(source.stem, ()) if architecture == "sm_90a" else ())
        missing = [name for name in meant if name not in assembly]
        assert not missing, f"{architecture}: no {', '.join(missing)}"

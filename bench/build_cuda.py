"""Builds `engine/_cuda.abi3.so` by nvcc alone, for one card: `python bench/build_cuda.py [--architecture sm_90a]`.

`setup.py` builds the same library for every card, where torch has CUDA. This one compiles all files at once and is done
in the time of the longest; it needs neither a GPU nor a torch with CUDA, so that the library can be made before the
machine with the GPU is at hand: by the stable ABI it runs with any torch from 2.11 on, of the same major CUDA version.
"""

import argparse
import concurrent.futures
import hashlib
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "engine/_cuda.abi3.so"


def run(command: list) -> None:
    """Runs a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-4000:]}")


def card() -> str:
    """The architecture of the card that is there, or an H200's."""
    if not torch.cuda.is_available():
        return "sm_90a"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}" + ("a" if major == 9 else "")


def torch_libraries(scratch: Path) -> list[str]:
    """How to link against torch. Where it has no CUDA, a library of the name that it will have stands in."""
    folder = Path(torch.__file__).parent / "lib"
    if not (folder / "libtorch_cuda.so").exists():
        stub = scratch / "stub.c"
        stub.write_text("int aoti_torch_get_current_cuda_stream(int index, void** stream) { return 1; }\n")
        run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", stub, "-o", scratch / "libtorch_cuda.so"])
    return [f"-L{folder}", f"-L{scratch}", "-Xlinker=--no-as-needed", "-ltorch_cuda", "-ltorch_cpu", "-lc10"]


def build(architecture: str) -> str:
    """Builds the library unless it is there, of these sources and for this card. Returns what was done."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    sources = [ROOT / source for source in setup["CUDA_SOURCES"]]
    flags = [flag for flag in setup["NVCC"] if not flag.startswith("-gencode")]
    flags += [f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}", "-Xcompiler=-fPIC"]
    flags += [f"-I{ROOT / 'csrc'}", *(f"-I{path}" for path in include_paths())]
    headers = sorted(path for part in ("cuda", "common") for path in (ROOT / "csrc" / part).rglob("*.[hc]*"))
    text = "\0".join([architecture, *setup["NVCC"], *(path.read_text() for path in headers)])
    key = f"engine sources {hashlib.sha256(text.encode()).hexdigest()}"
    if LIBRARY.exists() and key.encode() in LIBRARY.read_bytes():
        return f"{LIBRARY.name} is of these sources, for {architecture}"
    if shutil.which("nvcc") is None:
        raise RuntimeError("no nvcc")
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        scratch = Path(folder)
        objects = [scratch / f"{source.stem}.o" for source in sources]
        compiles = [["nvcc", *flags, "-c", source, "-o", to] for source, to in zip(sources, objects, strict=True)]
        list(pool.map(run, compiles))
        (scratch / "key.c").write_text(f'__attribute__((used)) const char engine_sources[] = "{key}";\n')
        linked = scratch / LIBRARY.name
        run(
            [
                "nvcc",
                "-shared",
                "-Xcompiler=-fPIC",
                *objects,
                scratch / "key.c",
                *torch_libraries(scratch),
                "-o",
                linked,
            ]
        )
        shutil.move(linked, LIBRARY)
    return f"built {LIBRARY.name} for {architecture}"


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architecture", default=None, help="sm_80, sm_90a, ...; by default the card's")
    given = parser.parse_args()
    try:
        print(build(given.architecture or card()))
    except RuntimeError as error:
        print(f"without the CUDA C++ kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the tests that compile C++ or CUDA share: commands that fail loudly, files made anew only where needed."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build/tests"
STABLE_ABI = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
TORCH_INCLUDES = [part for folder in include_paths() for part in ("-isystem", folder)]
TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"
CXX = ["g++", *STABLE_ABI, "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
CXX += ["-fno-trapping-math", *TORCH_INCLUDES]
LINK = [f"-L{TORCH_LIBRARIES}", f"-Wl,-rpath,{TORCH_LIBRARIES}", "-ltorch_cpu", "-lc10"]


def run(command: list, **options) -> str:
    """Standard output and error of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-8000:]}"
    return done.stdout + done.stderr


def headers_text(*folders: str) -> str:
    """The text of every header under `folders`, for :func:`cached`."""
    found = sorted(
        path for folder in folders for path in (ROOT / folder).rglob("*.[hc]*") if path.suffix in (".h", ".cuh")
    )
    return "\0".join(path.read_text() for path in found)


def cached(name: str, depends_on: list, make: Callable[[Path], object]) -> Path:
    """The file `name` (its stem and suffix) made by `make(path)`; the last one as long as `depends_on` is the same."""
    key = hashlib.sha256("\0".join([torch.__version__, *map(str, depends_on)]).encode()).hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{Path(name).stem}-{key}{Path(name).suffix}"
    if not path.exists():
        scratch = path.with_name(f"{os.getpid()}-{path.name}")
        make(scratch)
        for old in CACHE.glob(f"{Path(name).stem}-*{Path(name).suffix}"):
            old.unlink(missing_ok=True)
        scratch.rename(path)
    return path


def run_pytest(arguments: list, **environment: str) -> str:
    """Runs pytest in a process of its own, from outside the checkout's root.

    There `-m` would put the root on the path, and with it the uninstalled package `kernels`.
    """
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    command += ["-p", "no:cacheprovider", "--no-header", "--show-capture=no", *arguments]
    return run(command, cwd=ROOT / "tests", env={**os.environ, **environment})

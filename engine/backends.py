"""Loads the native libraries and Triton kernels, and knows why one is missing.

A library that is not there (no compiler when the package was built) is a fact that :func:`status` tells; a library
that is there and does not load is an error with its name.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import torch

CPU_VARIANTS = ("portable", "avx2", "avx_vnni", "avx512")  # in the order of csrc/common/isa.h
TRITON_KERNELS: tuple[str, ...] = (
    "block_int8_linear",
    "block_linear",
    "csr_linear",
    "int8_dequantize",
    "int8_embedding",
    "int8_fake_quantize",
    "int8_linear",
    "int8_quantize",
    "int8_weight_linear",
    "ring_codec",
    "threshold_prune",
)  # modules of engine.kernels, each owning the CUDA key of the op of its name, ring_codec of its three


@dataclasses.dataclass(frozen=True)
class Status:
    """One backend: its name, whether it serves ops, and why not or with what."""

    name: str
    active: bool
    detail: str


def _library(stem: str) -> Path | None:
    """The built library `engine/<stem>*.so`, or the file that `ENGINE<STEM>_LIBRARY` names (a sanitized build, say)."""
    override = os.environ.get(f"ENGINE{stem.upper()}_LIBRARY")
    if override:
        return Path(override)
    return next(iter(sorted(Path(__file__).parent.glob(f"{stem}.*so"))), None)


def _load(path: Path) -> ctypes.CDLL:
    try:
        torch.ops.load_library(str(path))
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"engine: the native library {path.name} is installed but does not load: {error}") from error


def _variants(cpu: ctypes.CDLL) -> tuple[str, ...]:
    return tuple(name for i, name in enumerate(CPU_VARIANTS) if cpu.engine_has_variant(i))


def _start() -> tuple[list[Status], ctypes.CDLL | None]:
    found, cpu = [], None
    path = _library("_cpu")
    if path is None:
        found.append(Status("cpu", False, "not built: no C++ compiler was found when the package was installed"))
    else:
        cpu = _load(path)
        best = _variants(cpu)[-1]
        found.append(Status("cpu", True, f"{path.name}, best instruction set {best}"))

    gpu, path = torch.cuda.is_available(), _library("_cuda")
    if path is None:
        found.append(Status("cuda", False, "not built: needs nvcc and a torch with CUDA when the package is installed"))
    elif not gpu:
        found.append(Status("cuda", False, f"{path.name} is built; no GPU is visible to torch"))
    else:
        _load(path)
        found.append(Status("cuda", True, path.name))

    if importlib.util.find_spec("triton") is None:
        found.append(Status("triton", False, "not installed"))
    elif not gpu:
        found.append(Status("triton", False, "installed; no GPU is visible to torch"))
    else:
        found.append(_register_triton())
    return found, cpu


def _register_triton() -> Status:
    try:
        kernels = [importlib.import_module(f"engine.kernels.{kernel}") for kernel in TRITON_KERNELS]
    except ImportError as error:  # of a part that an older Triton hasn't got, or of all of a checkout's kernels
        if (error.name or "").startswith("engine.") and error.name != "engine.kernels":
            raise
        return Status("triton", False, f"installed, but not fit for the kernels: {error}")
    for kernel in kernels:
        kernel.register()
    return Status("triton", True, f"{len(kernels)} kernels")


_status, _cpu = _start()


def status() -> list[Status]:
    """Every backend, active or not, with the reason."""
    # The GPU is asked for its name here, not on import: that would begin to use it, and a forked child couldn't.
    on_gpu = [status for status in _status if status.active and status.name != "cpu"]
    name = torch.cuda.get_device_name() if on_gpu else ""
    return [dataclasses.replace(s, detail=f"{s.detail} on {name}") if s in on_gpu else s for s in _status]


def cpu_variants() -> tuple[str, ...]:
    """The instruction sets this processor can run the CPU kernels with, worst first; empty without the library."""
    return _variants(_cpu) if _cpu else ()


def cpu_variant() -> str:
    """The instruction set in use, or "reference" without the library."""
    return CPU_VARIANTS[_cpu.engine_active_variant()] if _cpu else "reference"


@contextlib.contextmanager
def force_cpu_variant(name: str) -> Iterator[None]:
    """Runs the CPU kernels by instruction set `name` (one of :func:`cpu_variants`), in every thread, while it lasts."""
    if name not in cpu_variants():
        raise ValueError(f"engine: CPU variant: expected one of {', '.join(cpu_variants()) or 'none'}, got {name!r}")
    assert _cpu is not None
    before = _cpu.engine_active_variant()
    _cpu.engine_set_variant(CPU_VARIANTS.index(name))
    try:
        yield
    finally:
        _cpu.engine_set_variant(before)

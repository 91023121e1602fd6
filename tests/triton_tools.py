"""What the tests of Triton kernels share: interpreter mode, and compiling for a GPU that is not there."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from build_tools import run_pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Triton decides when it is imported whether it interprets, so that either kind of test needs a process of its own.
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that run_interpreted starts")
compiled = pytest.mark.skipif(INTERPRETED, reason="Triton is in interpreter mode")


def run_interpreted(file: str) -> None:
    """Runs the tests of `file` that are marked `interpreted`, in a process of their own."""
    out = run_pytest([file], TRITON_INTERPRET="1")
    assert re.search(r"[1-9]\d* passed", out), out[-8000:]


def compile_for(capability: int, kernel, signature: dict, constants: dict, divisible: tuple = (), num_warps: int = 4):
    """What Triton makes of `kernel` for sm_<capability>, without a GPU: its asm, and the cubin's resource usage.

    `divisible` names the arguments that are multiples of 16, as the launcher would have found.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    full = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, full, constexprs, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    return binary.asm


def resource_usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack and local memory of the only kernel in a cubin; a spill is on the stack."""
    import triton

    (folder / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "--dump-resource-usage", folder / "kernel.cubin"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", out)}
    assert usage.keys() == {"REG", "STACK", "LOCAL"}, out
    return usage

"""What the tests of Triton kernels share: interpreter mode, and compiling for a GPU that is not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Triton decides when it is imported whether it interprets, so that either kind of test needs a process of its own.
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that run_interpreted starts")
compiled = pytest.mark.skipif(INTERPRETED, reason="Triton is in interpreter mode")


def run_interpreted(file: str) -> None:
    """Runs the tests of `file` that are marked `interpreted`, in a process of their own."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        ROOT / "pyproject.toml",
        "--rootdir",
        ROOT,
        "-p",
        "no:cacheprovider",
    ]
    # Not in the checkout's root, which `-m` would put on the path, and with it the uninstalled `kernels`.
    done = subprocess.run(
        [str(part) for part in (*command, "--show-capture=no", file)],
        cwd=Path(file).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and re.search(r"[1-9]\d* passed", done.stdout), (done.stdout + done.stderr)[-8000:]


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

"""What the tests of Triton kernels share: interpreter mode, and compiling for a GPU that is not there."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Triton decides when it is imported whether it interprets, so that either kind of test needs a process of its own.
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_interpreter_mode starts")
compiled = pytest.mark.skipif(INTERPRETED, reason="Triton is in interpreter mode")


if importlib.util.find_spec("triton") is not None:
    from engine.kernels._device import A100, H200, Device

    # What configurations must fit: also cards with little shared memory, of one generation and the next but one.
    ALL_CARDS = (A100, H200, Device(128, 99 << 10, 89), Device(170, 99 << 10, 120))
    each_card = pytest.mark.parametrize("card", [A100, H200], ids=["sm_80", "sm_90"])
    # Compiling takes seconds: for most kernels the older card is left to the slow tests.
    hopper_first = pytest.mark.parametrize(
        "card", [pytest.param(A100, marks=pytest.mark.slow, id="sm_80"), pytest.param(H200, id="sm_90")]
    )


def meta(shape: tuple, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory, which is enough to compile for."""
    return torch.empty(shape, dtype=dtype, device="meta")


def needs_gpu(test):
    """Marks a test that runs a kernel on a GPU."""
    test = pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs an NVIDIA GPU")(test)
    return pytest.mark.gpu(test)


def slow_but(quick: object, values: Sequence) -> list:
    """Parameters, all but one of them marked slow."""
    return [value if value == quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def quick_first(linears: list) -> list:
    """Parameters of the shapes (M, N, K), those that keep the interpreter busy for seconds marked slow."""
    long = [m * n * k > 4 << 20 for m, n, k in linears]
    return [
        pytest.param(shape, marks=pytest.mark.slow if slow else (), id=str(shape))
        for shape, slow in zip(linears, long, strict=True)
    ]


def same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """Asserts equality to the bit; a NaN equals any other NaN, as processors differ in its payload."""
    assert got.dtype == want.dtype and got.shape == want.shape, f"{got.dtype} {got.shape}, {want.dtype} {want.shape}"
    if want.dtype.is_floating_point:
        assert torch.equal(got.isnan(), want.isnan())
        got, want = got.nan_to_num(0.0, torch.inf, -torch.inf), want.nan_to_num(0.0, torch.inf, -torch.inf)
        as_int = torch.int32 if want.dtype == torch.float32 else torch.int16
        got, want = got.contiguous().view(as_int), want.contiguous().view(as_int)
    if not torch.equal(got, want):
        at = tuple((got != want).nonzero()[0].tolist())
        raise AssertionError(f"{int((got != want).sum())} differ, first at {at}: {got[at]}, expected {want[at]}")


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel that was written down instead of made."""

    kernel: object
    args: tuple
    options: dict  # keyword arguments: constants, num_warps and so on

    def compile(self, capability: int) -> "Binary":
        """What the launcher would have compiled for sm_<capability>, with its specialisation of the arguments."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, make_backend
        from triton.runtime.jit import create_function_from_signature

        target = GPUTarget("cuda", capability, 32)
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        kwargs = {**self.options, "debug": False, "instrumentation_mode": ""}
        bound, specialization, options = bind(*self.args, **kwargs)
        options, *parts = self.kernel._pack_args(backend, kwargs, bound, specialization, options)
        binary = triton.compile(ASTSource(self.kernel, *parts), target=target, options=options.__dict__)
        return Binary(binary.asm["ptx"], binary.asm["cubin"], binary.metadata.shared, binary.asm["ttgir"])


@dataclasses.dataclass(frozen=True)
class Binary:
    """A compiled kernel."""

    ptx: str
    cubin: bytes
    shared: int  # bytes of shared memory
    ttgir: str

    @functools.cached_property
    def usage(self) -> dict[str, int]:
        """Registers, stack and local memory; what is spilled is on the stack."""
        found = {n: int(v) for n, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", self._tool("cuobjdump", "-res-usage"))}
        assert found.keys() == {"REG", "STACK", "LOCAL"}
        return found

    @functools.cached_property
    def sass(self) -> list[str]:
        """The instructions of the cubin, a line each."""
        out = self._tool("nvdisasm", "-c")
        found = [line.split("*/", 1)[1].strip() for line in out.splitlines() if re.match(r"\s+/\*\w+\*/", line)]
        assert found, out[:1000]
        return found

    def _tool(self, name: str, option: str) -> str:
        """What one of Triton's own tools prints about the cubin."""
        import triton

        tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "kernel.cubin").write_bytes(self.cubin)
            command = [tool, option, Path(folder) / "kernel.cubin"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def count(self, instruction: str) -> int:
        """How many instructions begin with this name, predicate aside."""
        return sum(re.sub(r"^@!?U?P\w+\s+", "", line).startswith(instruction) for line in self.sass)

    def check(self, card) -> None:
        """Asserts that nothing spills and that a block's shared memory fits the card."""
        assert self.usage["STACK"] == self.usage["LOCAL"] == 0, self.usage
        assert self.shared <= card.shared_memory, f"{self.shared} bytes of {card.shared_memory}"
        # Triton 3.6 writes the next step's operand into registers that a product still under way reads.
        from_registers = re.search(r"warp_group_dot .*: tensor<[^>]*dot_op", self.ttgir)
        pending = re.findall(r"warp_group_dot_wait .*pendings = ([1-9]\d*)", self.ttgir)
        assert not (from_registers and pending), "a product from registers is not waited for in its step"


@contextlib.contextmanager
def written_down(card) -> Iterator[list[Launch]]:
    """While it lasts, launches of Triton kernels are written down, as for `card` (a `Device`).

    Tensors on "meta" will do: no value is read.
    """
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(self, *args, grid, warmup, **options):
        launches.append(Launch(self, args, options))

    with mock.patch.object(JITFunction, "run", run), mock.patch("engine.kernels._device.describe", lambda _: card):
        yield launches


def compile_launches(card, function: Callable, *args) -> list[Binary]:
    """Compiles every kernel that `function(*args)` launches for `card`, and checks each by :meth:`Binary.check`."""
    with written_down(card) as launches:
        function(*args)
    binaries = [launch.compile(card.capability) for launch in launches]
    for binary in binaries:
        binary.check(card)
    return binaries


def mend_interpreter() -> None:
    """Gives the interpreter bfloat16: it holds the raw 16 bits, cuts them off instead of rounding, and multiplies them.

    The conversions here are those of a GPU: to nearest, ties to even, NaN stays one.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(data):
        return (data.astype(np.uint32) << 16).view(np.float32)

    def convert(data, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(data).view(np.uint32)
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(data).view(np.uint32)
            nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return np.where(np.isnan(data), 0x7FC0, nearest).astype(np.uint16)
        return original(data, source, target, rounding)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        x, y = (widened(t.data) if t.dtype == tl.bfloat16 else t.data for t in (a, b))
        if d.dtype == tl.int32:  # exact in float64 as well, and NumPy is fast at that
            product = np.matmul(x.astype(np.float64), y.astype(np.float64))
            return interpreter.TensorHandle(product.astype(np.int32) + d.data, d.dtype.scalar)
        return interpreter.TensorHandle(np.matmul(x, y, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def cast(self, source, target):
        before, after = source.dtype.scalar, target.scalar
        if tl.bfloat16 not in (before, after) or tl.float32 in (before, after) or before == after:
            return original_cast(self, source, target)
        if before == tl.bfloat16:
            return original_cast(self, interpreter.TensorHandle(widened(source.data), tl.float32), target)
        single = source.data.astype(np.float32)
        return interpreter.TensorHandle(convert(single, tl.float32, tl.bfloat16, None), tl.bfloat16)

    original, original_cast = interpreter._convert_float, interpreter.InterpreterBuilder.cast_impl
    interpreter.InterpreterBuilder.cast_impl = cast
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot


if INTERPRETED:
    mend_interpreter()

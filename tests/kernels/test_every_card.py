"""Triton kernels for cards other than the two that all tests compile for: Ada, and both Blackwells.

Their tensor cores, their shared memory and what Triton makes of them differ, and so does what fails to compile.
"""

import pytest
import torch
from triton_tools import compiled, meta, written_down

pytest.importorskip("triton")
from engine.kernels import block_int8_linear, block_linear, csr_linear, int8_linear, int8_quantize, int8_weight_linear
from engine.kernels._device import Device

CARDS = {
    "sm_89": Device(128, 99 << 10, 89),
    "sm_100": Device(148, 227 << 10, 100),
    "sm_120": Device(170, 99 << 10, 120),
}
TENSOR_CORES = {"sm_89": ("HMMA", "IMMA"), "sm_100": ("UTCHMMA", "HMMA", "IMMA"), "sm_120": ("HMMA", "IMMA")}
N = 4096
# What a stack frame has though nothing spills: ptxas reserves eight bytes for some programs from sm_100 on.
FRAME = 8


def calls(m, k):
    """By op: the function and its arguments."""
    x, weight, scale = meta((m, k), torch.bfloat16), meta((N, k), torch.int8), meta((N,))
    count = N // 128 * -(-k // 128) // 2
    indices = meta((N // 128 + 1,), torch.int32), meta((count,), torch.int32)
    nnz = meta((N * 40,), torch.int32), meta((N * 40,), torch.bfloat16)
    return {
        "int8_linear": (int8_linear.int8_linear, x, weight, scale),
        "int8_weight_linear": (int8_weight_linear.int8_weight_linear, x, weight, scale),
        "block_int8_linear": (
            block_int8_linear.block_int8_linear,
            x,
            *indices,
            meta((count, 128, 128), torch.int8),
            scale,
        ),
        "block_linear": (block_linear.block_linear, x, *indices, meta((count, 128, 128), torch.bfloat16), N),
        "csr_linear": (csr_linear.csr_linear, x, meta((N + 1,), torch.int32), *nnz),
        "int8_quantize": (int8_quantize.int8_quantize, x),
    }


QUICK = ("sm_100", "int8_weight_linear", 2048, 4096)  # which Triton 3.6 could not compile
CASES = [(card, op, m, k) for card in CARDS for op in calls(1, 128) for m in (16, 128, 2048) for k in (4096, 4100)]


@compiled
@pytest.mark.parametrize(
    "card, op, m, k", [pytest.param(*case, marks=() if case == QUICK else pytest.mark.slow) for case in CASES]
)
def test_compiles_without_spills(card, op, m, k):
    function, *args = calls(m, k)[op]
    with written_down(CARDS[card]) as launches:
        function(*args)
    for launch in launches:
        binary = launch.compile(CARDS[card].capability)
        assert binary.usage["LOCAL"] == 0 and binary.usage["STACK"] <= FRAME, binary.usage
        assert binary.shared <= CARDS[card].shared_memory
    if op.endswith("linear") and op != "csr_linear":
        assert any(binary.count(name) for name in TENSOR_CORES[card])

"""Whether this machine gains by bfloat16 in training: AVX512-BF16 and AMX do; without, it is several times slower."""

import statistics
import time

import torch
from torch.nn import functional as F


def training_dtype() -> torch.dtype | None:
    """torch.bfloat16 where the products of a layer of 384 to 1536, 1024 rows, are faster in it than in float32.

    None otherwise: what `engine.distill` and `torch.autocast` (`enabled=`) take for no mixed precision. 20 to 200 ms.
    """
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    operands = {dtype: (torch.randn(1024, 384).to(dtype), torch.randn(1536, 384).to(dtype)) for dtype in seconds}
    for _ in range(5):
        for dtype, (rows, weight) in operands.items():
            begun = time.perf_counter()
            F.linear(rows, weight)
            seconds[dtype].append(time.perf_counter() - begun)
    single, half = (statistics.median(times[1:]) for times in seconds.values())
    return torch.bfloat16 if half < single else None

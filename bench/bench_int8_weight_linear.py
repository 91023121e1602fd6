"""int8_weight_linear against torch's linear in the activations' dtype and its int8 weight-only op, from memory."""

import torch
import torch.nn.functional as F

from engine.bench.common import Row, print_rows, rotated, time_interleaved
from engine.ops.int8_weight_linear import int8_weight_linear

# N, K
WEIGHTS = {(8192, 8192): "from memory", (4096, 4096): "an attention layer", (1536, 384): "MiniLM's, cached"}


def bench(n: int, k: int, dtype: torch.dtype, why: str) -> None:
    dense = rotated(lambda: torch.randn(n, k).to(dtype), n * k * dtype.itemsize)
    small = rotated(lambda: torch.randint(-127, 128, (n, k), dtype=torch.int8), n * k)
    scale = torch.rand(n)
    name = "fp32" if dtype == torch.float32 else "bf16"
    rows = []
    for m in (1, 2, 4, 8, 16, 64, 128, 512):
        x = torch.randn(m, k).to(dtype)
        functions = {
            "int8_weight_linear": lambda i, x=x: int8_weight_linear(x, small[i % len(small)], scale),
            f"F.linear {name}": lambda i, x=x: F.linear(x, dense[i % len(dense)]),
        }
        if m <= 8 and dtype == torch.bfloat16:  # for more rows it takes seconds
            functions["_weight_int8pack_mm bf16"] = lambda i, x=x: torch._weight_int8pack_mm(
                x, small[i % len(small)], scale.bfloat16()
            )
        timings = time_interleaved(functions, 7 if n * m > 1 << 20 else 25)
        rows.append(Row(f"M={m} N={n} K={k}", timings, n * k, 2 * m * n * k, name))
    print_rows("int8_weight_linear", rows, "int8_weight_linear", f"{name} activations, {why}")


def main() -> None:
    for (n, k), why in WEIGHTS.items():
        for dtype in (torch.float32, torch.bfloat16):
            bench(n, k, dtype, why)


if __name__ == "__main__":
    main()

"""bitmap_linear against torch's fp32 and bf16 linear on the dense weight, from memory; and a training step of each."""

import torch
import torch.nn.functional as F

from engine.bench.common import Row, print_rows, rotated, time_interleaved
from engine.ops._bitmap import pack_mask
from engine.ops.bitmap_linear import bitmap_linear

# N, K
WEIGHTS = {(8192, 8192): "from memory", (4096, 4096): "an attention layer", (1536, 384): "MiniLM's, cached"}


def bitmap(n: int, k: int, sparsity: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = torch.rand(n, k) >= sparsity
    row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return pack_mask(mask), row_offsets, torch.randn(int(row_offsets[-1])).to(dtype)


def bench(n: int, k: int, sparsity: float, dtype: torch.dtype, why: str) -> None:
    dense = rotated(lambda: torch.randn(n, k), n * k * 4)
    half = rotated(lambda: torch.randn(n, k).bfloat16(), n * k * 2)
    kept = int(n * k * (1 - sparsity))
    moved = n * k // 8 + kept * dtype.itemsize
    maps = rotated(lambda: bitmap(n, k, sparsity, dtype), moved)
    rows = []
    for m in (1, 2, 4, 8, 16, 64, 128, 512):
        x, x16 = torch.randn(m, k), torch.randn(m, k).bfloat16()
        functions = {
            "bitmap_linear": lambda i, x=x: bitmap_linear(x, *maps[i % len(maps)]),
            "F.linear fp32": lambda i, x=x: F.linear(x, dense[i % len(dense)]),
        }
        if dtype == torch.bfloat16:
            functions["bitmap_linear, bf16 in"] = lambda i, x=x16: bitmap_linear(x, *maps[i % len(maps)])
            functions["F.linear bf16"] = lambda i, x=x16: F.linear(x, half[i % len(half)])
        repeats = 5 if n * k * m > 1 << 29 else 15
        rows.append(Row(f"M={m} N={n} K={k}", time_interleaved(functions, repeats), moved, 2 * m * kept, "fp32"))
    name = str(dtype).removeprefix("torch.")
    print_rows("bitmap_linear", rows, "bitmap_linear", f"{sparsity:.0%} pruned, {name} values, {why}")


def bench_training(n: int, k: int, sparsity: float, why: str) -> None:
    """Forward and back, with gradients for input and weight: the bitmap's values, or all of the dense weight."""
    bitmask, row_offsets, values = bitmap(n, k, sparsity, torch.float32)
    values.requires_grad_()
    dense = torch.randn(n, k, requires_grad=True)
    rows = []
    for m in (64, 256, 1024):
        x, grad = torch.randn(m, k, requires_grad=True), torch.randn(m, n)
        functions = {
            "bitmap_linear": lambda i, x=x, grad=grad: torch.autograd.grad(
                bitmap_linear(x, bitmask, row_offsets, values), (x, values), grad
            ),
            "F.linear fp32": lambda i, x=x, grad=grad: torch.autograd.grad(F.linear(x, dense), (x, dense), grad),
        }
        moved = 3 * (n * k // 8 + 4 * len(values))
        rows.append(Row(f"M={m} N={n} K={k}", time_interleaved(functions, 15), moved, 6 * m * len(values), "fp32"))
    print_rows("bitmap_linear", rows, "bitmap_linear", f"{sparsity:.0%} pruned, forward and back, {why}")


def main() -> None:
    for (n, k), why in WEIGHTS.items():
        for sparsity in (0.5, 0.8):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                bench(n, k, sparsity, dtype, why)
    for sparsity in (0.5, 0.7, 0.9):
        bench_training(1536, 384, sparsity, "MiniLM's, cached")


if __name__ == "__main__":
    main()

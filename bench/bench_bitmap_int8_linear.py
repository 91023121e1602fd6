"""bitmap_int8_linear against the dense int8_linear, torch's own int8 linears and float32 F.linear.

Weights rotate beyond the caches where they are read once a call. `GB/s` is of the bitmap: its masks and values.
"""

import torch
from torch import nn

from engine.bench.common import Row, copies, print_rows, time_interleaved
from engine.bench.peers import int8_linears
from engine.ops import bitmap_int8_linear, int8_linear, int8_quantize
from engine.ops._bitmap import pack_mask

SHAPES = [  # M, N, K, sparsity
    *((1, 8192, 8192, s) for s in (0.5, 0.7, 0.8)),
    *((1, 4096, 11008, s) for s in (0.5, 0.7, 0.8)),
    *((m, 8192, 8192, s) for m in (4, 16, 64) for s in (0.5, 0.7, 0.8)),
    *((1024, n, k, 0.5) for n, k in ((384, 384), (1536, 384), (384, 1536))),
    *((m, 384, 384, 0.5) for m in (1, 4, 16)),
]


def bitmap_of(weight: torch.Tensor, sparsity: float) -> tuple[torch.Tensor, ...]:
    """The weight with a random share of it kept, as arguments of the op."""
    keep = torch.rand(weight.shape) >= sparsity
    row_offsets = torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0))
    q, scale = int8_quantize(weight * keep)
    return pack_mask(keep), row_offsets, q[keep], scale


def measure(m: int, n: int, k: int, sparsity: float, repeats: int) -> Row:
    x, count = torch.randn(m, k), min(3, copies(n * k)) if m <= 64 else 1
    moved = int(n * k * (1 - sparsity) + n * k / 8)
    more = copies(moved, 128 << 20) if moved > 8 << 20 else count  # beyond any cache, but for what stays in one anyway
    linears = [nn.Linear(k, n) for _ in range(count)]
    bias = linears[0].bias.detach()
    bitmaps = [bitmap_of(linears[i % count].weight.detach(), sparsity) for i in range(more)]
    dense = [int8_quantize(linear.weight.detach()) for linear in linears]
    peers = [int8_linears(linear, m) for linear in linears]
    functions = {
        "bitmap_int8_linear": lambda i: bitmap_int8_linear(x, *bitmaps[i % more], bias),
        "int8_linear": lambda i: int8_linear(x, *dense[i % count], bias),
    }
    for name in peers[0]:
        functions[name] = lambda i, name=name: peers[i % count][name](x)
    functions["fp32"] = lambda i: linears[i % count](x)
    with torch.inference_mode():
        timings = time_interleaved(functions, repeats)
    traffic = "read" if moved * more > 48 << 20 else "cache"
    return Row(f"M {m}, {n}x{k}, {sparsity:.0%}", timings, moved, 2 * m * n * k, "int8", traffic, sparsity)


def main() -> None:
    torch.manual_seed(0)
    rows = [measure(*shape, max(9, min(101, int(2e9 / (shape[0] * shape[1] * shape[2] + 1e6))))) for shape in SHAPES]
    print_rows("bitmap_int8_linear", rows, own="bitmap_int8_linear")


if __name__ == "__main__":
    main()

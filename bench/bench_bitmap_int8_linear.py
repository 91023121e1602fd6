"""bitmap_int8_linear against the dense int8_linear, torch's own int8 linears and float32 F.linear.

Weights rotate beyond the caches where they are read once a call. `GB/s` is of the bitmap: its masks and values.
"""

import argparse

import torch
from bench_int8_linear import dynamic_int8
from common import print_rows, rotated, time_interleaved
from torch import nn

from engine.ops import int8_quantize
from engine.ops._bitmap import pack_mask
from engine.ops.bitmap_int8_linear import bitmap_int8_linear
from engine.ops.int8_linear import int8_linear

SHAPES = [  # M, N, K, sparsity
    *((1, 8192, 8192, s) for s in (0.5, 0.7, 0.8)),
    *((1, 4096, 11008, s) for s in (0.5, 0.7, 0.8)),
    *((m, 8192, 8192, 0.5) for m in (2, 4, 8, 16, 32, 64)),
    *((1024, n, k, 0.5) for n, k in ((384, 384), (1536, 384), (384, 1536))),
    *((m, 384, 384, 0.5) for m in (1, 4, 16)),
]


def bitmap_of(weight: torch.Tensor, sparsity: float) -> tuple[torch.Tensor, ...]:
    """The weight with a random share of it kept, as arguments of the op."""
    keep = torch.rand(weight.shape) >= sparsity
    row_offsets = torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0))
    q, scale = int8_quantize(weight * keep)
    return pack_mask(keep), row_offsets, q[keep], scale


def measure(m: int, n: int, k: int, sparsity: float, repeats: int) -> dict[str, float]:
    x, count = torch.randn(m, k), min(5, len(rotated(lambda: None, n * k))) if m <= 64 else 1
    linears = [nn.Linear(k, n) for _ in range(min(count, 2))]
    bitmap, bias = bitmap_of(linears[0].weight.detach(), sparsity), linears[0].bias.detach()
    bitmaps = [tuple(t.clone() for t in bitmap) for _ in range(count)]
    dense = [tuple(t.clone() for t in int8_quantize(linears[0].weight.detach())) for _ in range(count)]
    functions = {
        "bitmap_int8_linear": lambda i: bitmap_int8_linear(x, *bitmaps[i % count], bias),
        "int8_linear": lambda i: int8_linear(x, *dense[i % count], bias),
    }
    for name in (e for e in ("fbgemm", "x86", "onednn") if e in torch.backends.quantized.supported_engines):
        peers = [dynamic_int8(linears[i % len(linears)], name) for i in range(min(count, 4))]

        def run(i: int, name: str = name, peers: list = peers) -> torch.Tensor:
            torch.backends.quantized.engine = name
            return peers[i % len(peers)](x)

        functions[name] = run
    if m == 1:
        functions["weight_int8pack_mm"] = lambda i: torch._weight_int8pack_mm(x, *dense[i % count])
    functions["fp32"] = lambda i: linears[i % len(linears)](x)
    with torch.inference_mode():
        return time_interleaved(functions, repeats)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the shapes to run")
    only = parser.parse_args().only
    torch.manual_seed(0)
    rows = []
    for m, n, k, sparsity in SHAPES if only is None else [SHAPES[i] for i in only]:
        repeats = max(15, min(201, int(6e9 / (m * n * k + 1e6))))
        moved = int(n * k * (1 - sparsity) + n * k / 8)
        rows.append((f"M {m}, {n}x{k}, {sparsity:.0%}", measure(m, n, k, sparsity, repeats), moved))
    print_rows("bitmap_int8_linear", rows, own="bitmap_int8_linear")


if __name__ == "__main__":
    main()

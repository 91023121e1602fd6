"""int8_linear against float32 and bf16 F.linear and the int8 linears of others."""

import torch
from torch import nn

from engine.bench.common import Row, copies, print_rows, relative_errors, time_interleaved
from engine.bench.peers import int8_linears
from engine.ops import int8_linear, int8_quantize

WEIGHTS = ((384, 384), (1536, 384), (384, 1536), (4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192))  # N, K
SHAPES = [  # M, N, K
    *((1024, n, k) for n, k in WEIGHTS[:4]),
    *((128, n, k) for n, k in WEIGHTS[:6]),
    *((m, n, k) for n, k in WEIGHTS for m in (1, 4, 16)),
    *((m, 4096, 4096) for m in (2, 8, 32, 64)),
]


def measure(m: int, n: int, k: int, repeats: int) -> Row:
    """Weights rotate beyond the caches where they are read once a call; for large M they are one copy."""
    x, count = torch.randn(m, k), min(6, copies(n * k, 96 << 20)) if m <= 32 else 1
    linears = [nn.Linear(k, n) for _ in range(count)]
    own = [(*int8_quantize(linear.weight.detach()), linear.bias.detach()) for linear in linears]
    peers = [int8_linears(linear, m) for linear in linears]
    functions = {"int8_linear": lambda i: int8_linear(x, *own[i % count])}
    for name in peers[0]:
        functions[name] = lambda i, name=name: peers[i % count][name](x)
    functions["fp32"] = lambda i: linears[i % count](x)
    with torch.inference_mode():
        weight, bias = linears[0].weight.double(), linears[0].bias.double()
        errors = relative_errors(functions, nn.functional.linear(x.double(), weight, bias))
        timings = time_interleaved(functions, repeats)
    moved = n * k + 4 * m * (n + k)
    return Row(
        f"M {m}, N {n}, K {k}",
        timings,
        moved,
        2 * m * n * k,
        traffic="read" if n * k * count > 48 << 20 else "cache",
        errors=errors,
    )


def main() -> None:
    torch.manual_seed(0)
    rows = [measure(m, n, k, max(7, min(101, int(1e9 / (m * n * k + 1e6))))) for m, n, k in SHAPES]
    print_rows("int8_linear", rows, own="int8_linear")


if __name__ == "__main__":
    main()

"""Block-sparse float weights beside the dense product of PyTorch."""

import torch
import torch.nn.functional as F

from engine import ops
from engine.bench.common import Row, print_rows, time_interleaved

SHAPES = [(1, 2048, 2048), (64, 2048, 2048)]


def measure(m: int, n: int, k: int, sparsity: float) -> Row:
    weight, x = torch.randn(n, k), torch.randn(m, k)
    blocks = ops.prune_to_block(weight, keep=torch.rand(n // 32, k // 32) >= sparsity)
    functions = {
        "block_linear": lambda i: ops.block_linear(x, *blocks, n),
        "fp32": lambda i: F.linear(x, weight),
    }
    with torch.inference_mode():
        timings = time_interleaved(functions, 11)
    kept = blocks[2].numel()
    return Row(f"M {m}, {n}x{k}, {sparsity:.0%}", timings, 4 * kept, 2 * m * kept, "fp32", "cache", sparsity)


def main() -> None:
    torch.manual_seed(0)
    rows = [measure(*shape, sparsity) for shape in SHAPES for sparsity in (0.5, 0.9)]
    print_rows("block_linear", rows, own="block_linear", note="blocks of 32x32")


if __name__ == "__main__":
    main()

"""Block-sparse int8 weights beside the dense int8 weight, over sparsity."""

import torch

from engine import ops
from engine.bench.common import Row, print_rows, time_interleaved

SHAPES = [(1, 4096, 4096), (64, 4096, 4096), (256, 4096, 4096)]
SPARSITIES = (0.5, 0.7, 0.9)


def measure(m: int, n: int, k: int, sparsity: float) -> Row:
    weight, x = torch.randn(n, k), torch.randn(m, k)
    q, scale = ops.int8_quantize(weight)
    keep = torch.rand(n // 32, k // 32) >= sparsity
    blocks = ops.prune_to_block(q, keep=keep)
    functions = {
        "block_int8_linear": lambda i: ops.block_int8_linear(x, *blocks, scale),
        "int8_linear": lambda i: ops.int8_linear(x, q, scale),
    }
    with torch.inference_mode():
        timings = time_interleaved(functions, 11)
    kept = blocks[2].numel()
    return Row(f"M {m}, {n}x{k}, {sparsity:.0%}", timings, kept, 2 * m * kept, "int8", "cache", sparsity)


def measure_training(m: int, n: int, k: int, sparsity: float) -> Row:
    """Forward and back, with the gradient for the input."""
    x, grad = torch.randn(m, k, requires_grad=True), torch.randn(m, n)
    q, scale = ops.int8_quantize(torch.randn(n, k))
    blocks = ops.prune_to_block(q, keep=torch.rand(n // 32, k // 32) >= sparsity)
    functions = {
        "block_int8_linear": lambda i: torch.autograd.grad(ops.block_int8_linear(x, *blocks, scale), x, grad),
        "int8_linear": lambda i: torch.autograd.grad(ops.int8_linear(x, q, scale), x, grad),
    }
    operations = 2 * m * n * k  # of the product with the dense weight, which takes longer than that of integers
    return Row(f"M {m}, {n}x{k}, {sparsity:.0%}", time_interleaved(functions, 11), n * k, operations, "fp32", "cache")


def main() -> None:
    torch.manual_seed(0)
    rows = [measure(*shape, sparsity) for shape in SHAPES for sparsity in SPARSITIES]
    print_rows("block_int8_linear", rows, own="block_int8_linear", note="blocks of 32x32")
    rows = [measure_training(64, 4096, 4096, sparsity) for sparsity in SPARSITIES]
    print_rows("block_int8_linear", rows, own="block_int8_linear", note="blocks of 32x32, forward and back")


if __name__ == "__main__":
    main()

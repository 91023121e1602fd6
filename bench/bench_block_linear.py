"""Block-sparse float weights beside the dense product of PyTorch."""

import torch
import torch.nn.functional as F

from engine import ops
from engine.bench.common import Row, print_rows, time_interleaved

SHAPES = [(1, 2048, 2048), (64, 2048, 2048), (512, 1536, 384), (512, 2048, 2048)]
TRAINING_SHAPES = [(64, 4096, 4096), (512, 4096, 4096)]


def measure(m: int, n: int, k: int, sparsity: float, dtype: torch.dtype) -> Row:
    weight, x = torch.randn(n, k).to(dtype), torch.randn(m, k).to(dtype)
    blocks = ops.prune_to_block(weight, keep=torch.rand(n // 32, k // 32) >= sparsity)
    name = "fp32" if dtype == torch.float32 else "bf16"
    functions = {
        "block_linear": lambda i: ops.block_linear(x, *blocks, n),
        f"F.linear {name}": lambda i: F.linear(x, weight),
    }
    with torch.inference_mode():
        timings = time_interleaved(functions, 11)
    kept = blocks[2].numel()
    case = f"M {m}, {n}x{k}, {sparsity:.0%}, {name}"
    return Row(case, timings, dtype.itemsize * kept, 2 * m * kept, name, "cache", sparsity)


def measure_training(m: int, n: int, k: int, sparsity: float) -> Row:
    """Forward and back, with gradients for input and weight: the kept blocks, or all of the dense weight."""
    x, grad = torch.randn(m, k, requires_grad=True), torch.randn(m, n)
    dense = torch.randn(n, k, requires_grad=True)
    keep = torch.rand(n // 32, k // 32) >= sparsity
    crow_indices, col_indices, values = ops.prune_to_block(dense.detach(), keep=keep)
    values.requires_grad_()
    functions = {
        "block_linear": lambda i: torch.autograd.grad(
            ops.block_linear(x, crow_indices, col_indices, values, n), (x, values), grad
        ),
        "F.linear fp32": lambda i: torch.autograd.grad(F.linear(x, dense), (x, dense), grad),
    }
    kept = values.numel()
    return Row(f"M {m}, {n}x{k}", time_interleaved(functions, 11), 12 * kept, 6 * m * kept, "fp32", "cache")


def main() -> None:
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16)
    rows = [measure(*shape, sparsity, dtype) for shape in SHAPES for dtype in dtypes for sparsity in (0.5, 0.7, 0.9)]
    print_rows("block_linear", rows, own="block_linear", note="blocks of 32x32")
    for sparsity in (0.5, 0.7, 0.9):
        rows = [measure_training(*shape, sparsity) for shape in TRAINING_SHAPES]
        print_rows("block_linear", rows, own="block_linear", note=f"{sparsity:.0%} pruned, forward and back")


if __name__ == "__main__":
    main()

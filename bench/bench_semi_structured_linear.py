"""2:4 float weights beside a bitmap of the same sparsity and PyTorch's dense products."""

import torch
import torch.nn.functional as F

from engine import ops
from engine.bench.common import Row, copies, print_rows, time_interleaved

SHAPES = [(1, 8192, 8192), (1, 4096, 11008), (8, 4096, 4096)]
TRAINING_SHAPES = [(64, 4096, 4096), (512, 4096, 4096)]


def measure(m: int, n: int, k: int, dtype: torch.dtype) -> Row:
    weight, x = torch.randn(n, k), torch.randn(m, k)
    size = torch.empty((), dtype=dtype).element_size()
    moved = n * k * size // 2 + n * k // 8
    count = copies(moved)
    values, metadata = ops.prune_to_semi_structured(weight.to(dtype))
    semi = [(values.clone(), metadata.clone()) for _ in range(count)]
    bitmask, row_offsets, kept = ops.prune_to_bitmap(weight.to(dtype), ops.magnitude_threshold(weight, 0.5))
    bitmap = [(bitmask.clone(), row_offsets, kept.clone()) for _ in range(count)]
    half, x_half = weight.bfloat16(), x.bfloat16()
    functions = {
        "semi_structured_linear": lambda i: ops.semi_structured_linear(x, *semi[i % count]),
        "bitmap_linear": lambda i: ops.bitmap_linear(x, *bitmap[i % count]),
        "bf16": lambda i: F.linear(x_half, half),
        "fp32": lambda i: F.linear(x, weight),
    }
    with torch.inference_mode():
        timings = time_interleaved(functions, 11)
    return Row(f"M {m}, {n}x{k}, {str(dtype)[6:]}", timings, moved, m * n * k, "fp32", "read")


def measure_training(m: int, n: int, k: int) -> Row:
    """Forward and back, with gradients for input and weight: the kept two of four, or all of the dense weight."""
    x, grad = torch.randn(m, k, requires_grad=True), torch.randn(m, n)
    dense = torch.randn(n, k, requires_grad=True)
    values, metadata = ops.prune_to_semi_structured(dense.detach())
    values.requires_grad_()
    functions = {
        "semi_structured_linear": lambda i: torch.autograd.grad(
            ops.semi_structured_linear(x, values, metadata), (x, values), grad
        ),
        "F.linear fp32": lambda i: torch.autograd.grad(F.linear(x, dense), (x, dense), grad),
    }
    moved = 3 * (n * k // 8 + 2 * n * k)
    return Row(f"M {m}, {n}x{k}", time_interleaved(functions, 11), moved, 3 * m * n * k, "fp32")


def main() -> None:
    torch.manual_seed(0)
    rows = [measure(*shape, dtype) for shape in SHAPES for dtype in (torch.bfloat16, torch.float32)]
    print_rows("semi_structured_linear", rows, own="semi_structured_linear", note="weights from memory")
    rows = [measure_training(*shape) for shape in TRAINING_SHAPES]
    print_rows("semi_structured_linear", rows, own="semi_structured_linear", note="forward and back")


if __name__ == "__main__":
    main()

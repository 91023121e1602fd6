"""2:4 int8 weights beside a bitmap of the same sparsity and the dense int8 and float32 weight."""

import torch

from engine import ops
from engine.bench.common import Row, copies, print_rows, time_interleaved

SHAPES = [(1, 8192, 8192), (1, 4096, 11008), (4, 4096, 4096), (16, 4096, 4096), (128, 4096, 4096)]


def measure(m: int, n: int, k: int, repeats: int) -> Row:
    count = copies(5 * n * k // 8)
    weight, x = torch.randn(n, k), torch.randn(m, k)
    linear = torch.nn.Linear(k, n, bias=False)
    values, metadata = ops.prune_to_semi_structured(weight)
    q, scale = ops.int8_quantize(values)
    semi = [(q.clone(), metadata.clone(), scale) for _ in range(count)]
    packed = ops.prune_quantize_to_bitmap(weight, ops.magnitude_threshold(weight, 0.5))
    bitmap = [tuple(t.clone() for t in packed) for _ in range(count)]
    q, scale = ops.int8_quantize(weight)
    dense = [(q.clone(), scale) for _ in range(count)]
    functions = {
        "semi_structured_int8_linear": lambda i: ops.semi_structured_int8_linear(x, *semi[i % count]),
        "bitmap_int8_linear": lambda i: ops.bitmap_int8_linear(x, *bitmap[i % count]),
        "int8_linear": lambda i: ops.int8_linear(x, *dense[i % count]),
        "fp32": lambda i: linear(x),
    }
    with torch.inference_mode():
        timings = time_interleaved(functions, repeats)
    return Row(f"M {m}, {n}x{k}", timings, 5 * n * k // 8, m * n * k, "int8", "read")


def measure_training(m: int, n: int, k: int) -> Row:
    """Forward and back, with the gradient for the input."""
    x, grad = torch.randn(m, k, requires_grad=True), torch.randn(m, n)
    weight = torch.randn(n, k)
    values, metadata = ops.prune_to_semi_structured(weight)
    semi, dense = ops.int8_quantize(values), ops.int8_quantize(weight)
    functions = {
        "semi_structured_int8_linear": lambda i: torch.autograd.grad(
            ops.semi_structured_int8_linear(x, semi[0], metadata, semi[1]), x, grad
        ),
        "int8_linear": lambda i: torch.autograd.grad(ops.int8_linear(x, *dense), x, grad),
    }
    operations = 2 * m * n * k  # of the product with the dense weight, which takes longer than that of integers
    return Row(f"M {m}, {n}x{k}", time_interleaved(functions, 11), 5 * n * k // 8, operations, "fp32")


def main() -> None:
    torch.manual_seed(0)
    rows = [measure(*shape, 15) for shape in SHAPES]
    print_rows("semi_structured_int8_linear", rows, own="semi_structured_int8_linear", note="weights from memory")
    rows = [measure_training(m, 4096, 4096) for m in (64, 512)]
    print_rows("semi_structured_int8_linear", rows, own="semi_structured_int8_linear", note="forward and back")


if __name__ == "__main__":
    main()

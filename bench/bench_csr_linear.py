"""csr_linear against PyTorch's own sparse product (which takes x transposed, and beforehand here) and nn.Linear."""

import warnings

import torch

from engine.bench.common import Row, print_rows, rotated, time_interleaved
from engine.ops import csr_linear, prune_to_csr

SHAPES = [(1, 4096, 4096), (4, 4096, 4096), (16, 4096, 4096), (128, 4096, 4096), (1, 4096, 11008), (128, 4096, 11008)]
THRESHOLDS = {0.95: 1.96, 0.99: 2.5758}  # of standard normal weights, by sparsity


def measure(m: int, n: int, k: int, sparsity: float) -> Row:
    x, bytes_each = torch.randn(m, k), int(8 * n * k * (1 - sparsity))
    xt = x.T.contiguous()
    weight = prune_to_csr(torch.randn(n, k), THRESHOLDS[sparsity])
    buffers = rotated(lambda: [t.clone() for t in weight], bytes_each)
    matrices = [torch.sparse_csr_tensor(*tensors, (n, k)) for tensors in buffers]
    dense = torch.randn(n, k)
    peers = {
        "engine": lambda i: csr_linear(x, *buffers[i % len(buffers)]),
        "sparse_csr @ x.T": lambda i: matrices[i % len(buffers)] @ xt,
        "dense linear": lambda i: torch.nn.functional.linear(x, dense),
    }
    moved, operations = bytes_each + 4 * m * (n + k), int(2 * m * n * k * (1 - sparsity))
    return Row(f"{m}x{n}x{k} {sparsity:.0%}", time_interleaved(peers, 9), moved, operations, "fp32")


def main() -> None:
    warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks)")
    print_rows("csr_linear", [measure(*shape, sparsity) for shape in SHAPES for sparsity in THRESHOLDS], "engine")


if __name__ == "__main__":
    main()

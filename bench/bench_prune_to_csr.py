"""prune_to_csr against what PyTorch offers for the same end, and against a plain copy of the weight."""

import torch

from engine.bench.common import Row, print_rows, rotated, time_interleaved
from engine.ops import prune_to_csr

SHAPES = [(384, 1536), (1024, 4096), (4096, 11008)]
THRESHOLDS = {0.5: 0.6745, 0.9: 1.6449, 0.99: 2.5758}  # of standard normal weights, by sparsity


def measure(shape: tuple[int, int], dtype: torch.dtype, sparsity: float) -> Row:
    threshold, size = THRESHOLDS[sparsity], shape[0] * shape[1]
    buffers = rotated(lambda: torch.randn(shape).to(dtype), size * dtype.itemsize)

    def pick(i: int) -> torch.Tensor:
        return buffers[i % len(buffers)]

    peers = {
        "engine": lambda i: prune_to_csr(pick(i), threshold),
        "clone": lambda i: pick(i).clone(),
        "where, to_sparse_csr": lambda i: torch.where(pick(i).abs() > threshold, pick(i), 0.0).to_sparse_csr(),
    }
    moved = int(size * (dtype.itemsize + (1 - sparsity) * (dtype.itemsize + 4)))  # read once, written once
    name = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')} {sparsity:.0%}"
    return Row(name, time_interleaved(peers, 5), moved, traffic="copy")


def main() -> None:
    rows = [measure(shape, torch.float32, sparsity) for shape in SHAPES for sparsity in THRESHOLDS]
    rows += [measure(shape, torch.bfloat16, 0.5) for shape in SHAPES]
    print_rows("prune_to_csr", rows, "engine")


if __name__ == "__main__":
    main()

"""Unpacking blocks beside a copy of the dense weight."""

import torch

from engine import ops
from engine.bench.common import Row, print_rows, time_interleaved


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for sparsity in (0.5, 0.9):
        keep = torch.rand(128, 128) >= sparsity
        blocks = ops.prune_to_block(torch.randn(4096, 4096), keep=keep)
        dense = ops.block_to_dense(*blocks, 4096, 4096)
        functions = {
            "block_to_dense": lambda i, b=blocks: ops.block_to_dense(*b, 4096, 4096),
            "clone": lambda i, d=dense: d.clone(),
        }
        moved = blocks[2].nbytes + dense.nbytes
        rows.append(Row(f"4096x4096 {sparsity:.0%}", time_interleaved(functions), moved, traffic="copy"))
    print_rows("block_to_dense", rows, own="block_to_dense")


if __name__ == "__main__":
    main()

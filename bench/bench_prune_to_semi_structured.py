"""Packing to 2:4 beside a copy."""

import torch

from engine import ops
from engine.bench.common import Row, print_rows, time_interleaved


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(4096, 4096).to(dtype)
        functions = {
            "prune_to_semi_structured": lambda i, w=weight: ops.prune_to_semi_structured(w),
            "clone": lambda i, w=weight: w.clone(),
        }
        moved = weight.nbytes * 3 // 2 + weight.numel() // 8
        rows.append(Row(f"4096x4096 {str(dtype)[6:]}", time_interleaved(functions), moved, traffic="copy"))
    print_rows("prune_to_semi_structured", rows, own="prune_to_semi_structured")


if __name__ == "__main__":
    main()

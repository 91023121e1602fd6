"""Packing blocks, their norms included, beside a copy."""

import torch

from engine import ops
from engine.bench.common import Row, print_rows, time_interleaved


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(4096, 4096).to(dtype)
        functions = {
            "prune_to_block": lambda i, w=weight: ops.prune_to_block(w, 1.0),
            "clone": lambda i, w=weight: w.clone(),
        }
        rows.append(Row(f"4096x4096 {str(dtype)[6:]}", time_interleaved(functions), 3 * weight.nbytes, traffic="copy"))
    print_rows("prune_to_block", rows, own="prune_to_block")


if __name__ == "__main__":
    main()

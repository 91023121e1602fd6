"""Unpacking 2:4 beside a copy of the dense weight."""

import torch

from engine import ops
from engine.bench.common import Row, print_rows, time_interleaved


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.float32, torch.int8):
        values, metadata = ops.prune_to_semi_structured(torch.randn(4096, 4096) * 40)
        values = values.to(dtype)
        dense = ops.semi_structured_to_dense(values, metadata, 4096)
        functions = {
            "semi_structured_to_dense": lambda i, v=values, m=metadata: ops.semi_structured_to_dense(v, m, 4096),
            "clone": lambda i, d=dense: d.clone(),
        }
        moved = values.nbytes + metadata.nbytes + dense.nbytes
        rows.append(Row(f"4096x4096 {str(dtype)[6:]}", time_interleaved(functions), moved, traffic="copy"))
    print_rows("semi_structured_to_dense", rows, own="semi_structured_to_dense")


if __name__ == "__main__":
    main()

"""threshold_prune against what PyTorch offers for the same end, and against a plain copy of the weight."""

import torch

from engine.bench.common import Row, print_rows, rotated, time_interleaved
from engine.ops import threshold_prune

SHAPES = [(384, 1536), (1024, 4096), (4096, 11008)]
THRESHOLD = 0.6745  # prunes half of standard normal weights


def measure(shape: tuple[int, int], dtype: torch.dtype, by_row: bool) -> Row:
    threshold = torch.full((shape[0], 1) if by_row else (), THRESHOLD)
    bytes_each = shape[0] * shape[1] * dtype.itemsize
    buffers = rotated(lambda: torch.randn(shape).to(dtype), bytes_each)

    def pick(i: int) -> torch.Tensor:
        return buffers[i % len(buffers)]

    peers = {
        "engine": lambda i: threshold_prune(pick(i), threshold),
        "clone": lambda i: pick(i).clone(),
        "where": lambda i: torch.where(pick(i).abs() > threshold, pick(i), 0.0),
    }
    if not by_row:
        peers["hardshrink"] = lambda i: torch.nn.functional.hardshrink(pick(i), THRESHOLD)
    name = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}{' by row' if by_row else ''}"
    return Row(name, time_interleaved(peers, 9), 2 * bytes_each, traffic="copy")


def main() -> None:
    rows = [measure(shape, dtype, False) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    rows += [measure(shape, torch.float32, True) for shape in SHAPES]
    print_rows("threshold_prune", rows, "engine")


if __name__ == "__main__":
    main()

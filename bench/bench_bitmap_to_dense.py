"""bitmap_to_dense and its gradient's gather against masked_scatter and indexing, and against a copy of the result."""

import torch

from engine.bench.common import Row, print_rows, rotated, time_interleaved
from engine.ops._bitmap import bitmap_mask
from engine.ops.bitmap_to_dense import bitmap_to_dense
from engine.ops.prune_to_bitmap import prune_to_bitmap

SHAPES = [(384, 1536), (1024, 4096), (4096, 11008)]
THRESHOLDS = {0.5: 0.6745, 0.9: 1.6449}  # of standard normal weights, by sparsity


def measure(shape: tuple[int, int], dtype: torch.dtype, sparsity: float) -> list[Row]:
    size = shape[0] * shape[1]

    def make() -> tuple[torch.Tensor, ...]:
        bitmask, row_offsets, values = prune_to_bitmap(torch.randn(shape), THRESHOLDS[sparsity])
        values = (values * 20).to(dtype)
        dense = bitmap_to_dense(bitmask, row_offsets, values, shape[1])
        return bitmask, row_offsets, values, dense, bitmap_mask(bitmask, shape[1])

    buffers = rotated(make, size * dtype.itemsize, 96 << 20)

    def pick(i: int) -> tuple[torch.Tensor, ...]:
        return buffers[i % len(buffers)]

    def scatter(i: int) -> torch.Tensor:
        _, _, values, dense, mask = pick(i)
        return torch.zeros_like(dense).masked_scatter_(mask, values)

    def gather(i: int) -> torch.Tensor:
        bitmask, row_offsets, values, dense, _ = pick(i)
        return torch.ops.engine.bitmap_gather(dense, bitmask, row_offsets, values.shape[0])

    name = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')} {sparsity:.0%}"
    moved = int(size * (dtype.itemsize * (2 - sparsity) + 1 / 8))
    forward = {
        "engine": lambda i: bitmap_to_dense(*pick(i)[:3], shape[1]),
        "clone of the result": lambda i: pick(i)[3].clone(),
        "masked_scatter_, mask given": scatter,
    }
    rows = [Row(name, time_interleaved(forward, 7), moved, traffic="copy")]
    if dtype.is_floating_point:
        backward = {"engine": gather, "grad[mask], mask given": lambda i: pick(i)[3][pick(i)[4]]}
        rows.append(Row(f"{name} gather", time_interleaved(backward, 7), moved, traffic="copy"))
    return rows


def main() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.int8)
    rows = [row for shape in SHAPES for dtype in dtypes for row in measure(shape, dtype, 0.5)]
    rows += measure(SHAPES[-1], torch.float32, 0.9)
    print_rows("bitmap_to_dense", rows, "engine")


if __name__ == "__main__":
    main()

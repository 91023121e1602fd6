"""prune_quantize_to_bitmap against PyTorch by steps, int8_quantize alone, and a plain copy of the weight."""

import torch

from engine.bench.common import Row, print_rows, rotated, time_interleaved
from engine.ops.int8_quantize import int8_quantize
from engine.ops.prune_quantize_to_bitmap import prune_quantize_to_bitmap

SHAPES = [(384, 1536), (1024, 4096), (4096, 11008)]
THRESHOLDS = {0.5: 0.6745, 0.75: 1.1503, 0.9: 1.6449}  # of standard normal weights, by sparsity


def by_steps(weight: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch alone, and even so without the bitmask: prune, scale, round, gather."""
    keep = weight.abs() > threshold
    pruned = torch.where(keep, weight, 0.0).float()
    scale = pruned.abs().amax(-1, keepdim=True) / 127
    return (pruned / scale).round().to(torch.int8)[keep], scale


def measure(shape: tuple[int, int], dtype: torch.dtype, sparsity: float) -> Row:
    threshold, size = THRESHOLDS[sparsity], shape[0] * shape[1]
    buffers = rotated(lambda: torch.randn(shape).to(dtype), size * dtype.itemsize, 96 << 20)

    def pick(i: int) -> torch.Tensor:
        return buffers[i % len(buffers)]

    peers = {
        "engine": lambda i: prune_quantize_to_bitmap(pick(i), threshold),
        "clone": lambda i: pick(i).clone(),
        "int8_quantize alone": lambda i: int8_quantize(pick(i)),
        "PyTorch by steps": lambda i: by_steps(pick(i), threshold),
    }
    moved = int(size * (dtype.itemsize + 1 - sparsity + 1 / 8))  # the weight read once, the bitmap written
    name = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')} {sparsity:.0%}"
    return Row(name, time_interleaved(peers, 7), moved, traffic="copy")


def main() -> None:
    rows = [measure(shape, dtype, 0.5) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    rows += [measure(SHAPES[-1], torch.float32, sparsity) for sparsity in (0.75, 0.9)]
    print_rows("prune_quantize_to_bitmap", rows, "engine")


if __name__ == "__main__":
    main()

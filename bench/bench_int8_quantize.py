"""int8_quantize against PyTorch's own steps, torch's per-token quantisation, and a plain copy."""

import torch

from engine.bench.common import Row, print_rows, rotated, time_interleaved
from engine.ops import int8_quantize

SHAPES = [(1, 4096), (128, 384), (1024, 1536), (4096, 4096), (4096, 11008)]


def by_steps(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same rows and scales by plain PyTorch."""
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


def measure(shape: tuple[int, int], dtype: torch.dtype) -> Row:
    moved = shape[0] * shape[1] * (dtype.itemsize + 1)
    buffers = rotated(lambda: torch.randn(shape).to(dtype), shape[0] * shape[1] * dtype.itemsize, 96 << 20)

    def pick(i: int) -> torch.Tensor:
        return buffers[i % len(buffers)]

    peers = {
        "engine": lambda i: int8_quantize(pick(i)),
        "clone": lambda i: pick(i).clone(),
        "PyTorch by steps": lambda i: by_steps(pick(i)),
    }
    name = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
    return Row(name, time_interleaved(peers, 15), moved, traffic="copy")


def main() -> None:
    rows = [measure(shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    print_rows("int8_quantize", rows, "engine")


if __name__ == "__main__":
    main()

"""int8_dequantize against PyTorch's own two steps, and against a copy that writes as many bytes."""

import torch

from engine.bench.common import Row, print_rows, rotated, time_interleaved
from engine.ops.int8_dequantize import int8_dequantize

SHAPES = [(384, 384), (1024, 4096), (11008, 4096)]


def measure(shape: tuple[int, int], dtype: torch.dtype) -> Row:
    rows, k = shape
    moved = rows * k * (1 + dtype.itemsize)

    def make() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q = torch.randint(-127, 128, shape, dtype=torch.int8)
        return q, torch.rand(rows), q.to(dtype)

    buffers = rotated(make, moved)

    def pick(i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return buffers[i % len(buffers)]

    seconds = time_interleaved(
        {
            "engine": lambda i: int8_dequantize(*pick(i)[:2], dtype),
            "q.to(dtype) * scale": lambda i: pick(i)[0].to(dtype) * pick(i)[1].unsqueeze(-1).to(dtype),
            "q * scale, to(dtype)": lambda i: (pick(i)[0] * pick(i)[1].unsqueeze(-1)).to(dtype),
            "clone of the result": lambda i: pick(i)[2].clone(),
        }
    )
    return Row(f"{rows}x{k} {str(dtype).removeprefix('torch.')}", seconds, moved, traffic="copy")


def main() -> None:
    rows = [measure(shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    print_rows("int8_dequantize", rows, "engine")


if __name__ == "__main__":
    main()

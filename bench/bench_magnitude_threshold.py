"""magnitude_threshold against sorting, selecting and sampling in PyTorch, and against a plain copy of the weight."""

import torch

from engine.bench.common import Row, print_rows, rotated, time_interleaved
from engine.ops import magnitude_threshold

SHAPES = [(384, 1536), (1024, 4096), (4096, 11008)]
SPARSITY = 0.5
PRUNED = 1.6449  # of standard normal weights, leaves a tenth: pruning what was pruned before


def measure(shape: tuple[int, int], dtype: torch.dtype, scope: str, pruned: bool = False) -> Row:
    bytes_each = shape[0] * shape[1] * dtype.itemsize
    sparsity = 0.95 if pruned else SPARSITY

    def make() -> torch.Tensor:
        weight = torch.randn(shape).to(dtype)
        return torch.where(weight.abs() > PRUNED, weight, 0.0) if pruned else weight

    buffers = rotated(make, bytes_each)
    k = round(sparsity * (shape[0] * shape[1] if scope == "tensor" else shape[1]))

    def pick(i: int) -> torch.Tensor:
        return buffers[i % len(buffers)]

    def kthvalue(i: int) -> torch.Tensor:
        magnitudes = pick(i).abs()
        return (magnitudes.reshape(-1) if scope == "tensor" else magnitudes).kthvalue(k).values

    peers = {
        "engine": lambda i: magnitude_threshold(pick(i), sparsity, scope),
        "clone": lambda i: pick(i).clone(),
        "kthvalue": kthvalue,
    }
    name = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')} {scope}{' 90% zeros' if pruned else ''}"
    return Row(name, time_interleaved(peers, 5), bytes_each)


def main() -> None:
    rows = [
        measure(shape, dtype, scope)
        for scope in ("tensor", "row")
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
    ]
    rows += [measure(SHAPES[-1], dtype, "tensor", pruned=True) for dtype in (torch.float32, torch.bfloat16)]
    print_rows("magnitude_threshold", rows, "engine")


if __name__ == "__main__":
    main()

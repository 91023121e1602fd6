"""int8_fake_quantize against quantising and dequantising in two steps, PyTorch's own, and plain tensor arithmetic."""

import torch

import engine
from engine.bench.common import Row, print_rows, rotated, time_interleaved


def plain(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-127, 127) * scale


def torchs_own(x: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Rounds by given scales, so that the amax has to be taken before."""
    return torch.fake_quantize_per_channel_affine(x, x.abs().amax(-1) / 127, zeros, 0, -127, 127)


def main() -> None:
    rows = []
    for shape in ((1024, 384), (384, 1536), (4096, 4096)):
        buffers = rotated(lambda shape=shape: torch.randn(shape), shape[0] * shape[1] * 4)
        zeros = torch.zeros(shape[0], dtype=torch.int32)
        pick = [buffers[i % len(buffers)] for i in range(64)]
        functions = {
            "int8_fake_quantize": lambda i, p=pick: engine.ops.int8_fake_quantize(p[i]),
            "in two steps": lambda i, p=pick: engine.ops.int8_dequantize(*engine.ops.int8_quantize(p[i])),
            "torch fake_quantize": lambda i, p=pick, z=zeros: torchs_own(p[i], z),
            "plain PyTorch": lambda i, p=pick: plain(p[i]),
        }
        seconds = time_interleaved(functions)
        rows.append(Row(f"{shape[0]}x{shape[1]} float32", seconds, 2 * shape[0] * shape[1] * 4, traffic="copy"))
    print_rows("int8_fake_quantize", rows, "int8_fake_quantize")


if __name__ == "__main__":
    main()

"""CompressedConv2d on a ResNet's layers: int8 and bitmaps beside PyTorch's convolution, channels last and not."""

import functools

import torch
from torch import nn

from engine.bench.common import Row, print_rows, time_interleaved
from engine.formats import Bitmap, DenseInt8
from engine.nn import CompressedConv2d

# Channels in and out, kernel, stride, pixels of a side of the input.
LAYERS = [
    (64, 64, 3, 1, 56),
    (128, 128, 3, 1, 28),
    (512, 512, 3, 1, 7),
    (64, 128, 3, 2, 56),
    (256, 64, 1, 1, 56),
    (256, 512, 1, 2, 56),
    (3, 64, 7, 2, 224),
]


def measure(
    batch: int, channels: int, outputs: int, kernel: int, stride: int, size: int, order: torch.memory_format, n: int
) -> Row:
    dense = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2).requires_grad_(False)
    modules = {"int8": CompressedConv2d.from_dense(dense, DenseInt8)}
    for share in (0.5, 0.8):
        threshold = dense.weight.abs().flatten().kthvalue(max(1, round(share * dense.weight.numel()))).values.item()
        pruned = CompressedConv2d.from_dense(dense, Bitmap, threshold=threshold, values=torch.int8)
        modules[f"bitmap {share:.0%} int8"] = pruned
    x = torch.randn(batch, channels, size, size).contiguous(memory_format=order)
    peers: dict[str, nn.Module] = {**modules, "fp32": dense.to(memory_format=order)}  # type: ignore[call-overload]
    with torch.inference_mode():
        y = dense(x)
        timings = time_interleaved({name: functools.partial(_run, module, x) for name, module in peers.items()}, n)
    operations = 2 * y.numel() * channels * kernel * kernel
    moved = 4 * (x.numel() + y.numel()) + dense.weight.numel()
    return Row(f"{batch}x{channels}x{size}x{size}, {outputs} {kernel}x{kernel}/{stride}", timings, moved, operations)


def _run(module: nn.Module, x: torch.Tensor, number: int) -> torch.Tensor:
    return module(x)


def main() -> None:
    torch.manual_seed(0)
    for order, name in ((torch.channels_last, "channels last"), (torch.contiguous_format, "contiguous (NCHW)")):
        rows = [measure(batch, *layer, order, 15) for batch in (1, 8) for layer in LAYERS]
        print_rows("compressed_conv2d", rows, own="int8", note=name)


if __name__ == "__main__":
    main()

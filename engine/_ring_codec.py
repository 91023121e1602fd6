"""What the ring's codecs send, for ops and kernels: sizes, and the threshold of "bitmap"; `csrc/ring/codec.h` again."""

import math

import torch
from torch import Tensor

BLOCK = 256  # elements that share a scale in "int8"
GROUP = 8  # elements that share a bit of the first bitmask in "bitmap"
HEADER = 8  # bytes before it: how many values follow, and whether all n are NaN
INFINITY_BITS = 0x7F800000


def dense_bytes(codec: str, n: int) -> int:
    """Bytes that `n` elements take by "bf16" or "int8"."""
    return 2 * n if codec == "bf16" else 4 * -(-n // BLOCK) + n


def bitmap_bytes(n: int) -> int:
    """Of "bitmap", those before the values."""
    return HEADER + 8 * -(-n // (64 * GROUP))


def bitmap_capacity(n: int, size: int) -> int:
    """How many values a wire of so many bytes has room for; -1 where `n` elements never make so many."""
    room, groups = size - bitmap_bytes(n), -(-n // GROUP)
    each, shared = (3, 0) if room <= 3 * groups else (2, groups)
    return -1 if room < 0 or (room - shared) % each else (room - shared) // each


def threshold_of(x: Tensor, residual: Tensor | None, density: float) -> Tensor:
    """The magnitude above which about `density` of `x + residual` lies, estimated from one element of each stride.

    Which one looks random, so that no length of rows makes all samples fall into a few columns, and half of the choices
    hang on the other half's values: else what they always miss might never be sent. Where the smallest sample that is
    kept isn't 0, the threshold is one unit in the last place less: else none of many equal values would be kept.
    """
    n = x.numel()
    if n == 0:
        return x.new_zeros(())
    stride = n // math.ceil(min(n, max(1024, 40 / density)))
    samples = -(-n // stride)

    def keys(j: Tensor, seed: Tensor | int) -> Tensor:
        begin = j * stride
        fraction = (j * j + seed & 0xFFFFFFFF) * 0x61C88647 & 0xFFFFFFFF  # the golden ratio's: evenly spread
        places = begin + ((n - begin).clamp(max=stride) * fraction >> 32)
        values = x[places] if residual is None else x[places] + residual[places]
        return values.abs().view(torch.int32).clamp(max=INFINITY_BITS)

    j = torch.arange(samples, device=x.device)
    even = keys(j[::2], 0)
    odd = keys(j[1::2], even.sum())
    key = torch.cat([even, odd]).sort().values[samples - max(1, round(density * samples))]
    return (key - 1).clamp(min=0).view(torch.float32)

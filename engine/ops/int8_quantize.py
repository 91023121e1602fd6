"""int8_quantize: symmetric int8, one scale a row."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._library import define, explained_by

SMALLEST_AMAX = 2.0**-100  # below it a row counts as zero: 127 / amax must not overflow


def _check_arguments(x: Tensor) -> None:
    _check.is_float("int8_quantize", "x", x)
    _check.expect(x.dim() >= 1, "int8_quantize", "x", "at least one dimension", list(x.shape))


def _reference(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_arguments(x)
    values = x.float()
    amax = values.abs().amax(-1) if x.shape[-1] else values.new_zeros(x.shape[:-1])
    finite, zero = amax.isfinite(), amax < SMALLEST_AMAX
    full = torch.full_like(amax, 127)  # `127 / amax` would be 127 * (1 / amax), and `amax / 127` may be on a GPU too
    inverse = torch.where(finite & ~zero, full / amax, 0.0)
    q = (values * inverse.unsqueeze(-1)).round().clamp(-127, 127)
    q = torch.where(finite.unsqueeze(-1), q, 0.0).to(torch.int8)
    scale = torch.where(zero, 1.0, torch.where(finite, amax / full, torch.nan))
    return q, scale


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_arguments(x)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


_op = define("int8_quantize(Tensor x) -> (Tensor q, Tensor scale)", reference=_reference, fake=_fake)


@explained_by(_check_arguments)
def int8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises each row of `x` (its last dimension) symmetrically to int8.

    `scale = amax / 127` in fp32 and `q = clamp(round_half_even(x * (127 / amax)), -127, 127)`, `amax` being the row's
    largest magnitude. A row with `amax < 2**-100` gives `scale = 1, q = 0`; a row that holds a NaN or an infinity
    gives `scale = NaN, q = 0`. The result is the same to the bit on every backend.

    Args:
        x: `[..., K]`, float32, float16 or bfloat16.

    Returns:
        `q`, int8 `[..., K]`, and `scale`, float32 `[...]`.

    Raises:
        TypeError: `x` has another dtype.
        ValueError: `x` has no dimension.
    """
    return _op(x)

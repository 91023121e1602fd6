"""int8_linear: a linear layer whose weight is int8 and whose activations are quantised on the fly."""

import torch
from torch import Tensor

from engine.ops import _check, _scaled_mm  # noqa: F401  (defines the op that its kernels for CUDA call)
from engine.ops._int8_linear import as_tensor, define_int8_linear

OP = "int8_linear"


def _check_metadata(x: Tensor, weight: Tensor, scale: Tensor) -> None:
    _check.is_dtype(OP, "weight", weight, torch.int8)
    _check.is_dtype(OP, "scale", scale, torch.float32)
    _check.has_shape(OP, "weight", weight, ("N", "K"))
    n, k = weight.shape
    _check.expect(x.shape[-1] == k, OP, "x", f"shape [..., {k}]", list(x.shape))
    _check.has_shape(OP, "scale", scale, (n,))


_op, int8_linear_of_patches = define_int8_linear(
    "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, Tensor? input_scale=None) -> Tensor",
    check_metadata=_check_metadata,
    to_dense=lambda weight, rows, columns: weight,
)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | float | None = None,
) -> Tensor:
    """`x @ (weight * scale).T + bias` with `x` quantised to int8, so that the products are of integers.

    Each row of `x` is quantised as by :func:`engine.ops.int8_quantize`, or by `input_scale` where it is given:
    `q = clamp(round_half_even(x * (1 / input_scale)), -127, 127)`. With one scale for each channel (the
    weight then stands for `w * input_scale`) `s_x` is 1. The integer sum is exact for every K, and
    `y = sum * (s_x * s_w) + bias` is evaluated in fp32 in that order, then cast: the same to the bit on every backend.
    A row of `x` that holds a NaN or an infinity makes its row of `y` NaN, and no other; so does, for every row, an
    `input_scale` that is not positive, or it or its reciprocal not finite.

    Has gradients for `x` and `bias`, straight through the quantisation.

    Args:
        x: `[..., K]`, float32, float16 or bfloat16.
        weight: int8 `[N, K]`; any value, -128 too.
        scale: float32 `[N]`.
        bias: `[N]`, float32, float16 or bfloat16.
        input_scale: one scale for all of `x` (static quantisation), a float32 tensor of one element or a float; or
            float32 `[K]`, one for each channel.

    Returns:
        `[..., N]` of the dtype of `x`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: the shapes do not fit.
    """
    return _op(x, weight, scale, bias, as_tensor(input_scale, x))

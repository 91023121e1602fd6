"""int8_fake_quantize: what int8 would make of a float tensor, as floats, with a gradient to train by."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._int8_linear import as_tensor, quantize_by
from engine.ops._library import REFERENCES, define, explained_by
from engine.ops.int8_quantize import int8_quantize  # noqa: F401  (defines the reference that this one builds on)

OP = "int8_fake_quantize"


def _check_arguments(x: Tensor, scale: Tensor | float | None = None) -> None:
    _check.is_float(OP, "x", x)
    _check.expect(x.dim() >= 1, OP, "x", "at least one dimension", list(x.shape))
    if scale is not None and not isinstance(scale, float | int):
        _check.is_dtype(OP, "scale", scale, torch.float32)
        _check.expect(scale.numel() == 1, OP, "scale", "one element", list(scale.shape))


def _reference(x: Tensor, scale: Tensor | None = None) -> Tensor:
    _check_arguments(x, scale)
    q, row_scale = REFERENCES["int8_quantize"](x) if scale is None else quantize_by(x, scale)
    return ((q.float() + 0.0) * row_scale.unsqueeze(-1)).to(x.dtype)  # an int8 zero has no sign


def _fake(x: Tensor, scale: Tensor | None = None) -> Tensor:
    _check_arguments(x, scale)
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    x, scale = inputs
    if scale is not None:  # by a row's own amax nothing is clipped, and nothing need be kept
        ctx.save_for_backward(x, scale)
    ctx.clips = scale is not None


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    """Straight through: rounding counts as the identity, clipping as what it is."""
    if not ctx.clips:
        return grad, None
    x, scale = ctx.saved_tensors
    return torch.where(x.float().abs() <= 127 * scale.reshape(()), grad, 0.0), None


_op = define(
    "int8_fake_quantize(Tensor x, Tensor? scale=None) -> Tensor",
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


@explained_by(_check_arguments)
def int8_fake_quantize(x: Tensor, scale: Tensor | float | None = None) -> Tensor:
    """`int8_dequantize(*int8_quantize(x))` in one pass, for quantisation-aware training.

    Each row is rounded as by :func:`engine.ops.int8_quantize`, or as :func:`engine.ops.int8_linear` does with an
    `input_scale` where `scale` is given: the result is the same to the bit as the two steps, on every backend. A row
    that holds a NaN or an infinity becomes NaN; so does every row under a scale that is not positive, or it or its
    reciprocal not finite.

    The gradient is straight through: that of the identity, and zero where `scale` clips.

    Args:
        x: `[..., K]`, float32, float16 or bfloat16.
        scale: one scale for all of `x`, a float32 tensor of one element or a float; None: each row by its own amax.

    Returns:
        Like `x`.

    Raises:
        TypeError: `x` or `scale` has another dtype.
        ValueError: `x` has no dimension, or `scale` more than one element.
    """
    return _op(x, as_tensor(scale, x))

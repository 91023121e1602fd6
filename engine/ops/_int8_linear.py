"""What the int8 linear ops have in common, whatever the form in which each stores its weight.

Their schema is `op(Tensor x, <the stored tensors>, Tensor scale, Tensor? bias=None, Tensor? input_scale=None)`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._library import REFERENCES
from engine.ops._linear import bias_gradient, check_activations, check_bias
from engine.ops._patches import define_with_patches
from engine.ops.int8_dequantize import int8_dequantize

FLOAT32_MAX = torch.finfo(torch.float32).max


def define_int8_linear(
    schema: str,
    *,
    check_metadata: Callable[..., None],
    to_dense: Callable[..., Tensor],
    check_data: Callable[..., None] | None = None,
    to_dense_quickly: Callable[..., Tensor] | None = None,
) -> tuple[Callable, Callable]:
    """Defines an int8 linear op and its overload for patches.

    Args:
        schema: see above.
        check_metadata: `(x, *stored, scale)`, raises unless their dtypes and shapes fit together. Reads no data.
        to_dense: `(*stored, rows, columns)` to int8 `[N, K]`, in plain PyTorch: the reference builds on it.
        check_data: `(*stored, columns)`, raises unless the data that an op relies on are consistent.
        to_dense_quickly: the same as `to_dense`, by an op with a kernel: for the gradient.

    Returns:
        The op and the overload, both to be called.
    """
    name = schema[: schema.index("(")]
    stored_count = schema[: schema.index("Tensor scale")].count("Tensor ") - 1

    def check_arguments(x: Tensor, *rest: Any, reads_data: bool = True) -> None:
        stored, (scale, bias, input_scale) = split(rest)
        columns = check_activations(name, x)
        check_metadata(x, *stored, scale)
        check_bias(name, bias, scale.shape[0])
        if input_scale is not None and not isinstance(input_scale, float | int):
            _check.is_dtype(name, "input_scale", input_scale, torch.float32)
            fits = input_scale.numel() == 1 or tuple(input_scale.shape) == (columns,)
            expected = f"one element or shape [{columns}]"
            _check.expect(fits, name, "input_scale", expected, list(input_scale.shape))
        if reads_data and check_data is not None:
            check_data(*stored, columns)

    def split(rest: tuple) -> tuple[tuple[Tensor, ...], tuple]:
        """The stored tensors; `scale`, `bias` and `input_scale`, of which PyTorch leaves out those not given."""
        return rest[:stored_count], (*rest[stored_count:], None, None)[:3]

    def reference(x: Tensor, *rest: Any) -> Tensor:
        check_arguments(x, *rest)
        stored, (scale, bias, input_scale) = split(rest)
        q, row_scale = REFERENCES["int8_quantize"](x) if input_scale is None else quantize_by(x, input_scale)
        weight = to_dense(*stored, scale.shape[0], x.shape[-1])
        # float64 holds these sums exactly; rounded once, to fp32. Of one column they may be -0.0, integers not.
        acc = (q.double() @ weight.double().t() + 0.0).float()
        y = acc * (row_scale.unsqueeze(-1) * scale)
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def fake(x: Tensor, *rest: Any) -> Tensor:
        check_arguments(x, *rest, reads_data=False)
        return x.new_empty((*x.shape[:-1], rest[stored_count].shape[0]))

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, *rest = inputs
        stored, (scale, bias, input_scale) = split(tuple(rest))
        channels = [input_scale] if input_scale is not None and input_scale.numel() != 1 else []
        ctx.save_for_backward(*stored, scale, *channels)
        ctx.columns, ctx.dtype, ctx.bias_dtype = x.shape[-1], x.dtype, None if bias is None else bias.dtype

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Straight through the quantisation: as if `x` had been multiplied by the dequantised weight."""
        saved = ctx.saved_tensors  # once: a checkpoint recomputes for one look only
        stored, (scale, *channels) = saved[:stored_count], saved[stored_count:]
        grad, grad_x = grad.float(), None
        if ctx.needs_input_grad[0]:
            weight = (to_dense_quickly or to_dense)(*stored, scale.shape[0], ctx.columns)
            grad_x = grad @ int8_dequantize(weight, scale)
            grad_x = (grad_x / channels[0] if channels else grad_x).to(ctx.dtype)
        nothing = (None,) * (stored_count + 1)
        return grad_x, *nothing, bias_gradient(ctx, grad, place=stored_count + 2), None

    return define_with_patches(
        schema,
        check=check_arguments,
        reference=reference,
        fake=fake,
        backward=backward,
        setup_context=setup_context,
    )


def quantize_by(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """`x` by the one given scale, or by one for each channel: `q` and a scale a row.

    The row's scale is the one given, or 1 where each channel has its own; NaN (and `q` 0) where it is not finite.
    """
    s = input_scale.reshape(()) if input_scale.numel() == 1 else input_scale
    inverse = torch.full_like(s, 1) / s
    usable = ((s > 0) & s.isfinite() & inverse.isfinite()).all()  # by any other scale the result is NaN
    values = x.float()
    finite = values.isfinite().all(-1) & usable
    q = torch.where(finite.unsqueeze(-1), values * inverse, 0.0).round().clamp(-127, 127)
    return q, torch.where(finite, s if s.dim() == 0 else s.new_ones(()), torch.nan)


def as_tensor(input_scale: Tensor | float | None, x: Tensor) -> Tensor | None:
    """A scale that was given as a number, beside `x`; beyond float32's range it is infinity."""
    if input_scale is None or not isinstance(input_scale, float | int):
        return input_scale
    device = getattr(x, "device", None)  # what is no tensor the op refuses by name
    if abs(input_scale) > FLOAT32_MAX:
        return torch.full((), input_scale, dtype=torch.float64, device=device).float()
    return torch.full((), input_scale, dtype=torch.float32, device=device)

"""What the linear ops of sparse float weights have in common, whatever the form in which each stores its weight.

Their schema is `op(Tensor x, <the stored tensors>, <sizes they leave open>, Tensor? bias=None)`. One of the stored
tensors is `values`, the one that has a gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._library import define
from engine.ops._linear import bias_gradient, check_activations, check_bias


def define_float_linear(
    schema: str,
    *,
    check_metadata: Callable[..., None],
    check_data: Callable[..., None],
    row_count: Callable[..., int],
    to_dense: Callable[..., Tensor],
    input_gradient: Callable[..., Tensor],
    values_gradient: Callable[..., Tensor],
) -> Callable:
    """Defines a float linear op.

    Args:
        schema: see above.
        check_metadata: `(*stored, columns)`, raises unless dtypes and shapes fit together. Reads no data. The dtype of
            `values` is checked here.
        check_data: `(*stored, columns)`, raises unless the data that an op relies on are consistent.
        row_count: `(*stored)` to N.
        to_dense: `(*stored, columns)` to float32 `[N, K]`, in plain PyTorch: the reference builds on it.
        input_gradient: `(grad, *stored, columns)` to `grad @ weight`, of the dtype of `grad`.
        values_gradient: `(grad, x, *stored, shape, dtype)`, where `stored` is without `values`, whose shape and dtype
            stand at the end: `grad.T @ x` at the kept places.

    Returns:
        The op, to be called.
    """
    name, arguments = schema.removesuffix(") -> Tensor").split("(")
    names = [argument.split()[1] for argument in arguments.split(", ")]
    stored_count, tensor_count = len(names) - 2, arguments.count("Tensor ") - 1
    place = names.index("values") - 1

    def split(rest: tuple) -> tuple[tuple, Tensor | None]:
        """What is stored, and `bias`, which PyTorch leaves out if it is not given."""
        return rest[:stored_count], (*rest[stored_count:], None)[0]

    def check_arguments(x: Tensor, *rest: Any, reads_data: bool = True) -> None:
        stored, bias = split(rest)
        columns = check_activations(name, x)
        _check.is_float(name, "values", stored[place])
        check_metadata(*stored, columns)
        check_bias(name, bias, row_count(*stored))
        if reads_data:
            check_data(*stored, columns)

    def reference(x: Tensor, *rest: Any) -> Tensor:
        check_arguments(x, *rest)
        stored, bias = split(rest)
        return multiply(x, to_dense(*stored, x.shape[-1]), bias)

    def fake(x: Tensor, *rest: Any) -> Tensor:
        check_arguments(x, *rest, reads_data=False)
        return x.new_empty((*x.shape[:-1], row_count(*split(rest)[0])))

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, *rest = inputs
        stored, bias = split(tuple(rest))
        tensors, values = list(stored[:tensor_count]), stored[place]
        if not ctx.needs_input_grad[0]:
            tensors[place] = None
        ctx.save_for_backward(x if ctx.needs_input_grad[1 + place] else None, *tensors)
        ctx.sizes, ctx.columns = stored[tensor_count:], x.shape[-1]
        ctx.shape, ctx.dtype = values.shape, values.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * (stored_count + 2)
        if ctx.needs_input_grad[0]:
            grads[0] = input_gradient(grad, *tensors, *ctx.sizes, ctx.columns)
        if ctx.needs_input_grad[1 + place]:
            del tensors[place]
            grads[1 + place] = values_gradient(grad, x, *tensors, *ctx.sizes, ctx.shape, ctx.dtype)
        grads[-1] = bias_gradient(ctx, grad, place=stored_count + 1)
        return tuple(grads)

    return define(
        schema,
        check=check_arguments,
        reference=reference,
        fake=fake,
        backward=backward,
        setup_context=setup_context,
    )


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` in fp32, of the dtype of `x`.

    A row of `x` that is not all finite gives NaN: otherwise it would depend on the weight's zeros being stored.
    """
    y = x.float() @ weight.t() + 0.0  # a kernel's sum begins with 0.0, and so is never -0.0
    if bias is not None:
        y = y + bias.float()
    return torch.where(x.isfinite().all(-1, keepdim=True), y, torch.nan).to(x.dtype)

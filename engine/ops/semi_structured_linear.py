"""semi_structured_linear: a linear layer whose 2:4 weight holds float values."""

from torch import Tensor

from engine.ops import _check
from engine.ops._library import define
from engine.ops._linear import as_rows, bias_gradient, check_activations, check_bias, multiply
from engine.ops._semi_structured import check_semi_structured, check_semi_structured_metadata, collect, spread

OP = "semi_structured_linear"


def _check_metadata(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None) -> None:
    check_activations(OP, x)
    _check.is_float(OP, "values", values)
    check_semi_structured_metadata(OP, values, metadata, x.shape[-1])
    check_bias(OP, bias, values.shape[0])


def _check_arguments(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None = None) -> None:
    _check_metadata(x, values, metadata, bias)
    check_semi_structured(OP, values, metadata, x.shape[-1])


def _reference(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_arguments(x, values, metadata, bias)
    return multiply(x, spread(values.float(), metadata)[:, : x.shape[-1]], bias)


def _fake(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_metadata(x, values, metadata, bias)
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, values, metadata, bias = inputs
    need_x, need_values = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    ctx.save_for_backward(x if need_values else None, values if need_x else None, metadata)
    ctx.columns, ctx.dtype, ctx.values_dtype = x.shape[-1], x.dtype, values.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
    x, values, metadata = ctx.saved_tensors
    grad = grad.float()
    grad_x = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_x = (grad @ spread(values.float(), metadata)[:, : ctx.columns]).to(ctx.dtype)
    if ctx.needs_input_grad[1]:
        dense = as_rows(grad).t() @ as_rows(x)
        grad_values = collect(dense, metadata).to(ctx.values_dtype)
    grad_bias = bias_gradient(ctx, grad, place=3)
    return grad_x, grad_values, None, grad_bias


_op = define(
    "semi_structured_linear(Tensor x, Tensor values, Tensor metadata, Tensor? bias=None) -> Tensor",
    check=_check_arguments,
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def semi_structured_linear(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` in fp32 arithmetic, read directly from a 2:4 weight.

    Where `x` and `values` both are bfloat16 and the processor multiplies pairs of such (AVX512_BF16), that instruction
    is used, for which numbers below fp32's smallest normal one (2^-126) are zero, sums too.

    A row of `x` that holds a NaN or an infinity makes its row of `y` NaN, and no other.

    The metadata is not checked while it is read: places that do not ascend give a meaningless result, though nothing
    is read out of bounds. Formats check theirs when they are loaded.

    Has gradients for `x`, `values` (at the kept places alone) and `bias`; the weight is dense for their length.

    Args:
        x: `[..., K]`, float32, float16 or bfloat16.
        values: `[N, 2 * ceil(K / 4)]`, float32, float16 or bfloat16; need not be of the dtype of `x`.
        metadata: uint8 `[N, ceil(K / 8)]`, as :func:`engine.ops.prune_to_semi_structured` gives it.
        bias: `[N]`, float32, float16 or bfloat16.

    Returns:
        `[..., N]` of the dtype of `x`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: the shapes do not fit.
    """
    return _op(x, values, metadata, bias)

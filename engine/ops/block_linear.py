"""block_linear: a linear layer of whose weight only some blocks are kept, with float values."""

from torch import Tensor

from engine.ops import _check
from engine.ops._block import check_block, check_block_metadata, collect_blocks, from_blocks
from engine.ops._library import define
from engine.ops._linear import as_rows, bias_gradient, check_activations, check_bias, multiply

OP = "block_linear"


def _check_metadata(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, rows: int, bias: Tensor | None = None
) -> None:
    check_activations(OP, x)
    _check.is_float(OP, "values", values)
    check_block_metadata(OP, crow_indices, col_indices, values, rows, x.shape[-1])
    check_bias(OP, bias, rows)


def _check_arguments(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, rows: int, bias: Tensor | None = None
) -> None:
    _check_metadata(x, crow_indices, col_indices, values, rows, bias)
    check_block(OP, crow_indices, col_indices, values.shape[2], x.shape[-1])


def _reference(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, rows: int, bias: Tensor | None = None
) -> Tensor:
    _check_arguments(x, crow_indices, col_indices, values, rows, bias)
    return multiply(x, from_blocks(crow_indices, col_indices, values.float(), rows, x.shape[-1]), bias)


def _fake(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, rows: int, bias: Tensor | None = None
) -> Tensor:
    _check_metadata(x, crow_indices, col_indices, values, rows, bias)
    return x.new_empty((*x.shape[:-1], rows))


def _setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor | None], output: Tensor) -> None:
    x, crow_indices, col_indices, values, ctx.rows, bias = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, crow_indices, col_indices, values)
    ctx.columns, ctx.dtype = x.shape[-1], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, Tensor | None]:
    x, crow_indices, col_indices, values = ctx.saved_tensors
    grad = grad.float()
    grad_x = grad_values = None
    if ctx.needs_input_grad[0]:
        weight = from_blocks(crow_indices, col_indices, values.float(), ctx.rows, ctx.columns)
        grad_x = (grad @ weight).to(ctx.dtype)
    if ctx.needs_input_grad[3]:
        dense = as_rows(grad).t() @ as_rows(x)
        grad_values = collect_blocks(dense, crow_indices, col_indices, values).to(values.dtype)
    grad_bias = bias_gradient(ctx, grad, place=5)
    return grad_x, None, None, grad_values, None, grad_bias


_op = define(
    "block_linear(Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, SymInt rows, Tensor? bias=None)"
    " -> Tensor",
    check=_check_arguments,
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def block_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, rows: int, bias: Tensor | None = None
) -> Tensor:
    """`x @ weight.T + bias` in fp32 arithmetic, of which only the kept blocks are computed.

    Where `x` and `values` both are bfloat16 and the processor multiplies pairs of such (AVX512_BF16), that instruction
    may be used, for which numbers below fp32's smallest normal one (2^-126) are zero, sums too.

    A row of `x` that holds a NaN or an infinity makes its row of `y` NaN, and no other.

    Has gradients for `x`, `values` (of kept blocks alone) and `bias`; the weight is dense for their length.

    Args:
        x: `[..., K]`, float32, float16 or bfloat16.
        crow_indices: int32 `[ceil(rows / R) + 1]`, where each row of blocks begins.
        col_indices: int32 `[B]`, the column of blocks in which each stands, ascending.
        values: `[B, R, C]`, float32, float16 or bfloat16; need not be of the dtype of `x`. What a block holds beyond N
            and K is not read.
        rows: N, which the blocks leave open.
        bias: `[N]`, float32, float16 or bfloat16.

    Returns:
        `[..., N]` of the dtype of `x`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: the shapes do not fit, `crow_indices` does not run from 0 to B without a step back, or a column of
            blocks lies outside the matrix or does not ascend.
    """
    _check.expect(not isinstance(rows, Tensor), OP, "rows", "an int", "a tensor", TypeError)  # a bias, say
    return _op(x, crow_indices, col_indices, values, rows, bias)

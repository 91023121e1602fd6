"""csr_linear: a linear layer whose very sparse weight is held in compressed sparse rows."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._csr import blocks, check_csr, check_csr_metadata, dense_rows, row_indices
from engine.ops._library import define
from engine.ops._linear import bias_gradient, check_activations, check_bias, check_rows, multiply


def _check_metadata(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None = None
) -> None:
    op = "csr_linear"
    check_activations(op, x)
    _check.is_float(op, "values", values)
    check_csr_metadata(op, crow_indices, col_indices, values)
    check_bias(op, bias, crow_indices.shape[0] - 1)


def _check_arguments(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None = None
) -> None:
    _check_metadata(x, crow_indices, col_indices, values, bias)
    check_csr("csr_linear", crow_indices, col_indices, x.shape[-1])


def _reference(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None = None
) -> Tensor:
    _check_arguments(x, crow_indices, col_indices, values, bias)
    weight = dense_rows(crow_indices, col_indices, values, 0, crow_indices.shape[0] - 1, x.shape[-1])
    return multiply(x, weight, bias)


def _fake(x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_metadata(x, crow_indices, col_indices, values, bias)
    return x.new_empty((*x.shape[:-1], crow_indices.shape[0] - 1))


def _setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, crow_indices, col_indices, values, bias = inputs
    need_x, need_values = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    ctx.save_for_backward(x if need_values else None, crow_indices, col_indices, values if need_x else None)
    ctx.columns, ctx.dtype = x.shape[-1], values.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None]:
    x, crow_indices, col_indices, values = ctx.saved_tensors
    grad_x = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_x = _backward_input_op(grad, crow_indices, col_indices, values, ctx.columns)
    if ctx.needs_input_grad[3]:
        grad_values = _backward_values_op(grad, x, crow_indices, col_indices, ctx.dtype)
    grad_bias = bias_gradient(ctx, grad, place=4)
    return grad_x, None, None, grad_values, grad_bias


_op = define(
    "csr_linear(Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, Tensor? bias=None) -> Tensor",
    check=_check_arguments,
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def csr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`x @ weight.T + bias` in fp32 arithmetic, for a weight in compressed sparse rows; worth it above 95 % sparsity.

    The indices are checked on the way: what does not fit together is refused. A row of `x` that holds a NaN or an
    infinity makes its row of `y` NaN, and no other.

    On CUDA nothing waits for the GPU, so that indices which do not fit together raise no error there: the outputs of
    the rows that they are wrong about are NaN.

    Has gradients for `x`, `values` and `bias`; second derivatives are refused.

    Args:
        x: `[..., K]`, float32, float16 or bfloat16.
        crow_indices: int32 or int64 `[N + 1]`: where each row's values begin.
        col_indices: of the same dtype, `[nnz]`: each value's column. Those of a row in any order; what comes twice
            adds up.
        values: `[nnz]`, float32, float16 or bfloat16; need not be of the dtype of `x`.
        bias: `[N]`, float32, float16 or bfloat16.

    Returns:
        `[..., N]` of the dtype of `x`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: the shapes do not fit, `crow_indices` does not run from 0 to nnz without a step back, or a column
            is not in `[0, K)`.
    """
    return _op(x, crow_indices, col_indices, values, bias)


# The gradient's ops. Both go through the weight's rows block by block, so that it is never dense as a whole.


def _backward_input(grad: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int) -> Tensor:
    """`grad @ weight` in fp32, of the dtype of `grad`."""
    op = "csr_linear_backward_input"
    check_csr_metadata(op, crow_indices, col_indices, values)
    check_csr(op, crow_indices, col_indices, columns)
    g = check_rows(op, "grad", grad, crow_indices.shape[0] - 1)
    total = g.new_zeros(g.shape[0], columns)
    for begin, end in blocks(crow_indices, columns):
        total.addmm_(g[:, begin:end], dense_rows(crow_indices, col_indices, values, begin, end, columns))
    return total.reshape(*grad.shape[:-1], columns).to(grad.dtype)


def _backward_values(grad: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, dtype: torch.dtype) -> Tensor:
    """`(grad.T @ x)` at the kept places, in fp32, cast to `dtype`."""
    op = "csr_linear_backward_values"
    columns = x.shape[-1]
    result = x.new_empty(col_indices.shape, dtype=dtype)
    check_csr_metadata(op, crow_indices, col_indices, result)
    check_csr(op, crow_indices, col_indices, columns)
    g, inputs = check_rows(op, "grad", grad, crow_indices.shape[0] - 1), check_rows(op, "x", x, columns)
    for begin, end in blocks(crow_indices, columns):
        offsets = crow_indices[begin : end + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        dense = g[:, begin:end].t() @ inputs
        result[first:last] = dense[row_indices(offsets), col_indices[first:last]].to(dtype)
    return result


def _fake_backward_input(
    grad: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], columns))


def _fake_backward_values(
    grad: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(col_indices.shape, dtype=dtype)


_backward_input_op = define(
    "csr_linear_backward_input(Tensor grad, Tensor crow_indices, Tensor col_indices, Tensor values, SymInt columns)"
    " -> Tensor",
    reference=_backward_input,
    fake=_fake_backward_input,
)
_backward_values_op = define(
    "csr_linear_backward_values(Tensor grad, Tensor x, Tensor crow_indices, Tensor col_indices, ScalarType dtype)"
    " -> Tensor",
    reference=_backward_values,
    fake=_fake_backward_values,
)

"""csr_linear: a linear layer whose very sparse weight is held in compressed sparse rows."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._csr import blocks, check_csr, check_csr_metadata, dense_rows, row_indices
from engine.ops._float_linear import define_float_linear
from engine.ops._library import define
from engine.ops._linear import check_rows

OP = "csr_linear"


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


_op = define_float_linear(
    "csr_linear(Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, Tensor? bias=None) -> Tensor",
    check_metadata=lambda crow, col, values, columns: check_csr_metadata(OP, crow, col, values),
    check_data=lambda crow, col, values, columns: check_csr(OP, crow, col, columns),
    row_count=lambda crow, col, values: crow.shape[0] - 1,
    to_dense=lambda crow, col, values, columns: dense_rows(crow, col, values, 0, crow.shape[0] - 1, columns),
    input_gradient=_backward_input_op,
    values_gradient=lambda grad, x, crow, col, shape, dtype: _backward_values_op(grad, x, crow, col, dtype),
)


# What formats.Csr.to_dense calls: an op, so that shapes alone can go through it.


def _to_dense(crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int) -> Tensor:
    op = "csr_to_dense"
    _check.is_float(op, "values", values)
    check_csr_metadata(op, crow_indices, col_indices, values)
    check_csr(op, crow_indices, col_indices, columns)
    return dense_rows(crow_indices, col_indices, values, 0, crow_indices.shape[0] - 1, columns)


def _fake_to_dense(crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int) -> Tensor:
    return values.new_empty((crow_indices.shape[0] - 1, columns), dtype=torch.float32)


def _setup_context_to_dense(ctx, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    crow_indices, col_indices, values, _ = inputs
    ctx.save_for_backward(crow_indices, col_indices)
    ctx.dtype = values.dtype


def _backward_to_dense(ctx, grad: Tensor) -> tuple[None, None, Tensor, None]:
    crow_indices, col_indices = ctx.saved_tensors
    return None, None, grad[row_indices(crow_indices), col_indices].to(ctx.dtype), None


csr_to_dense = define(
    "csr_to_dense(Tensor crow_indices, Tensor col_indices, Tensor values, SymInt columns) -> Tensor",
    reference=_to_dense,
    fake=_fake_to_dense,
    backward=_backward_to_dense,
    setup_context=_setup_context_to_dense,
)

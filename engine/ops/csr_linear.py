"""csr_linear: a linear layer over compressed sparse rows."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._library import define, explained_by

ROWS_AT_ONCE = 256  # of the weight that a gradient makes dense at a time


def _check_arguments(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None = None
) -> None:
    op = "csr_linear"
    _check.is_float(op, "x", x)
    _check.expect(x.dim() >= 1, op, "x", "at least one dimension", list(x.shape))
    _check.is_dtype(op, "crow_indices", crow_indices, torch.int32, torch.int64)
    _check.expect(crow_indices.dim() == 1 and crow_indices.numel() > 0, op, "crow_indices", "shape [N + 1]", "another")
    _check.is_dtype(op, "col_indices", col_indices, crow_indices.dtype)
    _check.is_float(op, "values", values)
    _check.has_shape(op, "values", values, ("nnz",))
    _check.has_shape(op, "col_indices", col_indices, values.shape)
    if bias is not None:
        _check.is_float(op, "bias", bias)
        _check.has_shape(op, "bias", bias, (crow_indices.shape[0] - 1,))


def _explain(x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None = None) -> None:
    """The whole check, indices included: it reads them all."""
    _check_arguments(x, crow_indices, col_indices, values, bias)
    nnz, columns = values.shape[0], x.shape[-1]
    rises = crow_indices[0] == 0 and crow_indices[-1] == nnz and bool((crow_indices.diff() >= 0).all())
    _check.expect(rises, "csr_linear", "crow_indices", f"offsets rising from 0 to {nnz}", "others")
    inside = bool(((col_indices >= 0) & (col_indices < columns)).all())
    _check.expect(inside, "csr_linear", "col_indices", f"columns in [0, {columns})", "others")


def dense_rows(crow_indices: Tensor, col_indices: Tensor, values: Tensor, begin: int, end: int, columns: int) -> Tensor:
    """Rows [begin, end) of the weight, fp32 and dense."""
    first, last = int(crow_indices[begin]), int(crow_indices[end])
    rows = torch.repeat_interleave(crow_indices[begin : end + 1].diff())
    dense = values.new_zeros((end - begin, columns), dtype=torch.float32)
    return dense.index_put_((rows.long(), col_indices[first:last].long()), values[first:last].float(), accumulate=True)


def _reference(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None = None
) -> Tensor:
    _explain(x, crow_indices, col_indices, values, bias)
    rows = crow_indices.shape[0] - 1
    dense = dense_rows(crow_indices, col_indices, values, 0, rows, x.shape[-1])
    y = torch.nn.functional.linear(x.float(), dense, None if bias is None else bias.float())
    return torch.where(x.isfinite().all(-1, keepdim=True), y, torch.nan).to(x.dtype)


def _fake(x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_arguments(x, crow_indices, col_indices, values, bias)
    return x.new_empty((*x.shape[:-1], crow_indices.shape[0] - 1))


def _backward_input(grad: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int) -> Tensor:
    flat = grad.reshape(-1, grad.shape[-1]).float()
    total = flat.new_zeros((flat.shape[0], columns))
    for begin in range(0, grad.shape[-1], ROWS_AT_ONCE):
        end = min(begin + ROWS_AT_ONCE, grad.shape[-1])
        total.addmm_(flat[:, begin:end], dense_rows(crow_indices, col_indices, values, begin, end, columns))
    return total.reshape(*grad.shape[:-1], columns).to(grad.dtype)


def _backward_values(grad: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor) -> Tensor:
    flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]).float(), x.reshape(-1, x.shape[-1]).float()
    out = torch.empty_like(values)
    for begin in range(0, grad.shape[-1], ROWS_AT_ONCE):
        end = min(begin + ROWS_AT_ONCE, grad.shape[-1])
        first, last = int(crow_indices[begin]), int(crow_indices[end])
        rows = torch.repeat_interleave(crow_indices[begin : end + 1].diff())
        product = flat_grad[:, begin:end].T @ flat_x
        out[first:last] = product[rows.long(), col_indices[first:last].long()].to(values.dtype)
    return out


_op_backward_input = define(
    "csr_linear_backward_input(Tensor grad, Tensor crow_indices, Tensor col_indices, Tensor values, int columns)"
    " -> Tensor",
    reference=_backward_input,
    fake=lambda grad, crow_indices, col_indices, values, columns: grad.new_empty((*grad.shape[:-1], columns)),
)
_op_backward_values = define(
    "csr_linear_backward_values(Tensor grad, Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values)"
    " -> Tensor",
    reference=_backward_values,
    fake=lambda grad, x, crow_indices, col_indices, values: torch.empty_like(values),
)


def _setup_context(ctx, inputs, output) -> None:
    x, crow_indices, col_indices, values, bias = inputs
    ctx.save_for_backward(x if values.requires_grad else None, crow_indices, col_indices, values)
    ctx.columns, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, crow_indices, col_indices, values = ctx.saved_tensors
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _op_backward_input(grad, crow_indices, col_indices, values, ctx.columns)
    if ctx.needs_input_grad[3]:
        grad_values = _op_backward_values(grad, x, crow_indices, col_indices, values)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).float().sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_values, grad_bias


_op = define(
    "csr_linear(Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, Tensor? bias=None) -> Tensor",
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


@explained_by(_explain)
def csr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`x @ W.T + bias` for a weight W `[N, K]` in compressed sparse rows, in fp32 arithmetic.

    A row of `x` that holds a NaN or an infinity gives a row of NaN. Gradients: of `x`, `values` and `bias`.

    Args:
        x: `[..., K]`, float32, float16 or bfloat16.
        crow_indices: `[N + 1]`, int32 or int64: where each row's values begin.
        col_indices: `[nnz]`, of the same dtype, each in [0, K).
        values: `[nnz]`, float32, float16 or bfloat16.
        bias: `[N]`, or None.

    Returns:
        `[..., N]` in `x`'s dtype.

    Raises:
        TypeError: a dtype not named above.
        ValueError: shapes that don't fit, offsets that don't rise from 0 to nnz, or a column outside [0, K).
    """
    return _op(x, crow_indices, col_indices, values, bias)

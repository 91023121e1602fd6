"""bitmap_linear: a linear layer whose sparse weight is a bitmap with float values."""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine import backends
from engine.ops._bitmap import bitmap_mask, check_bitmap, check_bitmap_metadata
from engine.ops._float_linear import define_float_linear
from engine.ops._library import define
from engine.ops._linear import DENSE_AT_ONCE, check_rows
from engine.ops.bitmap_to_dense import bitmap_to_dense

OP = "bitmap_linear"


def bitmap_linear(
    x: Tensor, bitmask: Tensor, row_offsets: Tensor, values: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`x @ weight.T + bias` in fp32 arithmetic, read directly from the bitmap that holds `weight`.

    Where `x` and `values` both are bfloat16 and the processor multiplies pairs of such (AVX512_BF16), that instruction
    is used, for which numbers below fp32's smallest normal one (2^-126) are zero, sums too; but not for more than
    127 rows by a weight of which at most 12 % is kept.

    The bitmap is checked on the way: what does not fit together is refused. A row of `x` that holds a NaN or an
    infinity makes its row of `y` NaN, and no other.

    Has gradients for `x`, `values` (at the kept places alone) and `bias`; second derivatives are refused.

    On CUDA nothing waits for the GPU, so that a bitmap whose data do not fit together raises no error there: the
    outputs of the rows that it is wrong about are NaN.

    Args:
        x: `[..., K]`, float32, float16 or bfloat16.
        bitmask: uint8 `[N, ceil(K / 8)]`, the least significant bit first.
        row_offsets: int64 `[N + 1]`, where each row's values begin.
        values: `[nnz]`, float32, float16 or bfloat16, row after row; need not be of the dtype of `x`.
        bias: `[N]`, float32, float16 or bfloat16.

    Returns:
        `[..., N]` of the dtype of `x`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: the shapes do not fit, `row_offsets` does not run from 0 to nnz without a step back, a row has more
            or fewer bits set than values, or a bit beyond K is set.
    """
    return _op(x, bitmask, row_offsets, values, bias)


def training_pays(rows: int, kept: int, places: int) -> bool:
    """Whether the op and its gradients are faster, in float32 on this CPU, than dense products of the same size.

    `rows` of activations, times a weight of which `kept` of so many `places` are. Measured on Zen 3 and Zen 5, whose
    dense products are AVX2's in both; where they are AVX-512's, they are faster.
    """
    most = {"avx2": 0.35, "avx_vnni": 0.35, "avx512": 0.3}.get(backends.cpu_variant(), 0.0)
    return rows >= 64 and kept <= most * places


# The gradient's ops. Both references go through the weight's rows block by block: it is never dense as a whole.


def _blocks(bitmask: Tensor, row_offsets: Tensor, columns: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields a block's rows, its values' places, and its own row offsets, from 0."""
    n = bitmask.shape[0]
    step = max(1, DENSE_AT_ONCE // max(1, columns))
    borders = [*range(0, n, step), n]
    offsets = row_offsets[borders].tolist()
    for i in range(len(borders) - 1):
        begin, end = borders[i], borders[i + 1]
        yield (
            slice(begin, end),
            slice(offsets[i], offsets[i + 1]),
            row_offsets[begin : end + 1] - offsets[i],
        )


def _backward_input(grad: Tensor, bitmask: Tensor, row_offsets: Tensor, values: Tensor, columns: int) -> Tensor:
    """`grad @ weight` in fp32, of the dtype of `grad`."""
    op = "bitmap_linear_backward_input"
    check_bitmap_metadata(op, bitmask, row_offsets, values, columns)
    g = check_rows(op, "grad", grad, bitmask.shape[0])
    total = g.new_zeros(g.shape[0], columns)
    for rows, places, offsets in _blocks(bitmask, row_offsets, columns):
        total.addmm_(g[:, rows], bitmap_to_dense(bitmask[rows], offsets, values[places], columns).float())
    return total.reshape(*grad.shape[:-1], columns).to(grad.dtype)


def _backward_values(
    grad: Tensor, x: Tensor, bitmask: Tensor, row_offsets: Tensor, nnz: int, dtype: torch.dtype
) -> Tensor:
    """`(grad.T @ x)` at the kept places, in fp32, cast to `dtype`."""
    op = "bitmap_linear_backward_values"
    columns = x.shape[-1]
    result = x.new_empty((nnz,), dtype=dtype)
    check_bitmap_metadata(op, bitmask, row_offsets, result, columns)
    g, inputs = check_rows(op, "grad", grad, bitmask.shape[0]), check_rows(op, "x", x, columns)
    for rows, places, offsets in _blocks(bitmask, row_offsets, columns):
        dense = g[:, rows].t() @ inputs
        result[places] = torch.ops.engine.bitmap_gather(dense, bitmask[rows], offsets, places.stop - places.start)
    return result


def _fake_backward_input(grad: Tensor, bitmask: Tensor, row_offsets: Tensor, values: Tensor, columns: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], columns))


def _fake_backward_values(
    grad: Tensor, x: Tensor, bitmask: Tensor, row_offsets: Tensor, nnz: int, dtype: torch.dtype
) -> Tensor:
    return x.new_empty((nnz,), dtype=dtype)


_backward_input_op = define(
    "bitmap_linear_backward_input(Tensor grad, Tensor bitmask, Tensor row_offsets, Tensor values, SymInt columns)"
    " -> Tensor",
    reference=_backward_input,
    fake=_fake_backward_input,
)
_backward_values_op = define(
    "bitmap_linear_backward_values(Tensor grad, Tensor x, Tensor bitmask, Tensor row_offsets, SymInt nnz,"
    " ScalarType dtype) -> Tensor",
    reference=_backward_values,
    fake=_fake_backward_values,
)


def _to_dense(bitmask: Tensor, row_offsets: Tensor, values: Tensor, columns: int) -> Tensor:
    weight = values.new_zeros(bitmask.shape[0], columns, dtype=torch.float32)
    weight[bitmap_mask(bitmask, columns)] = values.float()
    return weight


_op = define_float_linear(
    "bitmap_linear(Tensor x, Tensor bitmask, Tensor row_offsets, Tensor values, Tensor? bias=None) -> Tensor",
    check_metadata=lambda *bitmap: check_bitmap_metadata(OP, *bitmap),
    check_data=lambda *bitmap: check_bitmap(OP, *bitmap),
    row_count=lambda bitmask, row_offsets, values: bitmask.shape[0],
    to_dense=_to_dense,
    input_gradient=_backward_input_op,
    values_gradient=lambda grad, x, bitmask, row_offsets, shape, dtype: _backward_values_op(
        grad, x, bitmask, row_offsets, shape[0], dtype
    ),
)

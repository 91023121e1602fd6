"""semi_structured_int8_linear: a linear layer whose 2:4 weight is int8, activations quantised on the fly."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._int8_linear import as_tensor, define_int8_linear
from engine.ops._semi_structured import check_semi_structured, check_semi_structured_metadata, spread
from engine.ops.semi_structured_to_dense import semi_structured_to_dense

OP = "semi_structured_int8_linear"


def _check_metadata(x: Tensor, values: Tensor, metadata: Tensor, scale: Tensor) -> None:
    _check.is_dtype(OP, "values", values, torch.int8)
    check_semi_structured_metadata(OP, values, metadata, x.shape[-1])
    _check.is_dtype(OP, "scale", scale, torch.float32)
    _check.has_shape(OP, "scale", scale, (values.shape[0],))


_op, semi_structured_int8_linear_of_patches = define_int8_linear(
    "semi_structured_int8_linear(Tensor x, Tensor values, Tensor metadata, Tensor scale, Tensor? bias=None,"
    " Tensor? input_scale=None) -> Tensor",
    check_metadata=_check_metadata,
    check_data=lambda values, metadata, columns: check_semi_structured(OP, values, metadata, columns),
    to_dense=lambda values, metadata, rows, columns: spread(values, metadata)[:, :columns],
    to_dense_quickly=lambda values, metadata, rows, columns: semi_structured_to_dense(values, metadata, columns),
)


def semi_structured_int8_linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | float | None = None,
) -> Tensor:
    """:func:`engine.ops.int8_linear` of a 2:4 weight, read in its compressed form.

    Equal to the bit to `int8_linear(x, weight, ...)` with `weight = semi_structured_to_dense(values, metadata, K)`, for
    every `x`: the same quantisation, sums exact for every K, `y = sum * (s_x * s_w) + bias` in fp32, and NaN for a row
    of `x` that holds a NaN or an infinity.

    The metadata is not checked while it is read: places that do not ascend give a meaningless result, though nothing
    is read out of bounds. Formats check theirs when they are loaded.

    Has gradients for `x` and `bias`, straight through the quantisation.

    Args:
        x: `[..., K]`, float32, float16 or bfloat16.
        values: int8 `[N, 2 * ceil(K / 4)]`; any value, -128 too.
        metadata: uint8 `[N, ceil(K / 8)]`, as :func:`engine.ops.prune_to_semi_structured` gives it.
        scale: float32 `[N]`.
        bias: `[N]`, float32, float16 or bfloat16.
        input_scale: as for :func:`engine.ops.int8_linear`.

    Returns:
        `[..., N]` of the dtype of `x`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: the shapes do not fit.
    """
    return _op(x, values, metadata, scale, bias, as_tensor(input_scale, x))

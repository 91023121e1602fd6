"""semi_structured_linear: a linear layer whose 2:4 weight holds float values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.ops._float_linear import define_float_linear
from engine.ops._linear import as_rows
from engine.ops._semi_structured import check_semi_structured, check_semi_structured_metadata, spread
from engine.ops.semi_structured_to_dense import semi_structured_gather, semi_structured_to_dense

OP = "semi_structured_linear"


def _input_gradient(grad: Tensor, values: Tensor, metadata: Tensor, columns: int) -> Tensor:
    return (grad.float() @ semi_structured_to_dense(values.float(), metadata, columns)).to(grad.dtype)


def _values_gradient(grad: Tensor, x: Tensor, metadata: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return semi_structured_gather(as_rows(grad).t() @ as_rows(x), metadata).to(dtype)


_op = define_float_linear(
    "semi_structured_linear(Tensor x, Tensor values, Tensor metadata, Tensor? bias=None) -> Tensor",
    check_metadata=lambda *semi: check_semi_structured_metadata(OP, *semi),
    check_data=lambda *semi: check_semi_structured(OP, *semi),
    row_count=lambda values, metadata: values.shape[0],
    to_dense=lambda values, metadata, columns: spread(values.float(), metadata)[:, :columns],
    input_gradient=_input_gradient,
    values_gradient=_values_gradient,
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

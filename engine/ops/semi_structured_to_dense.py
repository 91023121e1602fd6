"""semi_structured_to_dense: the values of a 2:4 weight back at their places, zeros elsewhere."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._library import define, explained_by
from engine.ops._semi_structured import (
    check_semi_structured,
    check_semi_structured_metadata,
    collect,
    group_count,
    spread,
)

DTYPES = (*_check.FLOAT_DTYPES, torch.int8)
OP = "semi_structured_to_dense"


def _check_metadata(values: Tensor, metadata: Tensor, columns: int) -> None:
    _check.is_dtype(OP, "values", values, *DTYPES)
    check_semi_structured_metadata(OP, values, metadata, columns)


def _check_arguments(values: Tensor, metadata: Tensor, columns: int) -> None:
    _check_metadata(values, metadata, columns)
    check_semi_structured(OP, values, metadata, columns)


def _reference(values: Tensor, metadata: Tensor, columns: int) -> Tensor:
    _check_arguments(values, metadata, columns)
    return spread(values, metadata)[:, :columns].contiguous()


def _fake(values: Tensor, metadata: Tensor, columns: int) -> Tensor:
    _check_metadata(values, metadata, columns)
    return values.new_empty((values.shape[0], columns))


def _setup_context(ctx, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    return semi_structured_gather(grad, *ctx.saved_tensors), None, None


_op = define(
    "semi_structured_to_dense(Tensor values, Tensor metadata, SymInt columns) -> Tensor",
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


@explained_by(_check_arguments)
def semi_structured_to_dense(values: Tensor, metadata: Tensor, columns: int) -> Tensor:
    """Spreads the values of a 2:4 weight over a dense matrix. What does not fit together is refused.

    Has a gradient for `values`.

    Args:
        values: `[N, 2 * ceil(columns / 4)]`, float32, float16, bfloat16 or int8.
        metadata: uint8 `[N, ceil(columns / 8)]`, as :func:`engine.ops.prune_to_semi_structured` gives it.
        columns: K, which the two leave open.

    Returns:
        `[N, columns]` of the dtype of `values`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: the shapes do not fit, the two places of a group do not ascend, or a value beyond column K isn't 0.
    """
    return _op(values, metadata, columns)


# The gradient's op, the reverse of semi_structured_to_dense: what a dense matrix holds at the kept places.


def _reference_gather(dense: Tensor, metadata: Tensor) -> Tensor:
    _check.is_float("semi_structured_gather", "dense", dense)
    _check.has_shape("semi_structured_gather", "dense", dense, ("N", "K"))
    check_semi_structured_metadata("semi_structured_gather", _fake_gather(dense, metadata), metadata, dense.shape[1])
    return collect(dense, metadata)


def _fake_gather(dense: Tensor, metadata: Tensor) -> Tensor:
    return dense.new_empty((dense.shape[0], 2 * group_count(dense.shape[1])))


def _setup_context_gather(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    dense, metadata = inputs
    ctx.save_for_backward(metadata)
    ctx.columns = dense.shape[1]


def _backward_gather(ctx, grad: Tensor) -> tuple[Tensor, None]:
    # Not by the op, which refuses other values than 0 beyond K.
    return spread(grad, *ctx.saved_tensors)[:, : ctx.columns], None


semi_structured_gather = define(
    "semi_structured_gather(Tensor dense, Tensor metadata) -> Tensor",
    reference=_reference_gather,
    fake=_fake_gather,
    backward=_backward_gather,
    setup_context=_setup_context_gather,
)

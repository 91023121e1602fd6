"""threshold_prune: zeros in place of small weights, still dense."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._library import define, explained_by
from engine.ops._prune import as_threshold, check_threshold, keep_mask


def _check_arguments(weight: Tensor, threshold: float | Tensor) -> None:
    _check.is_float("threshold_prune", "weight", weight)
    check_threshold("threshold_prune", weight, threshold)


def _reference(weight: Tensor, threshold: Tensor) -> Tensor:
    _check_arguments(weight, threshold)
    return torch.where(keep_mask(weight, threshold), weight, 0.0).contiguous()


def _fake(weight: Tensor, threshold: Tensor) -> Tensor:
    _check_arguments(weight, threshold)
    return weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    weight, threshold = ctx.saved_tensors
    return torch.where(keep_mask(weight, threshold), grad, 0.0), None


_op = define(
    "threshold_prune(Tensor weight, Tensor threshold) -> Tensor",
    reference=_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


@explained_by(_check_arguments)
def threshold_prune(weight: Tensor, threshold: float | Tensor) -> Tensor:
    """Sets weights with `|w| <= threshold` to zero.

    A NaN weight is kept. The gradient goes through where a weight is kept, and is zero elsewhere.

    Args:
        weight: any shape, float32, float16 or bfloat16.
        threshold: a number, or a tensor that broadcasts against `weight`; compared in float32.

    Returns:
        The pruned weight, of `weight`'s shape and dtype, contiguous.

    Raises:
        TypeError: `weight` has another dtype.
        ValueError: `threshold` does not broadcast against `weight`.
    """
    return _op(weight, as_threshold("threshold_prune", weight, threshold))

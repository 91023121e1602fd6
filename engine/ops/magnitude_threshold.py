"""magnitude_threshold: the magnitude below which a given fraction of the weights lies, exactly."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._library import define, explained_by

SCOPES = ("tensor", "row")


def _check_arguments(weight: Tensor | Sequence[Tensor], sparsity: float, scope: str = "tensor") -> None:
    several = isinstance(weight, (list, tuple))
    weights: list[Any] = list(weight) if several else [weight]
    for i, each in enumerate(weights):
        _check.is_float("magnitude_threshold", f"weight[{i}]" if several else "weight", each)
    number = isinstance(sparsity, (int, float)) and 0 <= sparsity < 1
    _check.expect(number, "magnitude_threshold", "sparsity", "a number in [0, 1)", sparsity)
    _check.expect(scope in SCOPES, "magnitude_threshold", "scope", f"one of {', '.join(SCOPES)}", repr(scope))
    if scope == "row":
        _check.expect(not several, "magnitude_threshold", "weight", "one tensor with scope='row'", "several")
        _check.has_shape("magnitude_threshold", "weight", weights[0], ("N", "K"))


def _select(magnitudes: Tensor, sparsity: float) -> Tensor:
    """The k-th smallest of each row, k = round(sparsity * columns); 0 where k is 0. NaN counts as the largest."""
    count = round(sparsity * magnitudes.shape[-1])
    if count == 0:
        return magnitudes.new_zeros(magnitudes.shape[:-1])
    return magnitudes.sort(-1).values[..., count - 1]


def _reference(weight: Tensor, sparsity: float, scope: str = "tensor") -> Tensor:
    _check_arguments(weight, sparsity, scope)
    if scope == "row":
        return _select(weight.float().abs(), sparsity).unsqueeze(-1)
    return _select(weight.float().abs().reshape(-1), sparsity)


def _fake(weight: Tensor, sparsity: float, scope: str = "tensor") -> Tensor:
    _check_arguments(weight, sparsity, scope)
    return weight.new_empty((weight.shape[0], 1) if scope == "row" else (), dtype=torch.float32)


def _reference_of_list(weights: list[Tensor], sparsity: float) -> Tensor:
    _check_arguments(weights, sparsity)
    if not weights:
        return torch.zeros((), dtype=torch.float32)
    return _select(torch.cat([weight.float().abs().reshape(-1) for weight in weights]), sparsity)


def _fake_of_list(weights: list[Tensor], sparsity: float) -> Tensor:
    _check_arguments(weights, sparsity)
    return weights[0].new_empty((), dtype=torch.float32) if weights else torch.empty(())


_op = define(
    "magnitude_threshold(Tensor weight, float sparsity, str scope='tensor') -> Tensor", reference=_reference, fake=_fake
)
_op_of_list = define(
    "magnitude_threshold_of_list(Tensor[] weights, float sparsity) -> Tensor",
    reference=_reference_of_list,
    fake=_fake_of_list,
)


@explained_by(_check_arguments)
def magnitude_threshold(weight: Tensor | Sequence[Tensor], sparsity: float, scope: str = "tensor") -> Tensor:
    """The threshold that prunes a fraction `sparsity` of the weights: the k-th smallest `|w|`, k = round(sparsity * n).

    Exact for any number of elements, by two passes of counting and without sorting. `|w| <= threshold` then prunes at
    least k weights, more where several are equal to it. With k = 0 the threshold is 0, which prunes zeros alone. A NaN
    counts as larger than everything.

    Args:
        weight: a tensor of any shape, float32, float16 or bfloat16, or a list of them on one device, taken as one.
        sparsity: in [0, 1).
        scope: "tensor": one threshold for all; "row": one for each row of `weight` `[N, K]`.

    Returns:
        float32 `[]`, or `[N, 1]` for "row".

    Raises:
        TypeError: another dtype.
        ValueError: `sparsity` out of range, an unknown scope, or "row" for what is no matrix.
    """
    if isinstance(weight, (list, tuple)):
        _check_arguments(weight, sparsity, scope)  # here: a list with scope="row" must not pass as one without
        return _op_of_list(list(weight), sparsity)
    return _op(weight, sparsity, scope)

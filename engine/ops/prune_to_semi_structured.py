"""prune_to_semi_structured: of every four weights of a row the two largest, packed with their places (2:4)."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._library import define, explained_by
from engine.ops._semi_structured import group_count, pack_places

NAN_RANK = 0x7F800001  # above infinity, the same for every NaN


def _check_arguments(weight: Tensor) -> None:
    _check.is_float("prune_to_semi_structured", "weight", weight)
    _check.has_shape("prune_to_semi_structured", "weight", weight, ("N", "K"))


def _reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    _check_arguments(weight)
    rows, columns = weight.shape
    groups = group_count(columns)
    padded = torch.nn.functional.pad(weight, (0, 4 * groups - columns)).reshape(rows, groups, 4)
    rank = padded.float().abs().contiguous().view(torch.int32).clamp(max=NAN_RANK)  # magnitudes are ordered as bits
    places = rank.argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    return padded.gather(-1, places).reshape(rows, 2 * groups), pack_places(places)


def _fake(weight: Tensor) -> tuple[Tensor, Tensor]:
    _check_arguments(weight)
    rows, columns = weight.shape
    groups = group_count(columns)
    return weight.new_empty((rows, 2 * groups)), weight.new_empty((rows, (groups + 1) // 2), dtype=torch.uint8)


_op = define(
    "prune_to_semi_structured(Tensor weight) -> (Tensor values, Tensor metadata)", reference=_reference, fake=_fake
)


@explained_by(_check_arguments)
def prune_to_semi_structured(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps the two largest magnitudes of every four weights of a row, and packs them with their places.

    Of equal magnitudes the one in the lower column is kept, and a NaN before any number. A weight that is 2:4 already
    is packed without a loss. Where K is no multiple of 4 the last group counts as padded with zeros: one or two weights
    are kept, of three the two largest. The result takes `1 / 2 + 1 / (8 * itemsize)` of the weight's bytes.

    Args:
        weight: `[N, K]`, float32, float16 or bfloat16.

    Returns:
        `values`, `[N, 2 * ceil(K / 4)]` of the weight's dtype, the two of each group in the order of their columns; and
        `metadata`, uint8 `[N, ceil(K / 8)]`: value i of a row stands at place
        `metadata[i // 4] >> (2 * (i % 4)) & 3` of group `i // 2`.

    Raises:
        TypeError: `weight` has another dtype.
        ValueError: `weight` is no matrix.
    """
    return _op(weight)

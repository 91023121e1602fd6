"""prune_to_bitmap: the weights above a threshold, packed by a bitmask."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._bitmap import pack_mask
from engine.ops._library import define, explained_by
from engine.ops._prune import as_threshold, check_threshold, keep_mask


def _check_arguments(weight: Tensor, threshold: float | Tensor) -> None:
    _check.is_float("prune_to_bitmap", "weight", weight)
    _check.has_shape("prune_to_bitmap", "weight", weight, ("N", "K"))
    check_threshold("prune_to_bitmap", weight, threshold)


def _reference(weight: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_arguments(weight, threshold)
    keep = keep_mask(weight, threshold)
    row_offsets = torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0))
    return pack_mask(keep), row_offsets, weight[keep]


def _fake(weight: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_arguments(weight, threshold)
    rows, columns = weight.shape
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        weight.new_empty((rows, (columns + 7) // 8), dtype=torch.uint8),
        weight.new_empty((rows + 1,), dtype=torch.int64),
        weight.new_empty((nnz,)),
    )


_op = define(
    "prune_to_bitmap(Tensor weight, Tensor threshold) -> (Tensor bitmask, Tensor row_offsets, Tensor values)",
    reference=_reference,
    fake=_fake,
)


@explained_by(_check_arguments)
def prune_to_bitmap(weight: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the weights with `|w| > threshold` and packs them by a bitmask, in one fused step.

    A NaN weight is kept. At sparsity s the result takes `1 - s + 1 / (8 * itemsize)` of the weight's bytes.

    On CUDA the CPU waits once for the GPU, as the size of the result must be known.

    Args:
        weight: `[N, K]`, float32, float16 or bfloat16.
        threshold: a float, or a tensor that broadcasts against `weight`; compared in float32.

    Returns:
        `bitmask`, uint8 `[N, ceil(K / 8)]`, weight k of a row being bit `k % 8` (the least significant first) of byte
        `k // 8`, with zeros beyond K; `row_offsets`, int64 `[N + 1]`, where each row's values begin; and `values`,
        `[nnz]` of the weight's dtype, the kept weights row after row.

    Raises:
        TypeError: `weight` has another dtype.
        ValueError: `weight` is no matrix, or `threshold` does not broadcast against it.
    """
    return _op(weight, as_threshold("prune_to_bitmap", weight, threshold))

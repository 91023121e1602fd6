"""prune_quantize_to_bitmap: the weights above a threshold as int8 with one scale a row, packed by a bitmask."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._bitmap import pack_mask
from engine.ops._library import REFERENCES, define, explained_by
from engine.ops._prune import as_threshold, check_threshold, keep_mask


def _check_arguments(weight: Tensor, threshold: float | Tensor) -> None:
    _check.is_float("prune_quantize_to_bitmap", "weight", weight)
    _check.has_shape("prune_quantize_to_bitmap", "weight", weight, ("N", "K"))
    check_threshold("prune_quantize_to_bitmap", weight, threshold)


def _reference(weight: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_arguments(weight, threshold)
    keep = keep_mask(weight, threshold)
    row_offsets = torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0))
    q, scale = REFERENCES["int8_quantize"](torch.where(keep, weight, 0.0))  # zeros leave the kept weights' amax alone
    return pack_mask(keep), row_offsets, q[keep], scale


def _fake(weight: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_arguments(weight, threshold)
    rows, columns = weight.shape
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        weight.new_empty((rows, (columns + 7) // 8), dtype=torch.uint8),
        weight.new_empty((rows + 1,), dtype=torch.int64),
        weight.new_empty((nnz,), dtype=torch.int8),
        weight.new_empty((rows,), dtype=torch.float32),
    )


_op = define(
    "prune_quantize_to_bitmap(Tensor weight, Tensor threshold)"
    " -> (Tensor bitmask, Tensor row_offsets, Tensor values, Tensor scale)",
    reference=_reference,
    fake=_fake,
)


@explained_by(_check_arguments)
def prune_quantize_to_bitmap(weight: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keeps the weights with `|w| > threshold`, as int8 packed by a bitmask, in one fused step.

    Each row is quantised symmetrically as by `int8_quantize`, its amax taken over the kept weights. A kept weight that
    rounds to 0 stays: its bit is set and a 0 stored. A row with nothing kept has scale 1; a row that keeps a NaN or an
    infinity has scale NaN and zeros. The result is the same to the bit on every backend.

    On CUDA the CPU waits once for the GPU, as the size of the result must be known.

    Args:
        weight: `[N, K]`, float32, float16 or bfloat16.
        threshold: a float, or a tensor that broadcasts against `weight`; compared in float32.

    Returns:
        `bitmask`, uint8 `[N, ceil(K / 8)]`, and `row_offsets`, int64 `[N + 1]`, as `prune_to_bitmap` returns them;
        `values`, int8 `[nnz]`; and `scale`, float32 `[N]`: a kept weight is about `values * scale`.

    Raises:
        TypeError: `weight` has another dtype.
        ValueError: `weight` is no matrix, or `threshold` does not broadcast against it.
    """
    return _op(weight, as_threshold("prune_quantize_to_bitmap", weight, threshold))

"""prune_to_block: whole blocks of a weight, those whose norm is above a threshold."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._block import BLOCK_SHAPE, as_blocks, block_norms, check_block_shape
from engine.ops._library import define, explained_by
from engine.ops._prune import as_threshold, check_threshold, keep_mask

OP = "prune_to_block"


def _check_op(weight: Tensor, keep: Tensor, block_rows: int, block_columns: int) -> None:
    _check.is_dtype(OP, "weight", weight, *_check.FLOAT_DTYPES, torch.int8)
    _check.has_shape(OP, "weight", weight, ("N", "K"))
    check_block_shape(OP, (block_rows, block_columns))
    _check.is_dtype(OP, "keep", keep, torch.bool)
    _check.has_shape(OP, "keep", keep, (-(-weight.shape[0] // block_rows), -(-weight.shape[1] // block_columns)))


def _reference(weight: Tensor, keep: Tensor, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_op(weight, keep, block_rows, block_columns)
    crow_indices = torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0)).to(torch.int32)
    values = as_blocks(weight, block_rows, block_columns)[keep]
    return crow_indices, keep.nonzero()[:, 1].to(torch.int32), values.contiguous()


def _fake(weight: Tensor, keep: Tensor, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_op(weight, keep, block_rows, block_columns)
    count = torch.library.get_ctx().new_dynamic_size()
    return (
        weight.new_empty((keep.shape[0] + 1,), dtype=torch.int32),
        weight.new_empty((count,), dtype=torch.int32),
        weight.new_empty((count, block_rows, block_columns)),
    )


_op = define(
    "prune_to_block(Tensor weight, Tensor keep, SymInt block_rows, SymInt block_columns)"
    " -> (Tensor crow_indices, Tensor col_indices, Tensor values)",
    reference=_reference,
    fake=_fake,
)


def _check_arguments(
    weight: Tensor,
    threshold: float | Tensor | None = None,
    block_shape: tuple[int, int] = BLOCK_SHAPE,
    keep: Tensor | None = None,
) -> None:
    check_block_shape(OP, block_shape)
    _check.expect((threshold is None) != (keep is None), OP, "threshold", "either a threshold or keep", "both or none")
    if keep is not None:
        return _check_op(weight, keep, *block_shape)
    _check.is_float(OP, "weight", weight)
    _check.has_shape(OP, "weight", weight, ("N", "K"))
    assert threshold is not None
    row_blocks, column_blocks = -(-weight.shape[0] // block_shape[0]), -(-weight.shape[1] // block_shape[1])
    check_threshold(OP, weight.new_empty(row_blocks, column_blocks, device="meta"), threshold)


@explained_by(_check_arguments)
def prune_to_block(
    weight: Tensor,
    threshold: float | Tensor | None = None,
    block_shape: tuple[int, int] = BLOCK_SHAPE,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps whole blocks of a weight, those whose root mean square is above the threshold, or those that `keep` names.

    A block with a NaN is kept. The op itself, `torch.ops.engine.prune_to_block`, takes `keep` alone, so that it only
    moves weights and its result is the same to the bit everywhere; the order in which norms are summed differs
    from device to device.

    Args:
        weight: `[N, K]`, float32, float16 or bfloat16; with `keep` also int8.
        threshold: a float, or a tensor that broadcasts against the blocks' norms, `[ceil(N / R), ceil(K / C)]`.
        block_shape: (R, C), multiples of 16 from 16 to 256.
        keep: bool `[ceil(N / R), ceil(K / C)]`, in the place of a threshold.

    Returns:
        `crow_indices`, int32 `[ceil(N / R) + 1]`, where each row of blocks begins; `col_indices`, int32 `[B]`, the
        column of blocks in which each kept one stands, ascending; and `values`, `[B, R, C]` of the weight's dtype, with
        zeros beyond N and K. `torch.sparse_bsr_tensor` takes them where R and C divide N and K.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: `weight` is no matrix, the block shape is another one, or `threshold` or `keep` doesn't fit it.
    """
    _check_arguments(weight, threshold, block_shape, keep)
    if keep is None:
        assert threshold is not None
        norms = block_norms(weight.detach(), block_shape)
        keep = keep_mask(norms, as_threshold(OP, norms, threshold))
    return _op(weight, keep, *block_shape)

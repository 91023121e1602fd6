"""The bitmap form of a sparse matrix [N, K], as every bitmap op takes it, and the checks between it and a kernel.

`bitmask`, uint8 [N, ceil(K / 8)]: weight k of a row is kept where bit `k % 8` (the least significant first) of byte
`k // 8` is set; bits beyond K are 0. `row_offsets`, int64 [N + 1]: where each row's values begin. `values`, [nnz]: the
kept weights, row after row.
"""

import torch
from torch import Tensor

from engine.ops import _check

CHUNK_BYTES = 4 << 20  # of bitmask looked at in one step, so that a check needs little memory


def bitmap_mask(bitmask: Tensor, columns: int) -> Tensor:
    """The bitmask unpacked: bool `[N, columns]`, true where a weight is kept."""
    rows, row_bytes = bitmask.shape
    bits = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    return ((bitmask.unsqueeze(-1) >> bits) & 1).bool().reshape(rows, row_bytes * 8)[:, :columns]


def pack_mask(mask: Tensor) -> Tensor:
    """The bitmask of a bool mask `[N, K]`: the reverse of `bitmap_mask`."""
    rows, columns = mask.shape
    row_bytes = -(-columns // 8)
    padded = torch.nn.functional.pad(mask, (0, row_bytes * 8 - columns)).reshape(rows, row_bytes, 8)
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded * bits).sum(-1, dtype=torch.uint8)


def popcount(bitmask: Tensor) -> Tensor:
    """How many bits of each row of uint8 `[N, B]` are set: int64 `[N]`."""
    pairs = bitmask - ((bitmask >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((nibbles + (nibbles >> 4)) & 0x0F).sum(-1, dtype=torch.int64)


def bitmap_columns(
    bitmask: Tensor, row_offsets: Tensor, values: Tensor, begin: int, end: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns [begin, end) of a bitmap that was checked before: `values`, `bitmask`, `row_offsets`, all copied.

    Never dense: a row's values of these columns are neighbours, and where they begin is a count of bits.
    """
    rows = bitmask.shape[0]
    counts = popcount(first_columns(bitmask, end))
    skipped = popcount(first_columns(bitmask, begin))
    counts = counts - skipped
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    shifts = row_offsets[:-1] + skipped - offsets[:-1]
    kept = values.new_empty(int(offsets[-1]))
    step = max(1, CHUNK_BYTES // max(1, 8 * (end - begin)))  # so many rows that their values' positions are few
    for row in range(0, rows, step):
        first, last = int(offsets[row]), int(offsets[min(rows, row + step)])
        positions = torch.arange(first, last, device=values.device)
        positions += shifts[row : row + step].repeat_interleave(counts[row : row + step])
        torch.index_select(values, 0, positions, out=kept[first:last])
    return kept, first_columns(_shifted(bitmask, begin), end - begin), offsets


def first_columns(bitmask: Tensor, columns: int) -> Tensor:
    """The bitmask of the first `columns` columns, in memory of its own."""
    mask = bitmask[:, : (columns + 7) // 8].clone(memory_format=torch.contiguous_format)
    if columns % 8:
        mask[:, -1] &= (1 << columns % 8) - 1
    return mask


def _shifted(bitmask: Tensor, columns: int) -> Tensor:
    """The bitmask without its first `columns` columns; bits beyond the last column are 0."""
    mask, shift = bitmask[:, columns // 8 :], columns % 8
    if not shift:
        return mask
    following = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    return (mask >> shift) | (following << (8 - shift))


def check_bitmap_metadata(op: str, bitmask: Tensor, row_offsets: Tensor, values: Tensor, columns: int) -> None:
    """Raises TypeError or ValueError unless dtypes and shapes fit together. Reads no data: fine on fake tensors.

    The dtype of `values` is left to the op.
    """
    _check.is_dtype(op, "bitmask", bitmask, torch.uint8)
    _check.is_dtype(op, "row_offsets", row_offsets, torch.int64)
    _check.is_size(op, "columns", columns)
    _check.has_shape(op, "bitmask", bitmask, ("N", (columns + 7) // 8))
    _check.has_shape(op, "row_offsets", row_offsets, (bitmask.shape[0] + 1,))
    _check.has_shape(op, "values", values, ("nnz",))


def check_bitmap(op: str, bitmask: Tensor, row_offsets: Tensor, values: Tensor, columns: int) -> None:
    """Raises ValueError unless the data of a bitmap, whose metadata was checked before, is consistent.

    Offsets run from 0 to nnz without a step back, a row has as many values as bits, no bit beyond `columns` is set.
    """
    rows, nnz = bitmask.shape[0], values.shape[0]
    _check.offsets_rise(op, "row_offsets", row_offsets, nnz, "values")
    lengths = row_offsets.diff()
    step = max(1, CHUNK_BYTES // max(1, bitmask.shape[1]))
    for begin in range(0, rows, step):
        chunk = bitmask[begin : begin + step]
        counts, wanted = popcount(chunk), lengths[begin : begin + step]
        if not torch.equal(counts, wanted):
            at = int((counts != wanted).nonzero()[0])
            expected = f"{int(wanted[at])} bits set in row {begin + at}, as many as row_offsets gives it values"
            _check.expect(False, op, "bitmask", expected, int(counts[at]))
        if columns % 8 and bool((chunk[:, -1] >> (columns % 8)).any()):
            row = begin + int((chunk[:, -1] >> (columns % 8)).nonzero()[0])
            _check.expect(False, op, "bitmask", f"no bit set beyond column {columns}", f"one in row {row}")

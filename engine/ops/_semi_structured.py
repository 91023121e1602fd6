"""The 2:4 form of a matrix [N, K], as every semi_structured op takes it, and the checks between it and a kernel.

Of every four weights of a row, two are stored. K counts as padded with zeros to G = ceil(K / 4) groups of four.

`values`, `[N, 2 G]`: the two kept weights of each group, in the order of their columns.
`metadata`, uint8 `[N, ceil(G / 2)]`: where in its group each of them stands, two bits a value, the least significant
first: value i is at place `metadata[i // 4] >> (2 * (i % 4)) & 3` of group `i // 2`. The places of a group ascend; a
half byte beyond the last group is 0b0100 (places 0 and 1). These are the bits of PyTorch's and NVIDIA's own metadata
(`mma.sp`), before a device's tiles reorder them.
"""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._linear import DENSE_AT_ONCE

PADDING = 0b0100  # places 0 and 1
ROWS_BYTES = 4 << 20  # of metadata looked at in one step, so that a check needs little memory


def group_count(columns: int) -> int:
    """G: groups of four in a row, the last one perhaps padded."""
    return (columns + 3) // 4


def pack_places(places: Tensor) -> Tensor:
    """The metadata of places, int `[N, G, 2]` with numbers from 0 to 3."""
    rows, groups, _ = places.shape
    fields = places.to(torch.uint8)
    halves = fields[..., 0] | (fields[..., 1] << 2)
    halves = torch.nn.functional.pad(halves, (0, groups % 2), value=PADDING).reshape(rows, (groups + 1) // 2, 2)
    return halves[..., 0] | (halves[..., 1] << 4)


def unpack_places(metadata: Tensor, groups: int) -> Tensor:
    """Where in its group each value stands: int64 `[N, groups, 2]`."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=metadata.device)
    fields = (metadata.unsqueeze(-1) >> shifts) & 3
    return fields.reshape(metadata.shape[0], 2 * metadata.shape[1], 2)[:, :groups].long()


def spread(values: Tensor, metadata: Tensor) -> Tensor:
    """The matrix with zeros where pruned, padded to whole groups: `[N, 4 G]`."""
    rows, kept = values.shape
    groups = values.new_zeros(rows, kept // 2, 4)
    groups.scatter_(-1, unpack_places(metadata, kept // 2), values.reshape(rows, kept // 2, 2))
    return groups.reshape(rows, 2 * kept)


def collect(dense: Tensor, metadata: Tensor) -> Tensor:
    """What `dense` `[N, K]` holds at the kept places, 0 beyond K: `[N, 2 G]`. The transpose of `spread`."""
    rows, columns = dense.shape
    groups = group_count(columns)
    values = dense.new_empty(rows, 2 * groups)
    # Places take four bytes a weight: on a CPU those of some rows at a time, which stay in its cache.
    step = max(1, DENSE_AT_ONCE // max(1, columns)) if dense.device.type == "cpu" else max(1, rows)
    for begin in range(0, rows, step):
        some = slice(begin, begin + step)
        padded = torch.nn.functional.pad(dense[some], (0, 4 * groups - columns)).unflatten(1, (groups, 4))
        values[some] = padded.gather(-1, unpack_places(metadata[some], groups)).flatten(1)
    return values


def check_semi_structured_metadata(op: str, values: Tensor, metadata: Tensor, columns: int) -> None:
    """Raises TypeError or ValueError unless dtypes and shapes fit together. Reads no data: fine on fake tensors.

    The dtype of `values` is left to the op.
    """
    _check.is_dtype(op, "metadata", metadata, torch.uint8)
    _check.is_size(op, "columns", columns)
    groups = group_count(columns)
    _check.has_shape(op, "values", values, ("N", 2 * groups))
    _check.has_shape(op, "metadata", metadata, (values.shape[0], (groups + 1) // 2))


def check_semi_structured(op: str, values: Tensor, metadata: Tensor, columns: int) -> None:
    """Raises ValueError unless the data, whose metadata was checked before, is consistent.

    The two places of each group ascend, a half byte beyond the last group is 0b0100, values beyond K are 0.
    """
    rows, groups = metadata.shape[0], group_count(columns)
    step = max(1, ROWS_BYTES // max(1, metadata.shape[1]))
    for begin in range(0, rows, step):
        chunk = metadata[begin : begin + step]
        for shift in (0, 4):
            wrong = (chunk >> shift & 3) >= (chunk >> (shift + 2) & 3)
            if bool(wrong.any()):
                row, byte = wrong.nonzero()[0].tolist()
                got = f"{int(chunk[row, byte]) >> shift & 15:#06b} in row {begin + row}, byte {byte}"
                _check.expect(False, op, "metadata", "two places that ascend", got)
        if groups % 2 and bool((chunk[:, -1] >> 4 != PADDING).any()):
            row = begin + int((chunk[:, -1] >> 4 != PADDING).nonzero()[0])
            _check.expect(False, op, "metadata", f"{PADDING:#06b} beyond the last group", f"another in row {row}")
    if columns % 4:
        beyond = unpack_places(metadata[:, -1:], 2)[:, (groups + 1) % 2] >= columns % 4
        wrong_values = beyond & (values[:, -2:] != 0)
        if bool(wrong_values.any()):
            row = int(wrong_values.nonzero()[0, 0])
            _check.expect(False, op, "values", f"0 at places beyond column {columns}", f"another in row {row}")

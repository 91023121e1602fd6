"""What the matrix products share: how a tile is loaded, and in which order tiles come."""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def is_aligned(*matrices: Tensor) -> bool:
    """Whether descriptors, and 16-byte words, can load the rows of these contiguous matrices."""
    return all(t.numel() > 0 and t.stride(0) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0 for t in matrices)


def operand(t: Tensor, rows: int, columns: int, by_descriptor: bool) -> Tensor | TensorDescriptor:
    """What :func:`load_tile` loads tiles of [rows, columns] from."""
    return TensorDescriptor.from_tensor(t, [rows, columns]) if by_descriptor else t


@triton.jit
def load_tile(
    source,  # [rows, k]: a descriptor, or a pointer to rows every `stride` elements
    row,  # the tile's first
    at,  # the tile's first of k
    rows,
    k,
    stride,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
):
    """[ROWS, BLOCK_K] of `source`; 0 beyond its edges."""
    if BY_DESCRIPTOR:
        tile = source.load([row, at])
    else:
        r = row + tl.arange(0, ROWS)
        c = at + tl.arange(0, BLOCK_K)
        mask = (r < rows)[:, None] & (c < k)[None, :]
        tile = tl.load(source + r.to(tl.int64)[:, None] * stride + c[None, :], mask=mask, other=0)
    return tile


@triton.jit
def tile_of(item, tiles_a, tiles_b, GROUP: tl.constexpr):
    """Row and column of tiles. They go in groups of GROUP rows, column by column, to use the L2 cache again."""
    first = item // (GROUP * tiles_b) * GROUP
    rows = min(tiles_a - first, GROUP)
    within = item % (GROUP * tiles_b)
    return first + within % rows, within // rows

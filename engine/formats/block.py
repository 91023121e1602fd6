"""Block: whole blocks of a weight are kept or pruned, so that what is pruned costs no arithmetic either."""

import contextlib
import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from engine import ops
from engine.formats._common import (
    check_shard,
    check_values,
    check_values_dtype,
    dequantized,
    nbytes_of,
    own,
    quantize_values,
    shard_columns_scales,
    taking_over,
)
from engine.ops import _check
from engine.ops._block import (
    BLOCK_SHAPE,
    block_areas,
    block_norms,
    block_rows_of,
    check_block,
    check_block_metadata,
    check_block_shape,
)
from engine.ops._prune import as_threshold, keep_mask
from engine.ops.block_int8_linear import block_int8_linear_of_patches


@dataclasses.dataclass(eq=False)
class Block:
    """A weight `[N, K]` of which only some blocks `[R, C]` are stored, as in torch.sparse_bsr.

    Attributes:
        values: `[B, R, C]`, block after block: float, or int8 with `scale`.
        crow_indices: int32 `[ceil(N / R) + 1]`: where each row of blocks begins.
        col_indices: int32 `[B]`: the column of blocks in which each stands, ascending.
        rows: N.
        columns: K.
        scale: float32 `[N]` where values are int8, else None.
        input_scale: float32 `[]`: activations are quantised by it (static); None: each row by its own maximum; `[K]`:
            each channel by its own (smoothing), and `values * scale` is the weight times these.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("values", "crow_indices", "col_indices", "scale", "input_scale")

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    rows: int
    columns: int
    scale: Tensor | None = None
    input_scale: Tensor | None = None

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        threshold: Tensor | float,
        values: torch.dtype | None = None,
        input_scale: Tensor | float | None = None,
        scale: Tensor | None = None,
        block_shape: tuple[int, int] = BLOCK_SHAPE,
    ) -> "Block":
        """Prunes the blocks of `weight` `[N, K]` whose root mean square is at most `threshold`, and packs the rest.

        `values`, `input_scale` and `scale` are those of :meth:`engine.formats.Bitmap.from_dense`.
        """
        check_values_dtype("formats.Block", values)
        check_block_shape("formats.Block", block_shape)
        weight = weight.detach()
        if values != torch.int8:
            if input_scale is not None or scale is not None:
                raise ValueError("engine.formats.Block: input_scale and scale go with values=torch.int8")
            crow_indices, col_indices, kept = ops.prune_to_block(weight, threshold, block_shape)
            rows, columns = weight.shape
            return cls(kept.to(values or weight.dtype), crow_indices, col_indices, rows, columns)
        norms = block_norms(weight, block_shape)
        keep = keep_mask(norms, as_threshold("formats.Block", norms, threshold))
        inside = keep.repeat_interleave(block_shape[0], 0).repeat_interleave(block_shape[1], 1)
        pruned = torch.where(inside[: weight.shape[0], : weight.shape[1]], weight, 0)
        if input_scale is not None:
            pruned, input_scale = taking_over("formats.Block", pruned, input_scale)
        q, scale = quantize_values("formats.Block", pruned, scale)
        crow_indices, col_indices, kept = ops.prune_to_block(q, block_shape=block_shape, keep=keep)
        return cls(kept, crow_indices, col_indices, weight.shape[0], weight.shape[1], scale, input_scale)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` with zeros where pruned."""
        dense = ops.block_to_dense(self.crow_indices, self.col_indices, self.values, self.rows, self.columns)
        if self.scale is None:
            return dense.to(dtype)
        return dequantized(dense, self.scale, self.input_scale, dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias` for `x` `[..., K]`."""
        blocks = self.crow_indices, self.col_indices, self.values
        if self.scale is None:
            return ops.block_linear(x, *blocks, self.rows, bias)
        return ops.block_int8_linear(x, *blocks, self.scale, bias, self.input_scale)

    def linear_of_patches(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`linear` for the patches `[B, Ho, Wo, kh, kw, C]` of an image, whose last three dimensions are K."""
        if self.scale is not None and x.device.type == "cpu":
            tensors = self.crow_indices, self.col_indices, self.values, self.scale
            return block_int8_linear_of_patches(x, *tensors, bias, self.input_scale)
        return self.linear(x.flatten(3), bias)

    def shard(self, dim: int, begin: int, end: int) -> "Block":
        """Rows (`dim` 0) or columns (1) [begin, end) as a weight with memory of its own; scales stay.

        Both can be cut between blocks alone.
        """
        where = "formats.Block.shard"
        check_shard(where, dim, begin, end, self.shape)
        size = self.values.shape[1 + dim]
        whole = begin % size == 0 and (end % size == 0 or end == self.shape[dim])
        _check.expect(whole, where, "begin, end", f"multiples of {size}", (begin, end))
        low, high = begin // size, -(-end // size)
        crow_indices, col_indices, values = self.crow_indices.detach(), self.col_indices.detach(), self.values.detach()
        if dim == 0:
            crow_indices = crow_indices[low : high + 1]
            first, last = int(crow_indices[0]), int(crow_indices[-1])
            scale = None if self.scale is None else own(self.scale[begin:end])
            kept = own(values[first:last]), crow_indices - first, own(col_indices[first:last])
            return Block(*kept, end - begin, self.columns, scale, own(self.input_scale))
        inside = (col_indices >= low) & (col_indices < high)
        before = torch.nn.functional.pad(inside.cumsum(0, dtype=crow_indices.dtype), (1, 0))
        kept = values[inside], before[crow_indices.long()], col_indices[inside] - low
        scales = shard_columns_scales(self.scale, self.input_scale, begin, end)
        return Block(*kept, self.rows, end - begin, *scales)

    def check(self) -> None:
        """Raises TypeError or ValueError unless the tensors fit together, naming the one that doesn't."""
        where = "formats.Block"
        check_block_metadata(where, self.crow_indices, self.col_indices, self.values, self.rows, self.columns)
        check_block(where, self.crow_indices, self.col_indices, self.values.shape[2], self.columns)
        check_values(where, self.values, self.scale, self.input_scale, *self.shape)

    @property
    def label(self) -> str:
        """Name with the blocks' shape and the values' dtype, as reports print it."""
        _, high, wide = self.values.shape
        return f"block {high}x{wide} {str(self.values.dtype).removeprefix('torch.')}"

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return (self.rows, self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return nbytes_of(self.values, self.crow_indices, self.col_indices, self.scale, self.input_scale)

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are pruned; of blocks where that can't be told without data, or by these."""
        count, high, wide = self.values.shape
        areas = block_areas(self.rows, self.columns, (high, wide), self.values.device)
        if (self.rows % high or self.columns % wide) and not areas.is_meta:
            # Fake tensors have no data, and `repr` shows layers whose indices nobody has checked.
            with contextlib.suppress(IndexError, RuntimeError):
                kept = areas[block_rows_of(self.crow_indices, count), self.col_indices.long()]
                return 1 - int(kept.sum()) / (self.rows * self.columns)
        return 1 - count / max(1, areas.numel())

"""Bitmap: one bit a weight says whether it is kept, and only kept weights are stored."""

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
    round_to,
    shard_columns_scales,
    taking_over,
)
from engine.ops import _check
from engine.ops._bitmap import bitmap_columns, check_bitmap, check_bitmap_metadata
from engine.ops.bitmap_int8_linear import bitmap_int8_linear_of_patches


@dataclasses.dataclass(eq=False)
class Bitmap:
    """A sparse weight `[N, K]`: a bit for every weight, values for the kept ones.

    At sparsity s it takes `1 - s` values and an eighth of a byte a weight: less than CSR below about 97 %, and the
    kernels expand it in registers.

    Attributes:
        values: kept weights row after row, `[nnz]`: float, or int8 with `scale`.
        bitmask: uint8 `[N, ceil(K / 8)]`, bit j % 8 of byte j // 8 for column j; bits beyond K are 0.
        row_offsets: int64 `[N + 1]`: where each row's values begin.
        columns: K.
        scale: float32 `[N]` where values are int8, else None.
        input_scale: float32 `[]`: activations are quantised by it (static); None: each row by its own maximum; `[K]`:
            each channel by its own (smoothing), and `values * scale` is the weight times these.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("values", "bitmask", "row_offsets", "scale", "input_scale")

    values: Tensor
    bitmask: Tensor
    row_offsets: Tensor
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
    ) -> "Bitmap":
        """Prunes `weight` `[N, K]` where `|w| <= threshold` and packs the rest.

        `values` is the dtype to keep weights in: None for the weight's own, torch.int8 to quantise them in the same
        pass, or another float dtype (bfloat16 halves the bytes of float32, arithmetic stays float32). `input_scale`
        goes with int8 alone, and so does `scale`, float32 `[N]`: values are rounded to multiples of it (and clipped at
        127 of them) instead of by their row's amax. An `input_scale` `[K]`, for each channel, multiplies the weight
        once it is pruned.
        """
        check_values_dtype("formats.Bitmap", values)
        weight = weight.detach()
        if values != torch.int8:
            if input_scale is not None or scale is not None:
                raise ValueError("engine.formats.Bitmap: input_scale goes with values=torch.int8, and so does scale")
            bitmask, row_offsets, kept = ops.prune_to_bitmap(weight, threshold)
            return cls(kept.to(values or weight.dtype), bitmask, row_offsets, weight.shape[1])
        if input_scale is not None:
            before = weight
            weight, input_scale = taking_over("formats.Bitmap", weight, input_scale)
            if input_scale.dim():  # what is kept was decided by the weight as it came
                threshold = torch.where(before.float().abs() <= threshold, torch.inf, -1.0)
        if scale is None:
            bitmask, row_offsets, kept, scale = ops.prune_quantize_to_bitmap(weight, threshold)
        else:
            _check.has_shape("formats.Bitmap", "scale", scale, (weight.shape[0],))
            bitmask, row_offsets, kept = ops.prune_to_bitmap(weight, threshold)
            rows = torch.arange(weight.shape[0], device=scale.device).repeat_interleave(row_offsets.diff())
            scale = scale.index_fill(0, rows[~kept.isfinite()], torch.nan)
            kept = round_to(kept, scale[rows])
        return cls(kept, bitmask, row_offsets, weight.shape[1], scale, input_scale)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` with zeros where pruned."""
        dense = ops.bitmap_to_dense(self.bitmask, self.row_offsets, self.values, self.columns)
        if self.scale is None:
            return dense.to(dtype)
        return dequantized(dense, self.scale, self.input_scale, dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias` for `x` `[..., K]`."""
        if self.scale is None:
            return ops.bitmap_linear(x, self.bitmask, self.row_offsets, self.values, bias)
        return ops.bitmap_int8_linear(
            x, self.bitmask, self.row_offsets, self.values, self.scale, bias, self.input_scale
        )

    def linear_of_patches(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`linear` for the patches `[B, Ho, Wo, kh, kw, C]` of an image, whose last three dimensions are K."""
        if self.scale is not None and x.device.type == "cpu":
            tensors = self.bitmask, self.row_offsets, self.values, self.scale
            return bitmap_int8_linear_of_patches(x, *tensors, bias, self.input_scale)
        return self.linear(x.flatten(3), bias)

    def shard(self, dim: int, begin: int, end: int) -> "Bitmap":
        """Rows (`dim` 0) or columns (1) [begin, end) as a weight with memory of its own; scales stay."""
        check_shard("formats.Bitmap.shard", dim, begin, end, self.shape)
        bitmask, row_offsets, values = self.bitmask.detach(), self.row_offsets.detach(), self.values.detach()
        if dim == 1:
            parts = bitmap_columns(bitmask, row_offsets, values, begin, end)
            scales = shard_columns_scales(self.scale, self.input_scale, begin, end)
            return Bitmap(*parts, end - begin, *scales)
        row_offsets = row_offsets[begin : end + 1]
        first, last = int(row_offsets[0]), int(row_offsets[-1])
        scale = None if self.scale is None else own(self.scale[begin:end])
        values, bitmask = own(values[first:last]), own(bitmask[begin:end])
        return Bitmap(values, bitmask, row_offsets - first, self.columns, scale, own(self.input_scale))

    def check(self) -> None:
        """Raises TypeError or ValueError unless the tensors fit together, naming the one that doesn't.

        Counts the bits of every row, so that whatever passes can be read by a kernel.
        """
        where = "formats.Bitmap"
        check_bitmap_metadata(where, self.bitmask, self.row_offsets, self.values, self.columns)
        check_bitmap(where, self.bitmask, self.row_offsets, self.values, self.columns)
        check_values(where, self.values, self.scale, self.input_scale, *self.shape)

    @property
    def label(self) -> str:
        """Name with the values' dtype, as reports print it."""
        return f"bitmap {str(self.values.dtype).removeprefix('torch.')}"

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return (self.bitmask.shape[0], self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return nbytes_of(self.values, self.bitmask, self.row_offsets, self.scale, self.input_scale)

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are pruned."""
        return 1 - self.values.numel() / max(1, self.bitmask.shape[0] * self.columns)

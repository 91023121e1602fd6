"""SemiStructured: of every four weights of a row two are stored (2:4), each with two bits for its place."""

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
from engine.ops._semi_structured import PADDING, check_semi_structured, check_semi_structured_metadata, collect
from engine.ops.semi_structured_int8_linear import semi_structured_int8_linear_of_patches


@dataclasses.dataclass(eq=False)
class SemiStructured:
    """A 2:4 weight `[N, K]`: half of the values, and an eighth of a byte a weight for their places.

    As small as a Bitmap at 50 %, and faster to multiply by on a CPU: two bits turn into a shuffle without counting. On
    NVIDIA GPUs the pattern that tensor cores know.

    Attributes:
        values: `[N, 2 * ceil(K / 4)]`, the two of each group of four in the order of their columns: float, or int8 with
            `scale`. Beyond K they are 0.
        metadata: uint8 `[N, ceil(K / 8)]`: value i stands at place `metadata[i // 4] >> (2 * (i % 4)) & 3` of its four.
        columns: K.
        scale: float32 `[N]` where values are int8, else None.
        input_scale: float32 `[]`: activations are quantised by it (static); None: each row by its own maximum; `[K]`:
            each channel by its own (smoothing), and `values * scale` is the weight times these.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("values", "metadata", "scale", "input_scale")

    values: Tensor
    metadata: Tensor
    columns: int
    scale: Tensor | None = None
    input_scale: Tensor | None = None

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        values: torch.dtype | None = None,
        input_scale: Tensor | float | None = None,
        scale: Tensor | None = None,
    ) -> "SemiStructured":
        """Keeps the two largest magnitudes of every four weights along K; loses nothing of a weight that is 2:4.

        `values`, `input_scale` and `scale` are those of :meth:`engine.formats.Bitmap.from_dense`.
        """
        check_values_dtype("formats.SemiStructured", values)
        if values != torch.int8 and (input_scale is not None or scale is not None):
            raise ValueError("engine.formats.SemiStructured: input_scale and scale go with values=torch.int8")
        weight = weight.detach()
        kept, metadata = ops.prune_to_semi_structured(weight)
        if values != torch.int8:
            return cls(kept.to(values or weight.dtype), metadata, weight.shape[1])
        if input_scale is not None:
            scaled, input_scale = taking_over("formats.SemiStructured", weight, input_scale)
            if input_scale.dim():  # what is kept was decided by the weight as it came
                kept = collect(scaled, metadata)
        kept, scale = quantize_values("formats.SemiStructured", kept, scale)
        return cls(kept, metadata, weight.shape[1], scale, input_scale)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` with zeros where pruned."""
        dense = ops.semi_structured_to_dense(self.values, self.metadata, self.columns)
        if self.scale is None:
            return dense.to(dtype)
        return dequantized(dense, self.scale, self.input_scale, dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias` for `x` `[..., K]`."""
        if self.scale is None:
            return ops.semi_structured_linear(x, self.values, self.metadata, bias)
        return ops.semi_structured_int8_linear(x, self.values, self.metadata, self.scale, bias, self.input_scale)

    def linear_of_patches(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`linear` for the patches `[B, Ho, Wo, kh, kw, C]` of an image, whose last three dimensions are K."""
        if self.scale is not None and x.device.type == "cpu":
            tensors = self.values, self.metadata, self.scale
            return semi_structured_int8_linear_of_patches(x, *tensors, bias, self.input_scale)
        return self.linear(x.flatten(3), bias)

    def shard(self, dim: int, begin: int, end: int) -> "SemiStructured":
        """Rows (`dim` 0) or columns (1) [begin, end) as a weight with memory of its own; scales stay.

        Columns can be cut at multiples of 8, where a byte of metadata begins, and before the end at multiples of 4.
        """
        where = "formats.SemiStructured.shard"
        check_shard(where, dim, begin, end, self.shape)
        if dim == 0:
            scale = None if self.scale is None else own(self.scale[begin:end])
            values, metadata = own(self.values[begin:end]), own(self.metadata[begin:end])
            return SemiStructured(values, metadata, self.columns, scale, own(self.input_scale))
        whole = begin % 8 == 0 and (end % 4 == 0 or end == self.columns)
        _check.expect(whole, where, "begin, end", "multiples of 8 and 4", (begin, end))
        groups = -(-end // 4) - begin // 4
        metadata = own(self.metadata[:, begin // 8 : begin // 8 + (groups + 1) // 2])
        if groups % 2:
            metadata[:, -1] = (metadata[:, -1] & 15) | (PADDING << 4)
        values = own(self.values[:, begin // 2 : begin // 2 + 2 * groups])
        scales = shard_columns_scales(self.scale, self.input_scale, begin, end)
        return SemiStructured(values, metadata, end - begin, *scales)

    def check(self) -> None:
        """Raises TypeError or ValueError unless the tensors fit together, naming the one that doesn't."""
        where = "formats.SemiStructured"
        check_semi_structured_metadata(where, self.values, self.metadata, self.columns)
        check_semi_structured(where, self.values, self.metadata, self.columns)
        check_values(where, self.values, self.scale, self.input_scale, *self.shape)

    @property
    def label(self) -> str:
        """Name with the values' dtype, as reports print it."""
        return f"2:4 {str(self.values.dtype).removeprefix('torch.')}"

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return (self.values.shape[0], self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return nbytes_of(self.values, self.metadata, self.scale, self.input_scale)

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are pruned."""
        return max(0.0, 1 - self.values.shape[1] / max(1, self.columns))

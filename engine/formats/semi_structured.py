"""SemiStructured: of every four weights of a row two are stored (2:4), each with two bits for its place."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from engine import ops
from engine.formats._common import check_scales, nbytes_of, quantize_values
from engine.ops import _check
from engine.ops._semi_structured import check_semi_structured, check_semi_structured_metadata

INT8_HAS_SCALE = ("one for int8 values and none for float values", "the other way round")


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
        input_scale: float32 `[]`: activations are quantised by it (static); None: each row by its own maximum.
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
        if values != torch.int8 and (input_scale is not None or scale is not None):
            raise ValueError("engine.formats.SemiStructured: input_scale and scale go with values=torch.int8")
        kept, metadata = ops.prune_to_semi_structured(weight.detach())
        if values != torch.int8:
            return cls(kept.to(values or weight.dtype), metadata, weight.shape[1])
        kept, scale = quantize_values("formats.SemiStructured", kept, scale)
        if input_scale is not None:
            input_scale = torch.as_tensor(input_scale, dtype=torch.float32, device=weight.device).reshape(())
        return cls(kept, metadata, weight.shape[1], scale, input_scale)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` with zeros where pruned."""
        dense = ops.semi_structured_to_dense(self.values, self.metadata, self.columns)
        return dense.to(dtype) if self.scale is None else ops.int8_dequantize(dense, self.scale, dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias` for `x` `[..., K]`."""
        if self.scale is None:
            return ops.semi_structured_linear(x, self.values, self.metadata, bias)
        return ops.semi_structured_int8_linear(x, self.values, self.metadata, self.scale, bias, self.input_scale)

    def check(self) -> None:
        """Raises TypeError or ValueError unless the tensors fit together, naming the one that doesn't."""
        where = "formats.SemiStructured"
        check_semi_structured_metadata(where, self.values, self.metadata, self.columns)
        _check.is_dtype(where, "values", self.values, *_check.FLOAT_DTYPES, torch.int8)
        check_semi_structured(where, self.values, self.metadata, self.columns)
        _check.expect((self.scale is not None) == (self.values.dtype == torch.int8), where, "scale", *INT8_HAS_SCALE)
        if self.scale is not None:
            check_scales(where, self.scale, self.input_scale, self.values.shape[0])

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

"""Csr: a column index beside every kept weight. For very sparse weights, and exchange with torch.sparse_csr."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from engine import ops
from engine.formats._common import check_shard, nbytes_of, own
from engine.ops import _check
from engine.ops._csr import check_csr, check_csr_metadata
from engine.ops.csr_linear import csr_to_dense


@dataclasses.dataclass(eq=False)
class Csr:
    """A sparse weight `[N, K]` in compressed sparse rows.

    Attributes:
        values: kept weights row after row, float `[nnz]`.
        crow_indices: int32 or int64 `[N + 1]`: where each row's values begin.
        col_indices: the same dtype, `[nnz]`: each value's column.
        columns: K.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("values", "crow_indices", "col_indices")

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    columns: int

    @classmethod
    def from_dense(cls, weight: Tensor, threshold: Tensor | float) -> "Csr":
        """Prunes `weight` `[N, K]` where `|w| <= threshold` and packs the rest."""
        crow_indices, col_indices, values = ops.prune_to_csr(weight.detach(), threshold)
        return cls(values, crow_indices, col_indices, weight.shape[1])

    @classmethod
    def from_sparse_csr(cls, weight: Tensor) -> "Csr":
        """Takes the tensors of a torch.sparse_csr weight, float `[N, K]`, without a copy. `check` looks at them."""
        where, layout = "formats.Csr.from_sparse_csr", getattr(weight, "layout", type(weight).__name__)
        _check.expect(layout == torch.sparse_csr, where, "weight", "a torch.sparse_csr tensor", layout, TypeError)
        _check.has_shape(where, "weight", weight, ("N", "K"))
        format = cls(weight.values(), weight.crow_indices(), weight.col_indices(), weight.shape[1])
        format.check()
        return format

    def to_sparse_csr(self) -> Tensor:
        """The weight as a torch.sparse_csr tensor over the same memory."""
        return torch.sparse_csr_tensor(
            self.crow_indices, self.col_indices, self.values, self.shape, check_invariants=False
        )

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` with zeros where pruned. Indices that do not fit are refused, as by `linear`."""
        return csr_to_dense(self.crow_indices, self.col_indices, self.values, self.columns).to(dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias` for `x` `[..., K]`."""
        return ops.csr_linear(x, self.crow_indices, self.col_indices, self.values, bias)

    def linear_of_patches(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`linear` for the patches `[B, Ho, Wo, kh, kw, C]` of an image, whose last three dimensions are K."""
        return self.linear(x.flatten(3), bias)

    def shard(self, dim: int, begin: int, end: int) -> "Csr":
        """Rows (`dim` 0) or columns (1) [begin, end) as a weight with memory of its own."""
        check_shard("formats.Csr.shard", dim, begin, end, self.shape)
        crow_indices, col_indices, values = self.crow_indices.detach(), self.col_indices.detach(), self.values.detach()
        if dim == 0:
            crow_indices = crow_indices[begin : end + 1]
            first, last = int(crow_indices[0]), int(crow_indices[-1])
            return Csr(own(values[first:last]), crow_indices - first, own(col_indices[first:last]), self.columns)
        inside = (col_indices >= begin) & (col_indices < end)
        before = torch.nn.functional.pad(inside.cumsum(0, dtype=crow_indices.dtype), (1, 0))
        return Csr(values[inside], before[crow_indices.long()], col_indices[inside] - begin, end - begin)

    def check(self) -> None:
        """Raises TypeError or ValueError unless the tensors fit together, naming the one that doesn't."""
        where = "formats.Csr"
        _check.is_float(where, "values", self.values)
        check_csr_metadata(where, self.crow_indices, self.col_indices, self.values)
        check_csr(where, self.crow_indices, self.col_indices, self.columns)

    @property
    def label(self) -> str:
        """Name with the values' dtype, as reports print it."""
        return f"csr {str(self.values.dtype).removeprefix('torch.')}"

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return (self.crow_indices.shape[0] - 1, self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return nbytes_of(self.values, self.crow_indices, self.col_indices)

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are pruned."""
        return 1 - self.values.numel() / max(1, (self.crow_indices.shape[0] - 1) * self.columns)

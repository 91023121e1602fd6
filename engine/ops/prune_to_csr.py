"""prune_to_csr: the weights above a threshold, in compressed sparse rows."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._library import define, explained_by
from engine.ops._prune import as_threshold, check_threshold, keep_mask


def _check_arguments(weight: Tensor, threshold: float | Tensor) -> None:
    _check.is_float("prune_to_csr", "weight", weight)
    _check.has_shape("prune_to_csr", "weight", weight, ("N", "K"))
    check_threshold("prune_to_csr", weight, threshold)


def _index_dtype(weight: Tensor) -> torch.dtype:
    return torch.int32 if weight.numel() < 2**31 else torch.int64


def _reference(weight: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_arguments(weight, threshold)
    keep, dtype = keep_mask(weight, threshold), _index_dtype(weight)
    crow_indices = torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0))
    return crow_indices.to(dtype), keep.nonzero()[:, 1].to(dtype), weight[keep]


def _fake(weight: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_arguments(weight, threshold)
    nnz, dtype = torch.library.get_ctx().new_dynamic_size(), _index_dtype(weight)
    return (
        weight.new_empty((weight.shape[0] + 1,), dtype=dtype),
        weight.new_empty((nnz,), dtype=dtype),
        weight.new_empty((nnz,)),
    )


_op = define(
    "prune_to_csr(Tensor weight, Tensor threshold) -> (Tensor crow_indices, Tensor col_indices, Tensor values)",
    reference=_reference,
    fake=_fake,
)


@explained_by(_check_arguments)
def prune_to_csr(weight: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the weights with `|w| > threshold` in compressed sparse rows, in one fused step.

    A NaN weight is kept. `torch.sparse_csr_tensor(crow_indices, col_indices, values, weight.shape)` takes the result.

    On CUDA the CPU waits once for the GPU, as the size of the result must be known.

    Args:
        weight: `[N, K]`, float32, float16 or bfloat16.
        threshold: a number, or a tensor that broadcasts against `weight`; compared in float32.

    Returns:
        `crow_indices` `[N + 1]`, where each row's values begin; `col_indices` `[nnz]`, each value's column; both int32,
        or int64 where the weight has 2**31 elements or more; and `values` `[nnz]` of the weight's dtype.

    Raises:
        TypeError: `weight` has another dtype.
        ValueError: `weight` is no matrix, or `threshold` does not broadcast against it.
    """
    return _op(weight, as_threshold("prune_to_csr", weight, threshold))

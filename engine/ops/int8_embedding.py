"""int8_embedding: rows of an int8 table, as floats."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._library import define


def _check_metadata(indices: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    _check.is_dtype("int8_embedding", "indices", indices, torch.int32, torch.int64)
    _check.is_dtype("int8_embedding", "weight", weight, torch.int8)
    _check.is_dtype("int8_embedding", "scale", scale, torch.float32)
    _check.is_float_dtype("int8_embedding", dtype)
    _check.has_shape("int8_embedding", "weight", weight, ("rows", "dim"))
    _check.has_shape("int8_embedding", "scale", scale, (weight.shape[0],))


def _check_arguments(indices: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> None:
    _check_metadata(indices, weight, scale, dtype)
    rows = weight.shape[0]
    outside = indices[(indices < 0) | (indices >= rows)]
    if outside.numel():
        expected = f"indices from 0 to {rows - 1}" if rows else "no index, as weight has no rows"
        _check.expect(False, "int8_embedding", "indices", expected, int(outside[0]), IndexError)


def _reference(indices: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check_arguments(indices, weight, scale, dtype)
    return (weight[indices].float() * scale[indices].unsqueeze(-1)).to(dtype)


def _fake(indices: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check_metadata(indices, weight, scale, dtype)
    return weight.new_empty((*indices.shape, weight.shape[1]), dtype=dtype)


_op = define(
    "int8_embedding(Tensor indices, Tensor weight, Tensor scale, ScalarType dtype) -> Tensor",
    check=_check_arguments,
    reference=_reference,
    fake=_fake,
)


def int8_embedding(indices: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Looks up rows of an int8 table, each with a scale of its own: `weight[i] * scale[i]`, in fp32, then cast.

    The result is the same to the bit on every backend.

    Args:
        indices: int32 or int64 of any shape, each from 0 to rows - 1.
        weight: int8 `[rows, dim]`.
        scale: float32 `[rows]`.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        `[..., dim]` of `dtype`, the leading dimensions being those of `indices`.

    Raises:
        IndexError: an index is negative or not below the number of rows. Triton's kernel on a GPU doesn't wait to
            learn that: it reads nothing there and gives a row of NaN.
        TypeError: an argument has another dtype.
        ValueError: `weight` is no matrix, or `scale` has not one value for each of its rows.
    """
    return _op(indices, weight, scale, dtype)

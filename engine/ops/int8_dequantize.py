"""int8_dequantize: int8 rows and their scales back to floats."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._library import define, explained_by


def _check_arguments(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> None:
    _check.is_dtype("int8_dequantize", "q", q, torch.int8)
    _check.is_dtype("int8_dequantize", "scale", scale, torch.float32)
    _check.is_float_dtype("int8_dequantize", dtype)
    _check.expect(q.dim() >= 1, "int8_dequantize", "q", "at least one dimension", list(q.shape))
    _check.has_shape("int8_dequantize", "scale", scale, q.shape[:-1])


def _reference(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check_arguments(q, scale, dtype)
    return (q.float() * scale.unsqueeze(-1)).to(dtype)


def _fake(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check_arguments(q, scale, dtype)
    return q.new_empty(q.shape, dtype=dtype)


_op = define("int8_dequantize(Tensor q, Tensor scale, ScalarType dtype) -> Tensor", reference=_reference, fake=_fake)


@explained_by(_check_arguments)
def int8_dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gives back the floats that :func:`int8_quantize` stands for: `q * scale`, in fp32, then cast.

    A row whose scale is NaN becomes NaN. The result is the same to the bit on every backend.

    Args:
        q: int8 `[..., K]`.
        scale: float32 `[...]`, one for each row of `q`.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        `[..., K]` of `dtype`.

    Raises:
        TypeError: `q`, `scale` or `dtype` is of another dtype.
        ValueError: `q` has no dimension, or `scale` is not of the shape of its rows.
    """
    return _op(q, scale, dtype)

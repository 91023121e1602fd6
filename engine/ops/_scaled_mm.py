"""int8_scaled_mm: the product of rows that are int8 already. For the kernels of int8_linear on CUDA; not public."""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._library import define


def _check_arguments(
    q: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> None:
    op = "int8_scaled_mm"
    for name, matrix in (("q", q), ("weight", weight)):
        _check.is_dtype(op, name, matrix, torch.int8)
        _check.has_shape(op, name, matrix, ("M" if name == "q" else "N", q.shape[-1] if q.dim() else "K"))
    for name, factor, rows in (("token_scale", token_scale, q.shape[0]), ("scale", scale, weight.shape[0])):
        _check.is_dtype(op, name, factor, torch.float32)
        _check.has_shape(op, name, factor, (rows,))
    if bias is not None:
        _check.is_float(op, "bias", bias)
        _check.has_shape(op, "bias", bias, (weight.shape[0],))
    _check.is_float_dtype(op, dtype)


def _reference(
    q: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    _check_arguments(q, token_scale, weight, scale, bias, dtype)
    # float64 holds these sums exactly; rounded once, to fp32. Of one column they may be -0.0, integers not.
    acc = (q.double() @ weight.double().t() + 0.0).float()
    y = acc * (token_scale.unsqueeze(-1) * scale)
    return (y if bias is None else y + bias.float()).to(dtype)


def _fake(
    q: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    _check_arguments(q, token_scale, weight, scale, bias, dtype)
    return q.new_empty((q.shape[0], weight.shape[0]), dtype=dtype)


int8_scaled_mm = define(
    "int8_scaled_mm(Tensor q, Tensor token_scale, Tensor weight, Tensor scale, Tensor? bias, ScalarType dtype)"
    " -> Tensor",
    reference=_reference,
    fake=_fake,
)

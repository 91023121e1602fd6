"""What the formats share."""

import torch
from torch import Tensor

from engine import ops
from engine.ops import _check


def nbytes_of(*tensors: Tensor | None) -> int:
    """Bytes that the tensors hold together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def check_scales(where: str, scale: Tensor | None, input_scale: Tensor | None, rows: int) -> None:
    """Raises unless `scale` is float32 `[rows]`, finite and above 0, and `input_scale`, if any, alike of one."""
    for name, tensor, shape in (("scale", scale, (rows,)), ("input_scale", input_scale, ())):
        if tensor is None:
            _check.expect(name != "scale", where, "scale", "a tensor", None)
            continue
        _check.is_dtype(where, name, tensor, torch.float32)
        _check.has_shape(where, name, tensor, shape)
        _check.expect(bool((tensor.isfinite() & (tensor > 0)).all()), where, name, "finite numbers above 0", "others")


def quantize_values(where: str, values: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """int8 values and the scale of each row of `[N, ...]`: of its amax, or `scale`, by which they are clipped."""
    if scale is None:
        return ops.int8_quantize(values)
    _check.has_shape(where, "scale", scale, (values.shape[0],))
    return (values.float() / scale.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8), scale

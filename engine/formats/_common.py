"""What the formats share."""

from typing import overload

import torch
from torch import Tensor

from engine import ops
from engine.ops import _check


def nbytes_of(*tensors: Tensor | None) -> int:
    """Bytes that the tensors hold together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def taking_over(where: str, weight: Tensor, input_scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """What is to be quantised of `weight` `[N, K]`, and the input's scale as a tensor.

    With one scale for all of the input, `[]`, that is the weight as it is; with one for each channel, `[K]`, it is
    `weight * scale`, as each channel of the input will be divided by its scale (smoothing). One that would make
    every output NaN is refused.
    """
    scale = torch.as_tensor(input_scale, dtype=torch.float32, device=weight.device)
    usable = ((scale > 0) & scale.isfinite() & scale.reciprocal().isfinite()).all()
    expected = "numbers above 0, they and their reciprocals finite"
    got = input_scale if scale.numel() == 1 else "others"
    _check.expect(scale.is_meta or bool(usable), where, "input_scale", expected, got)
    if scale.numel() == 1:
        return weight, scale.reshape(())
    _check.has_shape(where, "input_scale", scale, (weight.shape[1],))
    return weight.float() * scale, scale


def dequantized(values: Tensor, scale: Tensor, input_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]` that multiplies the input as it comes: what `taking_over` did is undone."""
    if input_scale is None or input_scale.dim() == 0:
        return ops.int8_dequantize(values, scale, dtype)
    return (ops.int8_dequantize(values, scale) / input_scale).to(dtype)


def check_scales(where: str, scale: Tensor | None, input_scale: Tensor | None, rows: int, columns: int) -> None:
    """Raises unless `scale` is float32 `[rows]`, finite and above 0, and `input_scale` alike, `[]` or `[columns]`.

    One number is for all of the input, and has no dimension: of a weight of one column it would mean either.
    """
    each = columns if input_scale is not None and input_scale.dim() == 1 and columns != 1 else None
    for name, tensor, shape in (
        ("scale", scale, (rows,)),
        ("input_scale", input_scale, () if each is None else (each,)),
    ):
        if tensor is None:
            _check.expect(name != "scale", where, "scale", "a tensor", None)
            continue
        _check.is_dtype(where, name, tensor, torch.float32)
        _check.has_shape(where, name, tensor, shape)
        _check.expect(bool((tensor.isfinite() & (tensor > 0)).all()), where, name, "finite numbers above 0", "others")


def check_values(
    where: str, values: Tensor, scale: Tensor | None, input_scale: Tensor | None, rows: int, columns: int
) -> None:
    """Raises unless `values` are float and have no scale, or are int8 and have one as `check_scales` wants it."""
    _check.is_dtype(where, "values", values, *_check.FLOAT_DTYPES, torch.int8)
    fits = (scale is not None) == (values.dtype == torch.int8)
    _check.expect(fits, where, "scale", "one for int8 values and none for float values", "the other way round")
    if scale is not None:
        check_scales(where, scale, input_scale, rows, columns)


def check_shard(where: str, dim: int, begin: int, end: int, shape: tuple[int, int]) -> None:
    """Raises ValueError unless [begin, end) lies within dimension `dim` of `shape`."""
    _check.expect(dim in (0, 1), where, "dim", "0 (rows) or 1 (columns)", dim)
    _check.expect(0 <= begin <= end <= shape[dim], where, "begin, end", f"a range in [0, {shape[dim]}]", (begin, end))


@overload
def own(tensor: Tensor) -> Tensor: ...


@overload
def own(tensor: None) -> None: ...


def own(tensor: Tensor | None) -> Tensor | None:
    """A copy of what `tensor` shows, so that the memory that it was cut out of can be freed."""
    return None if tensor is None else tensor.detach().clone(memory_format=torch.contiguous_format)


@overload
def shard_columns_scales(
    scale: Tensor, input_scale: Tensor | None, begin: int, end: int
) -> tuple[Tensor, Tensor | None]: ...


@overload
def shard_columns_scales(
    scale: Tensor | None, input_scale: Tensor | None, begin: int, end: int
) -> tuple[Tensor | None, Tensor | None]: ...


def shard_columns_scales(
    scale: Tensor | None, input_scale: Tensor | None, begin: int, end: int
) -> tuple[Tensor | None, Tensor | None]:
    """The scales of columns [begin, end): the rows' as they are, and the input's for these columns."""
    if input_scale is None or scale is None or input_scale.dim() == 0:
        return own(scale), own(input_scale)
    if end - begin == 1:  # one number stands for a scale of all of the input, by which the rows' aren't divided yet
        one = own(input_scale[begin])
        return scale.detach() / one, one
    return own(scale), own(input_scale[begin:end])


def check_values_dtype(where: str, values: torch.dtype | None) -> None:
    """Raises TypeError unless weights can be kept in the dtype `values`; None stands for the weight's own."""
    known = (None, *_check.FLOAT_DTYPES, torch.int8)
    _check.expect(values in known, where, "values", "a float32, float16, bfloat16 or int8 dtype", values, TypeError)


def quantize_values(where: str, values: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """int8 values and the scale of each row of `[N, ...]`: of its amax, or `scale`, by which they are clipped.

    Either way it is NaN for a row that is not all finite.
    """
    if scale is None:
        return ops.int8_quantize(values)
    _check.has_shape(where, "scale", scale, (values.shape[0],))
    scale = torch.where(values.isfinite().all(1), scale, torch.nan)
    return round_to(values, scale.unsqueeze(1)), scale


def round_to(values: Tensor, scale: Tensor) -> Tensor:
    """`values` as int8 multiples of `scale`, 0 where that is NaN."""
    return (values.float() / scale).round_().clamp_(-127, 127).nan_to_num_(0.0).to(torch.int8)

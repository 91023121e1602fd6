"""DenseInt8: every weight stored, as int8 with one scale a row."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from engine import ops
from engine.formats._common import (
    check_scales,
    check_shard,
    dequantized,
    nbytes_of,
    own,
    quantize_values,
    shard_columns_scales,
    taking_over,
)
from engine.ops import _check
from engine.ops.int8_linear import int8_linear_of_patches

ACTIVATIONS = ("dynamic", "static", "none")


@dataclasses.dataclass(eq=False)
class DenseInt8:
    """A weight `[N, K]` as int8 values with a scale for each of the N rows.

    Attributes:
        values: int8 `[N, K]`.
        scale: float32 `[N]`; a weight is `values * scale`.
        input_scale: float32 `[]`: activations are quantised by it; None: each row by its own maximum; `[K]`: each
            channel by its own (smoothing), and `values * scale` is the weight times these.
        quantize_input: False leaves activations in float ("none"): less error, for memory-bound layers as fast.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("values", "scale", "input_scale")
    label: ClassVar[str] = "int8"

    values: Tensor
    scale: Tensor
    input_scale: Tensor | None = None
    quantize_input: bool = True

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        activation: str = "dynamic",
        input_scale: Tensor | float | None = None,
        scale: Tensor | None = None,
    ) -> "DenseInt8":
        """Quantises `weight` `[N, K]`. `activation` is "dynamic", "static" (then `input_scale` is needed) or "none".

        By `scale`, float32 `[N]`, where it is given: values beyond 127 times it are clipped. Else by each row's amax.
        An `input_scale` `[K]` is for each channel, and multiplies the weight before it is quantised.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(f"engine.formats.DenseInt8: activation: expected one of {ACTIVATIONS}, got {activation!r}")
        if (activation == "static") != (input_scale is not None):
            raise ValueError("engine.formats.DenseInt8: input_scale goes with activation='static', and only with it")
        _check.is_float("formats.DenseInt8", "weight", weight)
        _check.has_shape("formats.DenseInt8", "weight", weight, ("N", "K"))
        if input_scale is not None:
            weight, input_scale = taking_over("formats.DenseInt8", weight.detach(), input_scale)
        values, scale = quantize_values("formats.DenseInt8", weight.detach(), scale)
        return cls(values, scale, input_scale, activation != "none")

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` that the kernels multiply by."""
        return dequantized(self.values, self.scale, self.input_scale, dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias` for `x` `[..., K]`."""
        if self.quantize_input:
            return ops.int8_linear(x, self.values, self.scale, bias, self.input_scale)
        return ops.int8_weight_linear(x, self.values, self.scale, bias)

    def linear_of_patches(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`linear` for the patches `[B, Ho, Wo, kh, kw, C]` of an image, whose last three dimensions are K."""
        if self.quantize_input and x.device.type == "cpu":
            return int8_linear_of_patches(x, self.values, self.scale, bias, self.input_scale)
        return self.linear(x.flatten(3), bias)

    def shard(self, dim: int, begin: int, end: int) -> "DenseInt8":
        """Rows (`dim` 0) or columns (1) [begin, end) as a weight with memory of its own; scales stay."""
        check_shard("formats.DenseInt8.shard", dim, begin, end, self.shape)
        if dim == 0:
            values, scale, input_scale = self.values[begin:end], own(self.scale[begin:end]), own(self.input_scale)
        else:
            values = self.values[:, begin:end]
            scale, input_scale = shard_columns_scales(self.scale, self.input_scale, begin, end)
        return dataclasses.replace(self, values=own(values), scale=scale, input_scale=input_scale)

    def check(self) -> None:
        """Raises TypeError or ValueError unless the tensors fit together, naming the one that doesn't."""
        where = "formats.DenseInt8"
        _check.is_dtype(where, "values", self.values, torch.int8)
        _check.has_shape(where, "values", self.values, ("N", "K"))
        check_scales(where, self.scale, self.input_scale, *self.values.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return (self.values.shape[0], self.values.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return nbytes_of(self.values, self.scale, self.input_scale)

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are not stored: none."""
        return 0.0

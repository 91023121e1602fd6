"""block_int8_linear on NVIDIA GPUs: rows are quantised by one kernel, kept blocks multiplied by a second."""

import torch
from torch import Tensor

from engine.kernels import _device
from engine.kernels._block import check_block, multiply
from engine.kernels._device import expect, own_cuda, same_device
from engine.kernels.int8_quantize import quantize_rows


def block_int8_linear(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    """`engine::block_int8_linear` for CUDA: `x` [..., k], `values` int8 [B, R, C], `scale` float32 [n]."""
    op = "block_int8_linear"
    expect(values.dtype == torch.int8, op, "expected int8 values")
    expect(scale.dtype == torch.float32 and scale.dim() == 1, op, "expected a float32 scale of shape [n]")
    n = scale.shape[0]
    check_block(op, x, crow_indices, col_indices, values, n, bias)
    if input_scale is not None:
        fits = input_scale.numel() == 1 or input_scale.shape == x.shape[-1:]
        fits &= input_scale.dtype == torch.float32
        expect(fits, op, "expected a float32 input_scale of one element or shape [k]")
    same_device(op, x, scale, input_scale)
    flat, y = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous(), x.new_empty((*x.shape[:-1], n))
    if y.numel():
        multiprocessors = _device.describe(x.device).multiprocessors
        q, token_scale = quantize_rows(flat, multiprocessors, input_scale, align=16)
        multiply(q, crow_indices, col_indices, values, token_scale, scale, bias, y)
    return y


def register() -> None:
    """Makes these kernels the owner of `engine::block_int8_linear` for CUDA."""
    own_cuda("block_int8_linear", block_int8_linear)

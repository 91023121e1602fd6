"""csr_linear on NVIDIA GPUs: a program has a row of the weight and some tokens.

It goes through the row's values, some at a time, and multiplies each by its column of x for all its tokens: x is
transposed before, so that those lie side by side, and so is y after. In fp32, like the op: at above 95 % sparsity the
bound is reading x from the L2 cache, 4 B for each product at worst, and no tensor core would be fed. No one has checked
the indices: a row that doesn't fit is NaN, as nothing here waits for the host to raise an error.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import _device
from engine.kernels._device import FLOAT_DTYPES, expect, own_cuda, same_device
from engine.kernels.block_linear import not_finite_kernel
from engine.kernels.int8_quantize import quantize_config

MOST_TOKENS = 64
ELEMENTS = 2048  # products of a step of a program: 4 warps have 16 a thread


@triton.jit(do_not_specialize=["n", "nnz"])
def csr_linear_kernel(
    x,  # [k, m], a float dtype
    crow_indices,  # int32 or int64 [n + 1]
    col_indices,  # of the same [nnz]
    values,  # [nnz], a float dtype
    token_term,  # float32 [m]: 0, or NaN where the token is not finite
    bias,  # [n], a float dtype, or None
    y,  # [n, m], of the dtype of x
    m,
    n,
    k,
    nnz,
    TOKENS: tl.constexpr,
    VALUES: tl.constexpr,  # of a step
):
    """y = sum + bias in float32, then cast."""
    row = tl.program_id(0).to(tl.int64) % n
    token = tl.program_id(0).to(tl.int64) // n * TOKENS + tl.arange(0, TOKENS)
    begin, end = tl.load(crow_indices + row).to(tl.int64), tl.load(crow_indices + row + 1).to(tl.int64)
    bad = (begin < 0) | (end < begin) | (end > nnz)
    bad |= (tl.load(crow_indices).to(tl.int64) != 0) | (tl.load(crow_indices + n).to(tl.int64) != nnz)
    end = tl.where(bad, begin, end)
    outside = tl.zeros([VALUES], tl.int32)
    acc = tl.zeros([VALUES, TOKENS], tl.float32)
    for start in range(begin, end, VALUES):
        at = start + tl.arange(0, VALUES)
        there = at < end
        column = tl.load(col_indices + at, mask=there, other=0).to(tl.int64)
        known = (column >= 0) & (column < k)
        outside |= (known == 0).to(tl.int32)
        value = tl.load(values + at, mask=there, other=0.0).to(tl.float32)
        inside = (there & known)[:, None] & (token < m)[None, :]
        acc += value[:, None] * tl.load(x + column[:, None] * m + token[None, :], mask=inside, other=0.0).to(tl.float32)
    result = tl.sum(acc, axis=0) + tl.load(token_term + token, mask=token < m)
    if bias is not None:
        result += tl.load(bias + row).to(tl.float32)
    result = tl.where(bad | (tl.max(outside, axis=0) != 0), float("nan"), result)
    tl.store(y + row * m + token, result.to(y.dtype.element_ty), mask=token < m)


def csr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`engine::csr_linear` for CUDA: `x` [..., k], float `values` [nnz]."""
    op = "csr_linear"
    expect(x.dtype in FLOAT_DTYPES and x.dim() >= 1, op, "expected a float x")
    expect(values.dtype in FLOAT_DTYPES and values.dim() == 1, op, "expected float values")
    indices = crow_indices.dtype == col_indices.dtype and crow_indices.dtype in (torch.int32, torch.int64)
    expect(indices and crow_indices.dim() == 1 and crow_indices.numel() > 0, op, "expected int32 or int64 indices")
    expect(col_indices.shape == values.shape, op, "expected a column for each value")
    m, n, k = x.shape[:-1].numel(), crow_indices.numel() - 1, x.shape[-1]
    if bias is not None:
        expect(bias.dtype in FLOAT_DTYPES and bias.shape == (n,), op, "expected a float bias of shape [n]")
        bias = bias.contiguous()
    same_device(op, x, crow_indices, col_indices, values, bias)
    flat, y, sizes = x.reshape(m, k).contiguous(), x.new_empty((n, m)), (*x.shape[:-1], n)
    if y.numel() == 0:
        return y.reshape(sizes)
    term = x.new_empty(m, dtype=torch.float32)
    config = quantize_config(m, k, _device.describe(x.device).multiprocessors)
    tokens = min(MOST_TOKENS, triton.next_power_of_2(m))
    with torch.cuda.device_of(x):
        not_finite_kernel[(triton.cdiv(m, config.rows),)](
            flat, term, m, k, ROWS=config.rows, BLOCK=config.block, num_warps=config.warps
        )
        csr_linear_kernel[(n * triton.cdiv(m, tokens),)](
            flat.t().contiguous(),
            crow_indices.contiguous(),
            col_indices.contiguous(),
            values.contiguous(),
            term,
            bias,
            y,
            m,
            n,
            k,
            values.numel(),
            TOKENS=tokens,
            VALUES=min(256, ELEMENTS // tokens),
            num_warps=4,
        )
    return y.t().contiguous().view(sizes)


def register() -> None:
    """Makes these kernels the owner of `engine::csr_linear` for CUDA."""
    own_cuda("csr_linear", csr_linear)

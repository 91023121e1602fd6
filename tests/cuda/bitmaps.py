"""Bitmaps for the tests of the kernels that read them: good ones, and those that lie."""

import torch

from engine.ops._bitmap import pack_mask


def mask_of(n, k, density=0.5):
    """Rows of about the density, some empty, some full."""
    row = torch.where(torch.rand(n, 1) < 0.2, torch.randint(0, 2, (n, 1)).float(), density)
    return torch.rand(n, k) < row


def offsets_of(mask):
    return torch.nn.functional.pad(mask.sum(-1).cumsum(0), (1, 0))


def int8_bitmap(mask):
    """Every int8 value, the extremes often; and a scale a row."""
    offsets = offsets_of(mask)
    values = torch.randint(-128, 128, (int(offsets[-1]),), dtype=torch.int8)
    extreme = torch.tensor([-128, 127], dtype=torch.int8)[torch.randint(0, 2, values.shape)]
    values = torch.where(torch.rand(values.shape) < 0.2, extreme, values)
    return pack_mask(mask), offsets, values, torch.rand(mask.shape[0]) / 100 + 1e-3


def inside(values):
    """The same values as a view into the middle of memory full of others, not aligned, so that a read beyond shows."""
    memory = torch.full((values.numel() + 67,), 77, dtype=values.dtype, device=values.device)
    view = memory[33 : 33 + values.numel()].view(values.shape)
    view.copy_(values)
    return view


def damaged(bitmask, row_offsets, columns):
    """Yields bitmaps [N >= 4, K not a multiple of 8] that lie, and which rows they lie about."""

    def changed(t, index, value):
        t = t.clone()
        t[index] = value
        return t

    far, bit = 2**40, torch.tensor(1 << (columns % 8), dtype=torch.uint8)
    n, nnz = bitmask.shape[0], int(row_offsets[-1])
    yield changed(bitmask, (1, 0), bitmask[1, 0] ^ 1), row_offsets, [1]
    yield changed(bitmask, (2, -1), bitmask[2, -1] | bit), row_offsets, [2]
    yield bitmask, changed(row_offsets, 2, far), [1, 2]
    yield bitmask, changed(row_offsets, 2, -far), [1, 2]
    yield bitmask, row_offsets + 1, list(range(n))
    yield bitmask, row_offsets + far, list(range(n))
    yield bitmask, changed(row_offsets, n, nnz + 1), list(range(n))

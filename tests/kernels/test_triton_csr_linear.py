"""The Triton kernel of csr_linear: interpreted, compiled for GPUs that are not there, and run where one is."""

import itertools

import pytest
import torch
from tolerance import assert_as_good_as_torch
from triton_tools import compile_launches, compiled, hopper_first, interpreted, meta, needs_gpu

pytest.importorskip("triton")
from engine.kernels.csr_linear import csr_linear
from engine.ops._check import FLOAT_DTYPES

CASES = [(0, 5, 8), (3, 0, 8), (3, 5, 0), (1, 1, 1), (1, 40, 700), (5, 70, 130), (70, 9, 300)]  # M, N, K


def csr(n, k, dtype, index=torch.int32, density=0.1):
    mask = torch.rand(n, k) < torch.where(torch.rand(n, 1) < 0.3, torch.randint(0, 2, (n, 1)), density)
    crow = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(index)
    return torch.randn(n, k).where(mask, 0.0).to(dtype), crow, mask.nonzero()[:, 1].to(index), mask


def check(m, n, k, dtype, values_dtype, bias=None, index=torch.int32, device="cpu"):
    dense, crow, col, mask = csr(n, k, values_dtype, index)
    x, b = torch.randn(m, k).to(dtype), None if bias is None else torch.randn(n).to(bias)
    args = [None if t is None else t.to(device) for t in (x, crow, col, dense[mask], b)]
    truth = x.double() @ dense.double().t() + (0 if b is None else b.double())
    own = torch.nn.functional.linear(x, dense.to(dtype), None if b is None else b.to(dtype))
    assert_as_good_as_torch(csr_linear(*args).cpu(), truth, own)


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_is_as_good_as_torch(case):
    i = CASES.index(case)
    check(
        *case, FLOAT_DTYPES[i % 3], FLOAT_DTYPES[i % 3], (None, *FLOAT_DTYPES)[i % 4], (torch.int32, torch.int64)[i % 2]
    )


@interpreted
def test_every_dtype_and_leading_dimensions():
    for x, values in zip(FLOAT_DTYPES, FLOAT_DTYPES[1:] + FLOAT_DTYPES[:1], strict=True):
        check(3, 6, 50, x, values, torch.float32)
    dense, crow, col, mask = csr(6, 30, torch.float32)
    x = torch.randn(2, 30, 4).transpose(1, 2)
    torch.testing.assert_close(csr_linear(x, crow, col, dense[mask]), x @ dense.t())


@interpreted
def test_rows_that_are_not_numbers_do_not_leak():
    dense, crow, col, mask = csr(20, 40, torch.float32)
    x = torch.randn(6, 40)
    x[1, 39], x[3, 0], x[4, 20] = torch.nan, torch.inf, -torch.inf
    y = csr_linear(x, crow, col, dense[mask])
    assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [False, True, False, True, True, False]


@interpreted
def test_indices_that_lie_read_nothing_and_give_nan():
    mask = torch.ones(4, 10, dtype=torch.bool)
    crow, col, values = torch.arange(5) * 10, mask.nonzero()[:, 1], torch.randn(40)
    x = torch.randn(3, 10)
    good = csr_linear(x, crow, col, values)
    for where, index, value, bad in (
        (col, 3, 10, [0]),
        (col, 15, -1, [1]),
        (col, 0, 2**40, [0]),
        (crow, 2, 2**40, [1, 2]),
        (crow, 2, -5, [1, 2]),
        (crow, 0, 1, [0, 1, 2, 3]),
        (crow, 4, 39, [0, 1, 2, 3]),
    ):
        damaged = where.clone()
        damaged[index] = value
        y = csr_linear(x, *((damaged, col) if where is crow else (crow, damaged)), values)
        fine = [i for i in range(4) if i not in bad]
        assert y[:, bad].isnan().all() and torch.equal(y[:, fine], good[:, fine])


@interpreted
def test_refuses():
    dense, crow, col, mask = csr(4, 10, torch.float32)
    x, values = torch.randn(3, 10), dense[mask]
    for args in (
        (x.double(), crow, col, values),
        (x, crow.long(), col, values),
        (x, crow.short(), col.short(), values),
        (x, crow, col[1:], values),
        (x, crow, col, values.double()),
        (x, crow, col, values, torch.ones(3)),
        (x, crow, col, values.to("meta")),
    ):
        with pytest.raises(RuntimeError, match="csr_linear: expected"):
            csr_linear(*args)


@compiled
@hopper_first
@pytest.mark.parametrize("m", [64, pytest.param(1, marks=pytest.mark.slow)])
def test_compiles_to_vectors_without_spills(card, m):
    nnz = 1 << 20
    x, index = meta((m, 8192), torch.bfloat16), meta((nnz,), torch.int32)
    _, binary = compile_launches(card, csr_linear, x, meta((8193,), torch.int32), index, meta((nnz,), torch.bfloat16))
    assert m == 1 or binary.count("LDG.E.128")


@needs_gpu
def test_on_a_gpu():
    for case, dtype in itertools.product([*CASES, (300, 512, 1024)], FLOAT_DTYPES):
        check(*case, dtype, dtype, torch.float32, torch.int64, "cuda")

"""The Triton kernels of block_linear and block_int8_linear: interpreted, compiled for absent GPUs, run where one is."""

import itertools

import pytest
import torch
from tolerance import assert_as_good_as_torch
from triton_tools import (
    ALL_CARDS,
    compile_launches,
    compiled,
    hopper_first,
    interpreted,
    meta,
    needs_gpu,
    same_bits,
)

pytest.importorskip("triton")
from engine.kernels import _block
from engine.kernels._device import H200
from engine.kernels.block_int8_linear import block_int8_linear
from engine.kernels.block_linear import block_linear
from engine.ops._block import from_blocks
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.prune_to_block import _reference as prune_to_block

int8_reference = REFERENCES["block_int8_linear"]

CASES = [  # M, N, K, the blocks' shape: each with why it is there
    (0, 5, 8, (16, 16)),  # an empty batch
    (3, 0, 8, (16, 16)),  # no outputs
    (3, 5, 0, (16, 16)),  # no inputs
    (1, 1, 1, (16, 16)),  # one of each
    (5, 70, 96, (32, 32)),  # swapped; rows that end within a block
    (3, 100, 130, (48, 16)),  # rows that are no power of two; odd columns
    (40, 40, 65, (16, 48)),  # not swapped; columns that no power of two divides well
    (130, 300, 288, (256, 96)),  # two tiles of tokens, blocks of more rows than a tile
    (65, 64, 256, (32, 256)),  # several steps a block
]


def blocks(n, k, shape, dtype, fraction=0.5):
    weight = torch.randint(-128, 128, (n, k)) if dtype == torch.int8 else torch.randn(n, k)
    keep = torch.rand(-(-n // shape[0]), -(-k // shape[1])) < fraction
    return prune_to_block(weight.to(dtype), keep, *shape)


def moved(args, device):
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]


def check(m, n, k, shape, dtype, values_dtype, bias=None, device="cpu"):
    x, b = torch.randn(m, k).to(dtype), None if bias is None else torch.randn(n).to(bias)
    kept = blocks(n, k, shape, values_dtype)
    got = block_linear(*moved((x, *kept, n, b), device)).cpu()
    dense = from_blocks(*kept, n, k)
    truth = x.double() @ dense.double().t() + (0 if b is None else b.double())
    own = torch.nn.functional.linear(x, dense.to(dtype), None if b is None else b.to(dtype))
    assert_as_good_as_torch(got, truth, own)


def check_int8(m, n, k, shape, dtype, bias=None, s=None, device="cpu"):
    x, scale = torch.randn(m, k).to(dtype), torch.rand(n)
    args = (x, *blocks(n, k, shape, torch.int8), scale, None if bias is None else torch.randn(n).to(bias), s)
    same_bits(block_int8_linear(*moved(args, device)).cpu(), int8_reference(*args))


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_int8_is_reference_to_the_bit(case):
    i = CASES.index(case)
    check_int8(*case, FLOAT_DTYPES[i % 3], (None, *FLOAT_DTYPES)[i % 4], torch.tensor([0.01]) if i % 2 else None)


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_is_as_good_as_torch(case):
    i = CASES.index(case)
    check(*case, FLOAT_DTYPES[i % 3], FLOAT_DTYPES[i % 3], (None, *FLOAT_DTYPES)[i % 4])


@interpreted
def test_a_scale_for_each_channel():
    channels = torch.rand(130) / 20 + 1e-3
    for m, k in ((3, 130), (40, 65)):
        check_int8(m, 70, k, (32, 32), torch.float32, None, channels[:k])
    check_int8(3, 70, 130, (32, 32), torch.float32, None, channels.index_fill(0, torch.tensor(129), 0.0))


@interpreted
def test_every_dtype():
    for x, values in itertools.product(FLOAT_DTYPES, FLOAT_DTYPES):
        check(3, 20, 50, (16, 16), x, values, torch.float32)


@interpreted
def test_rows_that_are_not_numbers_do_not_leak():
    x = torch.randn(6, 40)
    x[1, 39], x[3, 0], x[4, 20] = torch.nan, torch.inf, -torch.inf
    for fraction in (0.0, 0.5, 1.0):
        kept = blocks(20, 40, (16, 16), torch.float32, fraction)
        y = block_linear(x, *kept, 20, None)
        assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [False, True, False, True, True, False]
        args = (x, *blocks(20, 40, (16, 16), torch.int8, fraction), torch.ones(20))
        same_bits(block_int8_linear(*args), int8_reference(*args))


@interpreted
def test_what_a_block_holds_beyond_the_matrix_does_not_count():
    crow, col, values = blocks(20, 40, (16, 16), torch.float32, 1.0)
    want = block_linear(torch.ones(3, 40), crow, col, values, 20, None)
    values[3:, 4:], values[2::3, :, 8:] = torch.nan, torch.inf
    same_bits(block_linear(torch.ones(3, 40), crow, col, values, 20, None), want)


@interpreted
@pytest.mark.parametrize("k", [1040, pytest.param(140_032, marks=pytest.mark.slow)])
def test_long_sums_are_added_in_parts(k, monkeypatch):
    if k < _block.LONGEST_SUM:
        monkeypatch.setattr(_block, "LONGEST_SUM", 512)
    keep = torch.ones(1, -(-k // 256), dtype=torch.bool)
    kept = prune_to_block(torch.full((1, k), -128, dtype=torch.int8), keep, 16, 256)
    y = block_int8_linear(torch.ones(1, k), *kept, torch.tensor([127.0]))
    assert y.item() == torch.tensor(-128.0 * 127 * k, dtype=torch.float32)


@interpreted
def test_indices_outside_read_nothing_and_give_nan():
    crow, col, values = blocks(32, 32, (16, 16), torch.float32, 1.0)
    x = torch.randn(3, 32)
    good = block_linear(x, crow, col, values, 32, None)
    for where, index, value in ((col, 0, 2), (col, 1, -1), (col, 0, 2**31 - 1), (crow, 0, -5), (crow, 0, 2**30)):
        damaged = where.clone()
        damaged[index] = value
        y = block_linear(x, *((damaged, col) if where is crow else (crow, damaged)), values, 32, None)
        assert y[:, :16].isnan().all()
        same_bits(y[:, 16:], good[:, 16:])


@interpreted
def test_refuses():
    x, (crow, col, values), scale = torch.randn(3, 32), blocks(32, 32, (16, 16), torch.int8), torch.ones(32)
    for args in (
        (x.double(), crow, col, values, scale),
        (x, crow.long(), col, values, scale),
        (x, crow[:1], col, values, scale),
        (x, crow, torch.cat([col, col]), values, scale),
        (x, crow, col, values.short(), scale),
        (x, crow, col, values[:, :8], scale),
        (x, crow, col, values, scale[:3]),
        (x, crow, col, values, scale.to("meta")),
        (x, crow, col, values, scale, torch.ones(3)),
        (x, crow, col, values, scale, None, torch.ones(2)),
        (x, crow, col, values, scale, None, torch.ones(1, 32)),
    ):
        with pytest.raises(RuntimeError, match="block_int8_linear: expected"):
            block_int8_linear(*args)
    with pytest.raises(RuntimeError, match="block_linear: expected"):
        block_linear(x, crow, col, values, 32, None)


@compiled
def test_config():
    large = _block.block_config(8192, 8192, 128, 128, torch.int8, H200)
    assert (large.swapped, large.tokens, large.rows, large.block_k) == (False, 256, 128, 128)
    assert _block.block_config(1, 8192, 32, 32, torch.bfloat16, H200).swapped
    sizes = range(16, 257, 16)
    dtypes = (torch.int8, torch.bfloat16, torch.float32)
    for m, rows, columns, dtype, card in itertools.product((1, 33, 5000), sizes, sizes, dtypes, ALL_CARDS):
        config = _block.block_config(m, 10**6, rows, columns, dtype, card)
        assert columns % config.block_k == 0 or (dtype == torch.int8 and config.block_k == 32)
        assert config.stages * (config.tokens + config.rows) * config.block_k * dtype.itemsize <= card.shared_memory


def compile_for(card, m, n, k, shape, dtype):
    count = -(-n // shape[0]) * -(-k // shape[1]) // 2
    indices = meta((-(-n // shape[0]) + 1,), torch.int32), meta((count,), torch.int32)
    x = meta((m, k), torch.bfloat16 if dtype == torch.int8 else dtype)
    values, bias = meta((count, *shape), dtype), meta((n,), torch.bfloat16)
    if dtype == torch.int8:
        return compile_launches(card, block_int8_linear, x, *indices, values, meta((n,)), bias)[-1]
    return compile_launches(card, block_linear, x, *indices, values, n, bias)[-1]


@compiled
@hopper_first
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_compiles_to_tensor_core_instructions_without_spills(card, dtype):
    binary = compile_for(card, 8192, 8192, 8192, (128, 128), dtype)
    names = (
        {torch.int8: "IGMMA", torch.bfloat16: "HGMMA"} if card == H200 else {torch.int8: "IMMA", torch.bfloat16: "HMMA"}
    )
    assert binary.count(names[dtype])
    assert binary.count("UTMALDG" if card == H200 else "LDGSTS.E.BYPASS.128") and binary.count("STG.E.128")


@compiled
@hopper_first
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.int8, *FLOAT_DTYPES])
@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (256, 256)], ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 8192), (40, 1001), (64, 200_000), (4096, 8192)])
def test_every_configuration_compiles_without_spills(card, dtype, shape, m, k):
    compile_for(card, m, 1024, k, shape, dtype)


@needs_gpu
def test_on_a_gpu():
    for case, dtype in itertools.product([*CASES, (300, 512, 1024, (128, 128))], FLOAT_DTYPES):
        check_int8(*case, dtype, torch.float32, device="cuda")
        check(*case, dtype, dtype, torch.float32, device="cuda")

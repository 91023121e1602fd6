"""The Triton kernels of int8_linear: interpreted, compiled for GPUs that are not there, and run where one is."""

import itertools

import pytest
import torch
from shapes import LINEARS
from triton_tools import (
    ALL_CARDS,
    compile_launches,
    compiled,
    each_card,
    interpreted,
    meta,
    needs_gpu,
    quick_first,
    same_bits,
)

pytest.importorskip("triton")
from engine.kernels import int8_linear as module
from engine.kernels._device import A100, H200
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES

reference = REFERENCES["int8_linear"]
# What the shared shapes leave out.
MORE = {
    (130, 300, 272): "two tiles each way, aligned rows: descriptors and the unswapped order",
    (200, 530, 64): "more tiles than programs",
    (3, 130, 2064): "aligned, K split, the last part short",
}
GEMMS = [  # M, N, K: one for each kind of configuration
    (8192, 8192, 8192),
    (1, 8192, 8192),
    (64, 5120, 13824),
    (256, 5120, 13824),
    *(
        pytest.param(shape, marks=pytest.mark.slow)
        for shape in ((128, 5120, 13824), (500, 400, 400), (100, 4096, 200000), (999, 9, 7), (100, 1000, 140001))
    ),
]


def arguments(m, n, k, dtype, bias=None, input_scale=None):
    x, weight, scale = torch.randn(m, k).to(dtype), torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n)
    return [x, weight, scale, None if bias is None else torch.randn(n).to(bias), input_scale]


def check(args, device="cpu"):
    got = module.int8_linear(*(None if a is None else a.to(device) for a in args))
    same_bits(got.cpu(), reference(*args))


@interpreted
@pytest.mark.parametrize("shape", quick_first([*LINEARS, *MORE]))
def test_interpreted_is_reference_to_the_bit(shape):
    which = [*LINEARS, *MORE].index(shape)
    dtype, bias = FLOAT_DTYPES[which % 3], (None, *FLOAT_DTYPES)[which % 4]
    check(arguments(*shape, dtype, bias, torch.tensor(0.01) if which % 2 else None))


@interpreted
def test_every_dtype():
    for i, (dtype, bias) in enumerate(itertools.product(FLOAT_DTYPES, (None, *FLOAT_DTYPES))):
        check(arguments(3, 7, 48, dtype, bias, torch.tensor([[0.01]]) if i % 2 else None))


@interpreted
def test_rows_that_are_not_numbers_do_not_leak():
    for m in (5, 130):
        args = arguments(m, 9, 48, torch.float32, torch.float32)
        args[0][1, 5], args[0][3, 47] = torch.nan, -torch.inf
        check(args)
        assert module.int8_linear(*args).isnan().all(1).nonzero().flatten().tolist() == [1, 3]
        for bad in (0.0, torch.nan, torch.inf):
            check([*args[:4], torch.tensor([bad])])
            check([*args[:4], torch.full((48,), 0.02).index_fill(0, torch.tensor(40), bad)])
        check([*args[:4], torch.rand(48) / 20 + 1e-3])


@interpreted
def test_the_sum_is_exact_beyond_int32(monkeypatch):
    assert module.gemm_config(1, 2, 140_000, True, H200).splits > 1
    few_blocks = module.GemmConfig(True, 2, 1, 16384, splits=2, warps=4, stages=2, blocks_per_multiprocessor=1)
    monkeypatch.setattr(module, "gemm_config", lambda *_: few_blocks)
    for k in (140_000, 140_001):
        x, weight = torch.ones(1, k), torch.full((2, k), -128, dtype=torch.int8)
        weight[1, 0] = 1
        y = module.int8_linear(x, weight, torch.tensor([127.0, 127.0]))
        assert torch.equal(y, torch.tensor([[-128.0 * 127 * k, -128.0 * 127 * (k - 1) + 127]], dtype=torch.float32))


@interpreted
def test_strides_and_leading_dimensions():
    x, weight, scale, bias, _ = arguments(30, 20, 33, torch.float16, torch.float32)
    check([x.reshape(2, 3, 5, 33).transpose(0, 2), weight, scale, bias])
    check([x[0], weight, scale, bias])
    check([x, torch.randint(-9, 9, (33, 20), dtype=torch.int8).t(), torch.rand(40)[::2], torch.rand(40)[::2]])
    base = torch.randint(-9, 9, (20 * 32 + 1,), dtype=torch.int8)
    check([x[:, :32], base[1:].view(20, 32), scale, bias])  # rows of 32, but not where a descriptor may begin


@interpreted
def test_refuses():
    x, weight, scale, bias, _ = arguments(3, 4, 5, torch.float32, torch.float32)
    for args in (
        (x.double(), weight, scale),
        (x[:, :4], weight, scale),
        (x, weight.float(), scale),
        (x, weight[0], scale),
        (x, weight, scale[:3]),
        (x, weight, scale.half()),
        (x, weight, scale, bias[:3]),
        (x, weight, scale, bias.double()),
        (x, weight, scale, bias, torch.ones(2)),
        (x, weight, scale, bias, torch.ones(1, 5)),
        (x, weight, scale, bias, torch.ones(5).double()),
        (x, weight, scale.to("meta")),
    ):
        with pytest.raises(RuntimeError, match="int8_linear: expected"):
            module.int8_linear(*args)


@compiled
def test_config():
    prefill = module.gemm_config(8192, 8192, 8192, True, H200)
    assert (prefill.swapped, prefill.block_a, prefill.block_b, prefill.splits) == (False, 128, 128, 1)
    decode = module.gemm_config(64, 5120, 13824, True, H200)
    assert (decode.swapped, decode.block_b) == (True, 64)
    programs = decode.tiles(64, 5120) * decode.splits
    assert 1.5 * H200.multiprocessors <= programs <= decode.blocks_per_multiprocessor * H200.multiprocessors
    assert module.gemm_config(64, 5120, 13824, True, H200) == decode, "a pure function"
    shapes = itertools.product((1, 16, 127, 128, 200, 300, 5000), (1, 33, 8192), (0, 1, 16, 1024))
    for device, (m, n, k) in itertools.product(ALL_CARDS, shapes):
        for longer in (k, k + 131072, k + 10**6):
            for aligned in {longer > 0 and longer % 16 == 0, False}:
                config = module.gemm_config(m, n, longer, aligned, device)
                part = config.k_per_split(longer)
                assert part <= module.LONGEST_SUM and part * config.splits >= longer and part % config.block_k == 0
                tile = (config.block_a + config.block_b) * config.block_k
                assert config.stages * tile * config.blocks_per_multiprocessor <= device.shared_memory


@compiled
def test_when_the_library_multiplies(monkeypatch):
    monkeypatch.setattr(module, "_library_multiplies", lambda: True)
    assert module.use_library(8192, 8192, 8192, True, H200) and module.use_library(128, 5120, 13824, True, H200)
    for m, n, k, aligned, card in (
        (64, 8192, 8192, True, H200),
        (1024, 384, 384, True, H200),
        (8192, 8192, 8192, False, H200),
        (8192, 8192, 131072, True, H200),
        (8192, 8192, 20, True, H200),
        (8192, 8192, 8192, True, A100),
    ):
        assert not module.use_library(m, n, k, aligned, card)
    monkeypatch.setattr(module, "_library_multiplies", lambda: False)
    assert not module.use_library(8192, 8192, 8192, True, H200)


@compiled
@each_card
@pytest.mark.parametrize("shape", GEMMS, ids=str)
def test_compiles_to_tensor_core_instructions_without_spills(card, shape):
    m, n, k = shape
    x, weight = meta((m, k), torch.bfloat16), meta((n, k), torch.int8)
    _, gemm = compile_launches(card, module.int8_linear, x, weight, meta((n,)), meta((n,), torch.bfloat16))
    assert gemm.count("IGMMA" if card == H200 else "IMMA")
    assert gemm.count("FFMA") == 0  # y is rounded after each operation
    if (
        module.gemm_config(m, n, k, True, card).splits > 1
    ):  # parts: written, seen by the whole block, then counted for the whole card
        before, atomic, _ = gemm.ptx.partition("atom.global.gpu.acq_rel")
        assert atomic and "bar.sync" in before[before.rindex("st.global") :]
    if k % 16 == 0:
        assert gemm.count("UTMALDG" if card == H200 else "LDGSTS.E.BYPASS.128")
        assert gemm.count("STG.E.128")


@needs_gpu
def test_on_a_gpu_is_reference_to_the_bit():
    for shape in (*LINEARS, *MORE, (257, 1000, 4096), (640, 3392, 1040), (64, 1000, 4096), (2, 100, 140_000)):
        for dtype in FLOAT_DTYPES:
            check(arguments(*shape, dtype, torch.float32), "cuda")
        check(arguments(*shape, torch.bfloat16, torch.bfloat16, torch.tensor(0.01)), "cuda")
        check(arguments(*shape, torch.float16, None, torch.rand(shape[-1]) / 20 + 1e-3), "cuda")


@needs_gpu
def test_a_captured_graph_replays():
    x, *rest = (None if a is None else a.cuda() for a in arguments(4, 512, 4096, torch.float32, torch.float32))
    module.int8_linear(x, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module.int8_linear(x, *rest)
    for _ in range(3):
        x.normal_()
        graph.replay()
        same_bits(y.cpu(), module.int8_linear(x, *rest).cpu())

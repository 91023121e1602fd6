"""The Triton kernels of int8_weight_linear: interpreted, compiled for GPUs that are not there, and run where one is."""

import itertools

import pytest
import torch
from shapes import LINEARS
from tolerance import assert_as_good_as_torch
from triton_tools import ALL_CARDS, compile_launches, compiled, each_card, interpreted, meta, needs_gpu, quick_first

pytest.importorskip("triton")
from engine.kernels import int8_weight_linear as module
from engine.kernels._device import H200
from engine.ops._check import FLOAT_DTYPES

MORE = {
    (130, 140, 272): "two tiles each way, aligned rows: descriptors",
    (3, 130, 2064): "aligned, K split, the last part short",
    (1, 30, 2064): "one token, several blocks of K",
}


def arguments(m, n, k, dtype, bias=None):
    x, weight, scale = torch.randn(m, k).to(dtype), torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n)
    return [x, weight, scale / 100 + 1e-3, None if bias is None else torch.randn(n).to(bias)]


def truth_of(x, weight, scale, bias=None):
    """The result in float64, and PyTorch's own in the dtype of x."""
    dense = weight.double() * scale.double().unsqueeze(-1)
    y = x.double() @ dense.t() + (0 if bias is None else bias.double())
    own = torch.nn.functional.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return torch.where(x.isfinite().all(-1, keepdim=True), y, torch.nan), own


def check(args, device="cpu"):
    got = module.int8_weight_linear(*(None if a is None else a.to(device) for a in args))
    assert_as_good_as_torch(got.cpu(), *truth_of(*args))


@interpreted
@pytest.mark.parametrize("shape", quick_first([*LINEARS, *MORE]))
def test_interpreted_is_as_good_as_torch(shape):
    which = [*LINEARS, *MORE].index(shape)
    check(arguments(*shape, FLOAT_DTYPES[which % 3], (None, *FLOAT_DTYPES)[which % 4]))


@interpreted
def test_every_dtype():
    for i, (dtype, bias) in enumerate(itertools.product(FLOAT_DTYPES, (None, *FLOAT_DTYPES))):
        check(arguments(1 + 2 * (i % 2), 7, 48, dtype, bias))


@interpreted
def test_rows_that_are_not_numbers_do_not_leak():
    for m, k in ((5, 48), (5, 45), (130, 64)):
        args = arguments(m, 9, k, torch.float32, torch.float32)
        args[0][1, 5], args[0][3, 44], args[0][4] = torch.nan, -torch.inf, 3e38
        args[1][2] = 0
        y = module.int8_weight_linear(*args)
        assert y.isnan().all(1).nonzero().flatten().tolist() == [1, 3]
        assert not y[4].isnan().all(), "large but finite: its sums may be infinite, not NaN"
        check([a[:4] if a is args[0] else a for a in args])
        for row in (0, 1, 3):
            check([args[0][row], *args[1:]])


@interpreted
def test_strides_and_leading_dimensions():
    x, weight, scale, bias = arguments(30, 20, 33, torch.float16, torch.float32)
    check([x.reshape(2, 3, 5, 33).transpose(0, 2), weight, scale, bias])
    check([x[0], weight, scale, bias])
    check([x, torch.randint(-9, 9, (33, 20), dtype=torch.int8).t(), torch.rand(40)[::2], torch.rand(40)[::2]])
    base = torch.randint(-9, 9, (20 * 32 + 1,), dtype=torch.int8)
    check([x[:, :32], base[1:].view(20, 32), scale, bias])  # rows of 32, but not where a descriptor may begin


@interpreted
def test_refuses():
    x, weight, scale, bias = arguments(3, 4, 5, torch.float32, torch.float32)
    for args in (
        (x.double(), weight, scale),
        (x[:, :4], weight, scale),
        (x, weight.float(), scale),
        (x, weight[0], scale),
        (x, weight, scale[:3]),
        (x, weight, scale, bias[:3]),
        (x, weight, scale.to("meta")),
    ):
        with pytest.raises(RuntimeError, match="int8_weight_linear: expected"):
            module.int8_weight_linear(*args)


@compiled
def test_config():
    decode = module.weight_config(8, 8192, 8192, torch.bfloat16, True, H200)
    assert (decode.outputs, decode.tokens) == (32, 16)
    assert decode.tiles(8, 8192) * decode.splits >= 1.5 * H200.multiprocessors
    assert module.weight_config(1, 8192, 8192, torch.bfloat16, True, H200).tokens == 1
    shapes = itertools.product(ALL_CARDS, FLOAT_DTYPES, (1, 16, 32, 64, 127, 5000), (1, 8192), (0, 1, 1024, 10**6))
    for device, dtype, m, n, k in shapes:
        for aligned in (k > 1, False):
            config = module.weight_config(m, n, k, dtype, aligned, device)
            part = config.k_per_split(k)
            assert part * config.splits >= k and part % config.block_k == 0 and config.stages >= 2
            tile = (config.outputs + config.tokens * dtype.itemsize) * config.block_k
            assert config.stages * tile <= device.shared_memory


@compiled
@each_card
@pytest.mark.parametrize("m", [1, 4, 8, 512, *(pytest.param(m, marks=pytest.mark.slow) for m in (32, 64, 128))])
def test_compiles_to_tensor_core_instructions_without_spills(card, m):
    x, weight, n = meta((m, 8192), torch.bfloat16), meta((8192, 8192), torch.int8), meta((8192,))
    (binary,) = compile_launches(card, module.int8_weight_linear, x, weight, n, n)
    if m > 1:
        assert binary.count("HGMMA" if card == H200 and m > 32 else "HMMA")
        assert binary.count("UTMALDG" if card == H200 else "LDGSTS.E.BYPASS.128")
        if card == H200 and m <= 32:
            assert binary.count("LDS.U16") == 0
    else:
        assert binary.count("LDGSTS.E.BYPASS.128")


@compiled
@each_card
@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 8, 4096])
@pytest.mark.parametrize("k", [8192, 1001])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_configuration_compiles_without_spills(card, m, k, dtype):
    x, weight, n = meta((m, k), dtype), meta((1000, k), torch.int8), meta((1000,))
    compile_launches(card, module.int8_weight_linear, x, weight, n, n)


@needs_gpu
def test_on_a_gpu_is_as_good_as_torch():
    for shape in (*LINEARS, *MORE, (257, 1000, 4096), (16, 1000, 4096)):
        for dtype in FLOAT_DTYPES:
            check(arguments(*shape, dtype, torch.float32), "cuda")

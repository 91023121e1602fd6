"""CompressedConv2d: what nn.Conv2d computes, for every format and geometry, through everything that a module meets."""

import copy
import io
import pickle

import pytest
import torch
from test_nn import HOW
from tolerance import assert_as_good_as_torch
from torch import nn
from torch.nn import functional as F

from engine import ops
from engine.formats import Bitmap, DenseInt8
from engine.nn import CompressedConv2d, conv2d

C, N = 6, 11  # channels in and out
GEOMETRIES = {
    "3x3": {"kernel_size": 3},
    "3x3 padded": {"kernel_size": 3, "padding": 1, "bias": False},
    "1x1": {"kernel_size": 1},
    "1x1 strided": {"kernel_size": 1, "stride": 2},
    "1x1 padded": {"kernel_size": 1, "padding": 1},
    "all unequal": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 0), "dilation": (1, 3)},
    "same": {"kernel_size": (3, 5), "padding": "same"},
    "same, even": {"kernel_size": (2, 4), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    "circular, same": {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
}
FORMATS = {name: how for name, how in HOW.items() if name != "int8 by channel"}
BY_CHANNEL = (DenseInt8, {"activation": "static", "input_scale": torch.linspace(0.02, 0.05, 9 * C)})


@pytest.fixture(params=[*FORMATS, "int8 by channel"])
def conv(request):
    format_type, how = {**FORMATS, "int8 by channel": BY_CHANNEL}[request.param]
    torch.manual_seed(0)
    return CompressedConv2d.from_dense(nn.Conv2d(C, N, 3, padding=1), format_type, **how)


@pytest.fixture(params=["whole", "parts"])
def parts(request, monkeypatch):
    """Patches at once, and a few rows of an image at a time."""
    if request.param == "parts":
        monkeypatch.setattr(conv2d, "PATCH_BYTES", 4000)


def dense_twin(module, like):
    twin = copy.deepcopy(like)
    with torch.no_grad():
        twin.weight.copy_(module.weight)
    return twin


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_float_values_compute_the_convolution(geometry, order, parts):
    torch.manual_seed(0)
    dense = nn.Conv2d(C, N, **GEOMETRIES[geometry]).requires_grad_(False)
    module = CompressedConv2d.from_dense(dense, Bitmap, threshold=0.05)
    twin = dense_twin(module, dense)
    for shape in ((2, C, 9, 13), (1, C, 6, 5), (5, C, 7, 7), (0, C, 9, 13)):
        x = torch.randn(shape).contiguous(memory_format=order)
        truth = copy.deepcopy(twin).double()(x.double())
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                got = module(x)
            assert_as_good_as_torch(got, truth, twin(x))
            assert got.is_contiguous(memory_format=order)
    image = torch.randn(C, 9, 13)
    close(module(image), twin(image))


@pytest.mark.parametrize("geometry", ["3x3 padded", "1x1", "all unequal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_is_exact(geometry, dtype, parts):
    """Dynamic: the linear op over patches that F.unfold cut; static: sums of integers, then the scales in fp32."""
    torch.manual_seed(0)
    dense, x = nn.Conv2d(C, N, **GEOMETRIES[geometry]).requires_grad_(False), torch.randn(3, C, 9, 13).to(dtype)
    how = {name: getattr(dense, name) for name in ("dilation", "padding", "stride")}
    cut = F.unfold(x.float(), dense.kernel_size, **how).unflatten(1, (C, -1)).permute(0, 3, 2, 1).flatten(2).to(dtype)
    for format_type, given in (FORMATS["int8"], FORMATS["bitmap int8"]):
        module = CompressedConv2d.from_dense(dense, format_type, **given)
        with torch.no_grad():
            got = module(x)
        want = module.format.linear(cut, module.bias).transpose(1, 2).reshape(got.shape)
        assert torch.equal(got, want)
    module = CompressedConv2d.from_dense(dense, DenseInt8, activation="static", input_scale=0.02)
    q = (x.double() * (1 / torch.tensor(0.02))).round().clamp(-127, 127)
    q_weight = conv2d.as_weight(module.values.double(), dense.kernel_size)
    want = F.conv2d(q, q_weight, None, dense.stride, dense.padding, dense.dilation).float()
    want = want * (torch.tensor(0.02) * module.scale)[:, None, None]
    if dense.bias is not None:
        want = want + dense.bias[:, None, None]
    assert torch.equal(module(x), want.to(dtype))


def test_every_format(conv):
    x = torch.randn(2, C, 9, 8)
    twin = dense_twin(conv, nn.Conv2d(C, N, 3, padding=1))
    with torch.no_grad():
        twin.bias.copy_(conv.bias)
    error = (conv(x) - twin(x)).norm() / twin(x).norm()
    assert error < (0.05 if conv.values.dtype == torch.int8 else 1e-6)
    assert (conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups) == (C, N, (3, 3), 1)
    assert conv.weight.shape == (N, C, 3, 3) and conv(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(x), conv(x.bfloat16()))


def test_a_nan_stays_in_the_patches_that_hold_it():
    module = CompressedConv2d.from_dense(nn.Conv2d(C, N, 3, padding=1), DenseInt8)
    x = torch.randn(2, C, 9, 8)
    x[1, 2, 0, 4] = torch.nan
    bad = module(x).isnan()
    assert bad[1, :, :2, 3:6].all() and bad.sum() == N * 2 * 3


def test_state_dict_copies_and_dtypes(conv):
    x = torch.randn(2, C, 9, 8)
    other = copy.deepcopy(conv)
    with torch.no_grad():
        other.bias.zero_()
        other.values.zero_()
    buffer = io.BytesIO()
    torch.save(conv.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (other, copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(twin(x), conv(x)) and repr(twin) == repr(conv)
    before = conv.weight
    conv.to(torch.bfloat16)
    assert conv.weight.dtype == conv.bias.dtype == conv(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(conv.weight.float(), before, rtol=2**-8, atol=0)
    assert conv.to("meta")(torch.empty(2, C, 9, 8, device="meta")).shape == (2, N, 9, 8)


def test_compile_and_export(conv):
    x, y = torch.randn(3, C, 9, 8), torch.randn(5, C, 9, 8)
    torch._dynamo.reset()
    with torch.no_grad():
        close(torch.compile(conv, fullgraph=True, backend="aot_eager")(x), conv(x))
        exported = torch.export.export(conv, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        close(exported.module()(y), conv(y))


@pytest.mark.parametrize("geometry", ["1x1", "1x1 strided", "all unequal", "circular, same"])
def test_exported_geometries(geometry):
    module, x = CompressedConv2d.from_dense(nn.Conv2d(C, N, **GEOMETRIES[geometry]), DenseInt8), torch.randn(3, C, 9, 8)
    auto = torch.export.Dim.AUTO
    for order in (torch.contiguous_format, torch.channels_last):
        given, other = (image.contiguous(memory_format=order) for image in (x, torch.randn(2, C, 14, 11)))
        with torch.no_grad():
            exported = torch.export.export(module, (given,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
            close(exported.module()(other), module(other))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_traced(conv):
    x, y = torch.randn(3, C, 9, 8), torch.randn(5, C, 7, 11)
    traced = torch.jit.trace(conv, x)
    close(traced(y), conv(y))


def test_compile_with_inductor():
    model = nn.Sequential(CompressedConv2d.from_dense(nn.Conv2d(C, N, 3, padding=1), DenseInt8), nn.ReLU())
    x = torch.randn(2, C, 9, 8)
    torch._dynamo.reset()
    with torch.inference_mode():
        close(torch.compile(model, fullgraph=True)(x), model(x))


def test_gradients(conv, parts):
    x = torch.randn(3, C, 9, 8, requires_grad=True)
    twin, z = dense_twin(conv, nn.Conv2d(C, N, 3, padding=1)), x.detach().clone().requires_grad_()
    grad = torch.randn(3, N, 9, 8)
    conv(x).backward(grad)
    twin(z).backward(grad)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conv.bias.grad, twin.bias.grad, rtol=1e-4, atol=1e-4)
    if conv.format.label == "bitmap float32":
        want = conv2d.as_matrix(twin.weight.grad)[conv2d.as_matrix(conv.weight) != 0]
        torch.testing.assert_close(conv.values.grad, want, rtol=1e-4, atol=1e-4)


def test_repr_tells_geometry_and_format():
    dense = nn.Conv2d(C, N, 3, stride=2, padding=(1, 2), dilation=(1, 2), padding_mode="reflect")
    text = repr(CompressedConv2d.from_dense(dense, Bitmap, threshold=0.05, values=torch.int8))
    shown = f"({C}, {N}, kernel_size=(3, 3), stride=(2, 2), padding=(1, 2), dilation=(1, 2), padding_mode='reflect'"
    assert f"{shown}, bias=True, format=bitmap int8, sparsity=0." in text and "bytes=" in text


def test_what_does_not_fit_is_refused():
    module = CompressedConv2d.from_dense(nn.Conv2d(C, N, 3), DenseInt8)
    for x, message in [
        (torch.randn(2, C + 1, 9, 9), "got .2, 7, 9, 9."),
        (torch.randn(C, 9), "expected .B, 6, H, W."),
        (torch.randn(2, C, 2, 9), "padded image is 2x9, the kernel 3x3"),
    ]:
        with pytest.raises(ValueError, match=message):
            module(x)
    with pytest.raises(ValueError, match=r"groups=2.* can't be compressed: it has groups"):
        CompressedConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=2), DenseInt8)
    other = nn.Conv2d(4, 4, (3, 1))
    other.weight = nn.Parameter(torch.randn(4, 4, 1, 3))
    with pytest.raises(ValueError, match=r"its weight \[4, 4, 1, 3\] is not of kernels \(3, 1\)"):
        CompressedConv2d.from_dense(other, DenseInt8)
    format = module.format
    for how, message in [
        ({"kernel_size": 5}, "54 columns"),
        ({"kernel_size": 3, "bias": torch.zeros(4)}, r"bias: expected \[11\]"),
        ({"kernel_size": 3, "padding": "some"}, "'same' or 'valid'"),
        ({"kernel_size": 3, "padding": "same", "stride": 2}, "goes with stride 1"),
        ({"kernel_size": 3, "padding_mode": "mirror"}, "padding_mode"),
    ]:
        with pytest.raises(ValueError, match=message):
            CompressedConv2d(format, **how)


def test_the_matrix_is_the_weight():
    weight = torch.randn(N, C, 3, 2)
    matrix = conv2d.as_matrix(weight)
    assert torch.equal(conv2d.as_weight(matrix, (3, 2)), weight)
    assert torch.equal(matrix[:, C : 2 * C], weight[:, :, 0, 1])  # kernel row, kernel column, channel
    assert conv2d.as_matrix(matrix) is matrix and conv2d.as_weight(matrix, None) is matrix
    module = CompressedConv2d.from_dense(nn.Conv2d(C, N, 3), DenseInt8)
    assert torch.equal(conv2d.as_matrix(module.weight), ops.int8_dequantize(module.values, module.scale))

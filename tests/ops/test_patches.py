"""The overload `patches` of the int8 linears: to the bit what the op makes of the same patches side by side."""

import pytest
import torch

import engine
from engine.formats import Bitmap, Block, DenseInt8, SemiStructured
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES

INT8 = {"values": torch.int8}
FORMATS = {
    "int8_linear": (DenseInt8, {}),
    "bitmap_int8_linear": (Bitmap, {"threshold": 0.7, **INT8}),
    "block_int8_linear": (Block, {"threshold": 1.0, **INT8}),
    "semi_structured_int8_linear": (SemiStructured, INT8),
}
# Image [B, H, W, C], kernel, stride, dilation: each with why it is there.
CASES = {
    ((0, 5, 5, 4), (3, 3), (1, 1), (1, 1)): "an empty batch",
    ((1, 3, 3, 1), (3, 3), (1, 1), (1, 1)): "one patch, one channel",
    ((2, 5, 4, 7), (2, 3), (1, 1), (1, 1)): "few rows: dot products",
    ((2, 9, 12, 16), (3, 3), (1, 2), (1, 1)): "many rows: panels",
    ((1, 11, 13, 5), (3, 2), (2, 1), (2, 3)): "dilated: a run for each place of the kernel",
    ((3, 7, 6, 33), (1, 1), (2, 2), (1, 1)): "pixels",
    ((1, 8, 30, 65), (3, 3), (1, 1), (1, 1)): "K in two stretches, odd",
}


def view(image, kernel, stride, dilation):
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    found = image.unfold(1, spans[0], stride[0]).unfold(2, spans[1], stride[1])
    return found[..., :: dilation[0], :: dilation[1]].permute(0, 1, 2, 4, 5, 3)


def weight(name, columns, **more):
    format_type, how = FORMATS[name]
    return format_type.from_dense(torch.randn(45, columns), **how, **more)


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=CASES.values())
def test_the_bits_of_the_op(variant, case, name):
    shape, *geometry = case
    image = torch.randn(shape)
    if image.numel():
        image[0, 1, 1, 0] = torch.inf
    columns = geometry[0][0] * geometry[0][1] * shape[3]
    static = [{}, {"input_scale": 0.03}, {"input_scale": torch.rand(columns) / 20 + 0.01}]
    for dtype, how in zip(FLOAT_DTYPES, static, strict=True):
        if name == "int8_linear" and how:
            how = {"activation": "static", **how}
        format, bias = weight(name, columns, **how), torch.randn(45)
        x = view(image.to(dtype), *geometry)
        want = format.linear(x.flatten(3), bias)
        assert_same(format.linear_of_patches(x, bias), want)
        assert_same(format.linear_of_patches(x), format.linear(x.flatten(3)))
        with engine.reference_mode():
            assert_same(format.linear_of_patches(x, bias), want)
        turned = view(image.to(dtype).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), *geometry)
        assert_same(format.linear_of_patches(turned, bias), want)  # channels that do not lie together
        assert_same(format.linear_of_patches(x.contiguous(), bias), want)  # patches side by side already


def arguments(name, x, bias):
    format = weight(name, 36)
    tensors = [getattr(format, field) for field in format.TENSORS if field not in ("values", "scale", "input_scale")]
    order = [format.values, *tensors] if name.startswith("semi") else [*tensors, format.values]
    return (x, *order, format.scale, bias)


@pytest.mark.parametrize("name", FORMATS)
def test_opcheck(name):
    for grad in (False, True):
        image = torch.randn(2, 6, 5, 4, requires_grad=grad)
        x = view(image, (3, 3), (1, 1), (1, 1))
        given = arguments(name, x, torch.randn(45, requires_grad=grad))
        torch.library.opcheck(getattr(torch.ops.engine, name).patches, given)


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_reach_the_image(name):
    image = torch.randn(2, 6, 5, 4, requires_grad=True)
    again = image.detach().clone().requires_grad_()
    format, bias, same = weight(name, 36), torch.randn(45, requires_grad=True), torch.zeros(45, requires_grad=True)
    y = format.linear_of_patches(view(image, (3, 3), (1, 1), (1, 1)), bias)
    grad = torch.randn_like(y)
    y.backward(grad)
    format.linear(view(again, (3, 3), (1, 1), (1, 1)).flatten(3), same).backward(grad)
    assert_same(image.grad, again.grad)
    assert_same(bias.grad, same.grad)


def test_what_does_not_fit_is_refused():
    format = weight("int8_linear", 36)
    patches = view(torch.randn(2, 6, 5, 4), (3, 3), (1, 1), (1, 1))
    for x, error, message in [
        (patches.double(), TypeError, "x: expected a float32"),
        (patches[..., 1:], ValueError, r"x: expected shape \[..., 36\], got \[2, 4, 3, 27\]"),
        (patches[0], ValueError, r"x: expected patches \[B, Ho, Wo, kh, kw, C\], got \[4, 3, 3, 3, 4\]"),
    ]:
        with pytest.raises(error, match=message):
            format.linear_of_patches(x)
        with pytest.raises(error, match=message):
            REFERENCES["int8_linear.patches"](x, format.values, format.scale)

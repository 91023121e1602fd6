"""CompressedConv2d: the compressed twin of nn.Conv2d, a linear layer over the patches of an image.

The matrix that is compressed has a row for each output channel, and its columns in the order in which a patch lies in a
channels-last image: kernel row, kernel column, input channel. So it is in the format's tensors, in a state dict and on
disk. Of a 1x1 convolution a patch is a pixel. Of others the int8 kernels on a CPU read each patch where it lies in the
image; for all else patches are copied together a few megabytes at a time.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from engine.formats import Format
from engine.nn._replace import in_autocast
from engine.nn.compressed import _Compressed
from engine.ops import _check
from engine.ops._transpose import transpose

PATCH_BYTES = 8 << 20  # of patches at a time: they stay in the last cache, and yet are rows enough for a product
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def as_matrix(weight: Tensor, transposed: bool = False) -> Tensor:
    """A weight as the matrix `[N, K]` to compress: `[O, C, kh, kw]` as `[O, kh * kw * C]`, one of two dimensions as it
    is, or turned round where it is `transposed`, `[K, N]`.
    """
    if weight.dim() == 4:
        return weight.permute(0, 2, 3, 1).flatten(1)
    return weight.t().contiguous() if transposed else weight


def as_weight(matrix: Tensor, kernel_size: tuple[int, ...] | None, transposed: bool = False) -> Tensor:
    """The inverse of `as_matrix`, as a view."""
    if kernel_size is None:
        return matrix.t() if transposed else matrix
    return matrix.unflatten(1, (*kernel_size, matrix.shape[1] // math.prod(kernel_size))).permute(0, 3, 1, 2)


def padding_of(conv: Any) -> tuple[int, int, int, int]:
    """What `conv` pads on the left, right, top and bottom; of an odd "same" the larger part comes last."""
    if conv.padding == "valid":
        return (0, 0, 0, 0)
    if conv.padding == "same":
        missing = [d * (k - 1) for d, k in zip(_pair(conv.dilation), conv.kernel_size, strict=True)]
        return (missing[1] // 2, missing[1] - missing[1] // 2, missing[0] // 2, missing[0] - missing[0] // 2)
    high, wide = _pair(conv.padding)
    return (wide, wide, high, high)


def why_not(conv: nn.Conv2d) -> str | None:
    """Why `conv` can't be compressed, if it can't."""
    if conv.groups != 1:
        return "it has groups"
    if tuple(conv.weight.shape[2:]) != conv.kernel_size:  # PyTorch computes with the weight, whatever is said of it
        return f"its weight {list(conv.weight.shape)} is not of kernels {conv.kernel_size}"
    return None


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel of `x` `[B, C, H, W]` lie together."""
    return x.stride(1) == 1 and x.stride(3) >= x.shape[1]


def patches(x: Tensor, conv: Any) -> Tensor:
    """What each output of `conv` sees of `x` `[B, C, H, W]`: a view `[B, Ho, Wo, kh, kw, C]` of the padded image.

    `conv` is an nn.Conv2d, or anything with its attributes.
    """
    padding = padding_of(conv)
    if any(padding) and conv.padding_mode != "zeros":
        x, padding = nn.functional.pad(x, padding, conv.padding_mode), (0, 0, 0, 0)
    stride, dilation = _pair(conv.stride), _pair(conv.dilation)  # set later on, they may be single numbers
    if x.stride(1) == 1 or x.shape[1] == 1:
        image = x.permute(0, 2, 3, 1)
    else:
        if conv.kernel_size == (1, 1) and not any(padding):  # with a stride most pixels are never looked at
            x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
        image = transpose(x.flatten(2)).unflatten(1, x.shape[2:])
    if any(padding):
        image = nn.functional.pad(image, (0, 0, *padding))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, conv.kernel_size, strict=True)]
    if image.shape[1] < spans[0] or image.shape[2] < spans[1]:
        size = f"{image.shape[1]}x{image.shape[2]}"
        raise ValueError(f"engine.nn.CompressedConv2d: x: the padded image is {size}, the kernel {spans[0]}x{spans[1]}")
    view = image.unfold(1, spans[0], stride[0]).unfold(2, spans[1], stride[1])
    return view[..., :: dilation[0], :: dilation[1]].permute(0, 1, 2, 4, 5, 3)


def in_parts(images: Tensor, row_bytes: int) -> list[Tensor]:
    """`images` `[B, Ho, ...]` cut into whole images, or rows of one, of which none is more than PATCH_BYTES.

    A row of outputs counts as `row_bytes`; one that is larger is a part by itself.
    """
    rows = max(1, PATCH_BYTES // max(1, row_bytes))
    if rows >= images.shape[1]:
        return list(images.split(max(1, rows // max(1, images.shape[1]))))
    return [part for image in images.split(1) for part in image.split(rows, dim=1)]


def patch_row_bytes(view: Tensor) -> int:
    """Bytes of the patches of a row of outputs."""
    return math.prod(view.shape[2:]) * view.element_size()


def _reads_patches(format: Format, x: Tensor) -> bool:
    """Whether `format.linear_of_patches` makes no copy of them."""
    return x.device.type == "cpu" and format.values.dtype == torch.int8 and getattr(format, "quantize_input", True)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class CompressedConv2d(_Compressed):
    """`y = conv2d(x, weight, bias)` over a compressed weight; attributes are those of nn.Conv2d, `groups` is 1.

    The output lies in memory as the input does, channels last or not; channels last is faster, as nothing has to be
    turned round. int8 activations are quantised patch by patch, each by its own maximum (dynamic) or all by one scale,
    so that a value is quantised once for every patch that it is in. Where patches have to be copied together (float
    values; a GPU) that is done PATCH_BYTES at a time, but under torch.compile and torch.export, where they are one
    tensor.

    Args:
        format: the compressed weight, `[out_channels, kh * kw * in_channels]`: see :func:`as_matrix`.
        kernel_size: `(kh, kw)`, or one number for both.
        bias: `[out_channels]`, or None.
        stride, padding, dilation, padding_mode: as in nn.Conv2d.
        dtype: of the dense weight that `weight` gives back; by default that of the format's values, float32 for int8.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        format: Format,
        kernel_size: int | tuple[int, int],
        bias: Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(format, dtype)
        self.kernel_size, self.stride, self.dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.padding_mode, self.groups, self.transposed, self.output_padding = padding_mode, 1, False, (0, 0)
        self.out_channels, columns = format.shape
        self.in_channels, rest = divmod(columns, math.prod(self.kernel_size))
        where = "engine.nn.CompressedConv2d"
        if rest:
            raise ValueError(f"{where}: kernel_size: {columns} columns are not of kernels {list(self.kernel_size)}")
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"{where}: padding_mode: expected one of {PADDING_MODES}, got {padding_mode!r}")
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f"{where}: padding: expected numbers, 'same' or 'valid', got {padding!r}")
        if padding == "same" and self.stride != (1, 1):
            raise ValueError(f"{where}: padding: 'same' goes with stride 1, got {self.stride}")
        if bias is not None and tuple(bias.shape) != (self.out_channels,):
            raise ValueError(f"{where}: bias: expected [{self.out_channels}], got {list(bias.shape)}")
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)

    @classmethod
    def over(cls, format: Format, like: Any, dtype: torch.dtype) -> "CompressedConv2d":
        """A convolution by `format` with the geometry of `like` (an nn.Conv2d or the like), sharing its bias."""
        geometry = (like.stride, like.padding, like.dilation, like.padding_mode)
        return cls(format, like.kernel_size, like.bias, *geometry, dtype)

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, format_type: type[Format], **how: Any) -> "CompressedConv2d":
        """Compresses `conv`'s weight by `format_type.from_dense(as_matrix(weight), **how)` and shares its bias.

        Float values take over the weight's `requires_grad`. A convolution with groups can't be compressed: ValueError;
        a layer of another kind, a transposed convolution for one, neither: TypeError.
        """
        _check.is_kind("nn.CompressedConv2d.from_dense", "conv", conv, nn.Conv2d, "nn.Conv2d")
        if why := why_not(conv):
            raise ValueError(f"engine.nn.CompressedConv2d: {conv} can't be compressed: {why}")
        module = cls.over(format_type.from_dense(as_matrix(conv.weight), **how), conv, conv.weight.dtype)
        if module.values.is_floating_point():
            module.values.requires_grad_(conv.weight.requires_grad)
        return module.train(conv.training)

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return as_weight(matrix, self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        """`input` `[B, C, H, W]` or `[C, H, W]` to `[B, O, Ho, Wo]` or `[O, Ho, Wo]`, in its dtype."""
        x = input
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            expected = f"[B, {self.in_channels}, H, W] or [{self.in_channels}, H, W]"
            raise ValueError(f"engine.nn.CompressedConv2d: input: expected {expected}, got {list(x.shape)}")
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        x = in_autocast(x)
        channels_last = is_channels_last(x)
        view = patches(x, self)
        format, bias, row_bytes = self.format, self.bias, patch_row_bytes(view)
        skips = channels_last and self.stride != (1, 1)  # an exported model must not ask such for its strides
        pixels = self.kernel_size == (1, 1) and not skips and view.is_contiguous()
        whole = torch.compiler.is_compiling() or view.shape[0] * view.shape[1] * row_bytes <= PATCH_BYTES
        if pixels or torch.jit.is_tracing():  # TorchScript can't tell the overloads of an op by their tensors' shapes
            y = format.linear(view.flatten(3), bias)
        elif whole or _reads_patches(format, x):
            y = format.linear_of_patches(view, bias)
        else:
            made = (format.linear(part.flatten(3), bias) for part in in_parts(view, row_bytes))
            if not torch.is_grad_enabled():
                return self._gathered(made, view, row_bytes, channels_last)
            y = torch.cat([part.flatten(0, 2) for part in made]).unflatten(0, view.shape[:3])
        if channels_last:
            return y.permute(0, 3, 1, 2)
        return transpose(y.flatten(1, 2)).unflatten(2, view.shape[1:3])

    def _gathered(self, made: Any, view: Tensor, row_bytes: int, channels_last: bool) -> Tensor:
        """The output, of parts as they are made: each is put in its place, turned round, while it is in cache."""
        shape = (view.shape[0], self.out_channels, view.shape[1], view.shape[2])
        order = torch.channels_last if channels_last else torch.contiguous_format
        y = torch.empty(shape, dtype=view.dtype, device=view.device, memory_format=order)
        for place, part in zip(in_parts(y.permute(0, 2, 3, 1), row_bytes), made, strict=True):
            place.copy_(part)
        return y

    def extra_repr(self) -> str:
        """What `repr` shows between the parentheses."""
        shape = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding not in ((0, 0), "valid"):
            shape += f", padding={self.padding!r}"
        if self.dilation != (1, 1):
            shape += f", dilation={self.dilation}"
        if self.padding_mode != "zeros":
            shape += f", padding_mode={self.padding_mode!r}"
        return f"{shape}, bias={self.bias is not None}, {self._describe_format()}"

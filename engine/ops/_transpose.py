"""transpose: matrices turned round, `[B, R, C]` to `[B, C, R]`, as images are between channels first and last.

PyTorch's own copy reads or writes one value at a time, and takes two to four times as long.
"""

import torch
from torch import Tensor

from engine.ops import _check
from engine.ops._library import define, explained_by


def _check_arguments(x: Tensor) -> None:
    _check.is_float("transpose", "x", x)
    _check.has_shape("transpose", "x", x, ("B", "R", "C"))


def _reference(x: Tensor) -> Tensor:
    _check_arguments(x)
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _fake(x: Tensor) -> Tensor:
    _check_arguments(x)
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1]))


def _backward(ctx, grad: Tensor) -> Tensor:
    return transpose(grad)


_op = define("transpose(Tensor x) -> Tensor", reference=_reference, fake=_fake, backward=_backward)


@explained_by(_check_arguments)
def transpose(x: Tensor) -> Tensor:
    """`x` `[B, R, C]`, float32, float16 or bfloat16, to a contiguous `[B, C, R]`."""
    return _op(x)

"""What the linear ops have in common: the checks of activations and bias, the reference's arithmetic, gradients."""

from typing import Any

from torch import Tensor

from engine.ops import _check

DENSE_AT_ONCE = 1 << 20  # elements of a weight that a gradient's plain PyTorch makes dense at a time


def check_activations(op: str, x: Tensor) -> int:
    """Raises TypeError or ValueError unless `x` is float `[..., K]`; returns K."""
    _check.is_float(op, "x", x)
    _check.expect(x.dim() >= 1, op, "x", "at least one dimension", list(x.shape))
    return x.shape[-1]


def check_bias(op: str, bias: Tensor | None, rows: int) -> None:
    """Raises TypeError or ValueError unless `bias` is None or float `[rows]`."""
    if bias is not None:
        _check.is_float(op, "bias", bias)
        _check.has_shape(op, "bias", bias, (rows,))


def as_rows(t: Tensor) -> Tensor:
    """`[..., C]` as float32 `[M, C]`, where a -1 for M would fail on an empty tensor."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1]).float()


def check_rows(op: str, argument: str, t: Tensor, columns: int) -> Tensor:
    """`as_rows`, of a float `[..., columns]`; raises TypeError or ValueError unless it is that."""
    _check.is_float(op, argument, t)
    _check.expect(t.dim() >= 1 and t.shape[-1] == columns, op, argument, f"shape [..., {columns}]", list(t.shape))
    return as_rows(t)


def bias_gradient(ctx: Any, grad: Tensor, place: int) -> Tensor | None:
    """The gradient for the bias, which is argument `place` of an op whose context holds `bias_dtype`."""
    if ctx.bias_dtype is None or not ctx.needs_input_grad[place]:  # left out, bias may have no place in the tuple
        return None
    return as_rows(grad).sum(0).to(ctx.bias_dtype)

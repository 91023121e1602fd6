"""The collectives as ops that return new tensors: they have gradients, and `torch.compile` keeps them in its graph.

`reduce_scatter` and `all_gather` of :mod:`engine.distributed` are such already; this adds `all_reduce`.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from engine.distributed import _scatter_gather
from engine.distributed._all_reduce import _check_arguments, begin
from engine.distributed._member import member_of
from engine.ops._library import define


def all_reduce(
    x: Tensor, op: str = "sum", group: dist.ProcessGroup | None = None, codec: str | None = None, density: float = 0.01
) -> Tensor:
    """:func:`engine.distributed.all_reduce` into a new tensor.

    Args:
        x: any shape; not changed.
        op: "sum", "avg", "max" or "min".
        group: the process group, the default one where it is None.
        codec: None, "bf16", "int8" or "bitmap".
        density: for "bitmap".

    Returns:
        Like `x`, contiguous. The gradient of a sum is the sum of all ranks' gradients, of an average their average;
        there is none for "max" and "min" and none with a codec.

    Raises:
        PeerError, TypeError, ValueError: as :func:`engine.distributed.all_reduce`.
    """
    group = _check_arguments(x, op, group, codec, None, density)
    return torch.ops.engine.all_reduce(x, op, group.group_name, codec, density)


def _group(name: str) -> dist.ProcessGroup:
    return c10d._resolve_process_group(c10d.GroupName(name))


def _all_reduce(x: Tensor, op: str, group_name: str, codec: str | None, density: float) -> Tensor:
    y = x.detach().clone(memory_format=torch.contiguous_format)
    begin(y, op, _check_arguments(x, op, _group(group_name), codec, None, density), codec, density=density)
    return y


def _reduce_scatter(x: Tensor, op: str, group_name: str) -> Tensor:
    group = _group(group_name)
    member_of(group).worker.drain()
    return _scatter_gather.scatter(x.detach(), op, group)


def _all_gather(x: Tensor, group_name: str) -> Tensor:
    group = _group(group_name)
    member_of(group).worker.drain()
    return _scatter_gather.gather(x.detach(), group)


def _fake_all_reduce(x: Tensor, op: str, group_name: str, codec: str | None, density: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_reduce_scatter(x: Tensor, op: str, group_name: str) -> Tensor:
    return x.new_empty(x.shape[0] // _group(group_name).size(), *x.shape[1:])


def _fake_all_gather(x: Tensor, group_name: str) -> Tensor:
    size = _group(group_name).size()
    return x.new_empty(size * x.shape[0], *x.shape[1:]) if x.dim() else x.new_empty(size)


def _save_how(ctx, inputs, output) -> None:
    _, *ctx.how = inputs


def _gradient_only_of(ctx, name: str) -> None:
    op, codec = ctx.how[0], ctx.how[2] if len(ctx.how) > 2 else None
    if op not in ("sum", "avg") or codec is not None:
        what = f"op {op!r}" if codec is None else f"codec {codec!r}"
        raise RuntimeError(f"engine.distributed: {name}: no gradient with {what}; call it under torch.no_grad()")


def _all_reduce_backward(ctx, grad: Tensor):
    _gradient_only_of(ctx, "all_reduce")
    return torch.ops.engine.all_reduce(grad, *ctx.how), None, None, None, None


def _reduce_scatter_backward(ctx, grad: Tensor):
    _gradient_only_of(ctx, "reduce_scatter")
    op, group_name = ctx.how
    gathered = torch.ops.engine.all_gather(grad, group_name)
    return gathered / _group(group_name).size() if op == "avg" else gathered, None, None


def _all_gather_backward(ctx, grad: Tensor):
    (group_name,) = ctx.how
    scattered = torch.ops.engine.reduce_scatter(grad, "sum", group_name)
    return scattered.view(ctx.shape), None


def _save_gather(ctx, inputs, output) -> None:
    ctx.shape, ctx.how = inputs[0].shape, inputs[1:]


define(
    "all_reduce(Tensor x, str op, str group_name, str? codec, float density) -> Tensor",
    reference=_all_reduce,
    fake=_fake_all_reduce,
    backward=_all_reduce_backward,
    setup_context=_save_how,
)
define(
    "reduce_scatter(Tensor x, str op, str group_name) -> Tensor",
    reference=_reduce_scatter,
    fake=_fake_reduce_scatter,
    backward=_reduce_scatter_backward,
    setup_context=_save_how,
)
define(
    "all_gather(Tensor x, str group_name) -> Tensor",
    reference=_all_gather,
    fake=_fake_all_gather,
    backward=_all_gather_backward,
    setup_context=_save_gather,
)

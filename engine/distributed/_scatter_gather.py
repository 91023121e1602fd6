"""reduce_scatter and all_gather: the two halves of an all-reduce, as functions of a tensor."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from engine.distributed._all_reduce import check_group, check_tensor, op_name
from engine.distributed._member import REDUCE_OPS, member_of
from engine.distributed._network import Collective, Network, plain
from engine.distributed._shared_memory import Communicator
from engine.distributed._work import Work

# torch 2.13 has new names for them and warns of the old ones.
_reduce_scatter_by_torch = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather_by_torch = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def reduce_scatter(
    t: torch.Tensor,
    op: str | dist.ReduceOp.RedOpType = "sum",
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> torch.Tensor | Work:
    """Reduces `t` over all ranks of `group`, and gives every rank its part of the result.

    It is the part of :func:`all_reduce`'s result that belongs to this rank, to the bit. Inside one host it moves half
    as much, between hosts as much. Errors, order and transport are those of :func:`all_reduce`.

    Args:
        t: `[p * n, ...]` for p ranks, contiguous or not; the dtypes of :func:`all_reduce`.
        op: "sum", "avg", "max" or "min", or c10d's ReduceOp of that name.
        group: the process group, the default one where it is None.
        async_op: returns a :class:`Work` at once, whose `result()` is a list of the tensor below.

    Returns:
        `[n, ...]`, new: rows `rank * n` to `(rank + 1) * n` of the reduced tensor. The gradient is
        :func:`all_gather`'s of the gradient for "sum" and "avg"; there is none for "max" and "min".

    Raises:
        PeerError: another rank died, did not answer within the group's timeout, or called something else.
        TypeError: another dtype.
        ValueError: another op or shape, or this process is not in `group`.
    """
    word = op_name(op)
    check_tensor("reduce_scatter", t, word)
    group = check_group("reduce_scatter", group)
    size = group.size()
    if t.dim() == 0 or t.shape[0] % size:
        raise ValueError(f"reduce_scatter: t: expected [{size} * n, ...], got {list(t.shape)}")
    if async_op:
        t = t.detach()
        return _later(t, group, lambda: scatter(t, word, group), lambda network: network.reduce_scatter(t, word))
    return torch.ops.engine.reduce_scatter(t, word, group.group_name)


def all_gather(t: torch.Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False) -> torch.Tensor | Work:
    """Puts the tensors of all ranks of `group` one after the other; every rank gets all.

    Errors, order and transport are those of :func:`all_reduce`.

    Args:
        t: `[n, ...]`, the same shape on every rank, contiguous or not; the dtypes of :func:`all_reduce`.
        group: the process group, the default one where it is None.
        async_op: returns a :class:`Work` at once, whose `result()` is a list of the tensor below.

    Returns:
        `[p * n, ...]` for p ranks, new (of a tensor without dimensions `[p]`). The gradient is :func:`reduce_scatter`'s
        of the gradient.

    Raises:
        PeerError: another rank died, did not answer within the group's timeout, or called something else.
        TypeError: another dtype.
        ValueError: this process is not in `group`.
    """
    check_tensor("all_gather", t, "sum")
    group = check_group("all_gather", group)
    if async_op:
        t = t.detach()
        return _later(t, group, lambda: gather(t, group), lambda network: network.all_gather(t))
    return torch.ops.engine.all_gather(t, group.group_name)


def scatter(t: torch.Tensor, op: str, group: dist.ProcessGroup) -> torch.Tensor:
    """reduce_scatter, of checked arguments, in this thread."""
    way = _way(t, group)
    if isinstance(way, Network):
        return way.run(way.reduce_scatter(t, op))
    size, whole = group.size(), plain(t)
    result = t.new_empty(t.shape[0] // size, *t.shape[1:])
    if size == 1:
        result.copy_(t)
    elif way is not None:
        way.reduce_scatter(whole, result, op)
    else:
        _reduce_scatter_by_torch(result, whole, REDUCE_OPS[op], group=group)
        if op == "avg":
            result.div_(size, rounding_mode=None if t.is_floating_point() else "trunc")
    return result


def gather(t: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """all_gather, of checked arguments, in this thread."""
    way = _way(t, group)
    if isinstance(way, Network):
        return way.run(way.all_gather(t))
    size, part = group.size(), plain(t)
    result = t.new_empty(size * t.shape[0], *t.shape[1:]) if t.dim() else t.new_empty(size)
    if size == 1:
        result.copy_(t)
    elif way is not None:
        way.all_gather(part, result)
    else:
        _all_gather_by_torch(result.view(-1), part.view(-1), group=group)
    return result


def _way(t: torch.Tensor, group: dist.ProcessGroup) -> Communicator | Network | None:
    """None: through torch.distributed."""
    member = member_of(group) if t.device.type == "cpu" else None
    return None if member is None else member.communicator or member.network


def _later(
    t: torch.Tensor,
    group: dist.ProcessGroup,
    function: Callable[[], torch.Tensor],
    collective: Callable[[Network], Collective],
) -> Work:
    """One or the other in the worker: a function, or between hosts a collective."""
    worker, way = member_of(group).worker, _way(t, group)
    if isinstance(way, Network):
        return way.submit(collective(way), worker)
    if way is not None:
        return worker.submit(function)
    result = function()  # torch.distributed is called in the caller's thread, in the order of its calls
    return worker.submit(lambda: result)

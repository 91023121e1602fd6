"""all_reduce: through shared memory where all ranks of a group are on one host, else torch.distributed's own."""

import logging
import threading
import weakref

import torch
import torch.distributed as dist

from engine.distributed._shared_memory import DTYPES, OPS, Communicator, PeerError, connect

__all__ = ["PeerError", "all_reduce"]

logger = logging.getLogger("engine.distributed")

# By group; None where its ranks don't share memory. A destroyed group takes its communicator with it.
_communicators: "weakref.WeakKeyDictionary[dist.ProcessGroup, Communicator | None]" = weakref.WeakKeyDictionary()
_connecting = threading.Lock()


def all_reduce(t: torch.Tensor, op: str = "sum", group: dist.ProcessGroup | None = None) -> None:
    """Reduces `t` over all ranks of `group`, in place; afterwards every rank holds the same bits.

    Where all ranks are processes of one host, the elements go through shared memory and are reduced in rank order:
    the result is the same from run to run too. float16 and bfloat16 are added up in float32 and rounded once. Else
    it is `torch.distributed.all_reduce`, and a line of the log (`engine.distributed`) says why.

    Every rank must call it in the same order with the same number of elements, dtype and op; where they differ, every
    rank raises. After an error the group refuses further calls with the first error's text.

    Args:
        t: any shape, contiguous or not; float32, float64, float16, bfloat16, int32 or int64.
        op: "sum", "avg", "max" or "min". The average of integers is rounded towards zero.
        group: the process group, the default one where it is None.

    Raises:
        PeerError: another rank died, did not answer within the group's timeout, or called something else.
        TypeError: another dtype.
        ValueError: another op, or this process is not in `group`.
    """
    if op not in OPS:
        raise ValueError(f"all_reduce: op: expected one of {', '.join(OPS)}, got {op!r}")
    if t.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"all_reduce: t: expected one of {names}, got {str(t.dtype).removeprefix('torch.')}")
    if t.layout != torch.strided:
        raise TypeError(f"all_reduce: t: expected a dense tensor, got {t.layout}")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError("all_reduce: group: no process group, or this process is not in it")
    communicator = _communicator(group) if t.device.type == "cpu" else None
    if communicator is None:
        _by_torch(t, op, group)
    elif group.size() > 1:
        if t.is_contiguous():
            communicator.all_reduce(t, op)
        else:
            packed = t.detach().contiguous()
            communicator.all_reduce(packed, op)
            t.detach().copy_(packed)


def _communicator(group: dist.ProcessGroup) -> Communicator | None:
    try:
        return _communicators[group]
    except KeyError:
        pass
    with _connecting:
        if group not in _communicators:
            _communicators[group], reason = connect(group)
            if reason:
                logger.warning("all_reduce goes through torch.distributed: %s", reason)
        return _communicators[group]


def _by_torch(t: torch.Tensor, op: str, group: dist.ProcessGroup) -> None:
    reduce_op = {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}.get(op, dist.ReduceOp.SUM)
    packed = t.detach().contiguous()  # the same memory where it is contiguous already
    dist.all_reduce(packed, reduce_op, group=group)
    if op == "avg":  # gloo has no average of its own
        packed.div_(group.size(), rounding_mode=None if t.is_floating_point() else "trunc")
    if packed.data_ptr() != t.data_ptr():
        t.detach().copy_(packed)

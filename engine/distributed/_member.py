"""What this process keeps for each process group: its communicator, its worker, and which way is faster."""

import atexit
import logging
import os
import threading
import time
import weakref

import torch
import torch.distributed as dist

from engine.distributed._network import Network
from engine.distributed._shared_memory import Communicator, PeerError, connect
from engine.distributed._work import Worker

logger = logging.getLogger("engine.distributed")

# Classes of sizes for which the faster way is measured: up to so many bytes, by a tensor of so many.
SIZE_CLASSES = ((16 << 10, 4 << 10), (256 << 10, 64 << 10), (4 << 20, 1 << 20), (None, 16 << 20))
TRIALS = 3

REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,  # gloo has no average of its own
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}


class Member:
    """This process in one group. A destroyed group takes it along."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.communicator, reason = connect(group)
        if reason:
            logger.warning("collectives go through torch.distributed: %s", reason)
        apart = self.communicator is None and group.size() > 1 and dist.is_gloo_available()
        self.network = Network(group) if apart else None
        self.worker, self.process = Worker(), os.getpid()
        self._faster: dict[int, bool] = {}  # by size class: whether shared memory is
        # It must not keep the member, and so neither `self`.
        self._finalizer = weakref.finalize(self, _close, *self._held(), "this rank left the group")
        self._finalizer.atexit = False  # `_close_all` does that

    def shared_memory_is_faster(self, communicator: Communicator, group: dist.ProcessGroup, t: torch.Tensor) -> bool:
        """Whether it beat `dist.all_reduce` at sizes such as that of `t`; measured once, by all ranks alike.

        The operation for which it is asked must have been compared among the ranks, and nothing be under way.
        """
        size_class = _size_class(t)
        if torch.device("cpu") not in group._device_types:  # of NCCL alone: there is no other way
            self._faster[size_class] = True
        if size_class not in self._faster:
            seconds = torch.tensor(_measure(communicator, group, SIZE_CLASSES[size_class][1]), dtype=torch.float32)
            communicator.agree(seconds)  # the slowest rank's, for all
            ours, theirs = seconds.tolist()
            self._faster[size_class] = ours <= theirs
            logger.info("%d bytes: shared memory %.6f s, torch.distributed %.6f s", t.nbytes, ours, theirs)
        return self._faster[size_class]

    def goes_through_memory(self, t: torch.Tensor, op: str, size: int) -> bool:
        """Whether it is settled that `t`, reduced over so many ranks, goes through shared memory.

        Otherwise torch.distributed may be faster and gives the same bits.
        """
        return not same_bits_by_torch(t.dtype, op, size) or self._faster.get(_size_class(t), False)

    def close(self, reason: str) -> None:
        """Ends what is under way with an error, and gives memory and thread back."""
        self._finalizer.detach()
        _close(*self._held(), reason)

    def _held(self) -> tuple[list[Communicator | Network], Worker, int]:
        return [way for way in (self.communicator, self.network) if way is not None], self.worker, self.process


def same_bits_by_torch(dtype: torch.dtype, op: str, size: int) -> bool:
    """Whether `dist.all_reduce` over so many ranks gives what is given through shared memory.

    But for what a NaN holds besides, and for numbers so small that `torch.set_flush_denormal` takes them for 0 in
    this thread and not in gloo's. gloo adds up in an order of its own, in float16 and bfloat16 rounds after each
    addition, and lets a maximum pass a NaN; its sum of int32 may overflow before it is divided.
    """
    if dtype.is_floating_point:
        return size == 2 and dtype in (torch.float32, torch.float64) and op in ("sum", "avg")
    return op != "avg"


def _size_class(t: torch.Tensor) -> int:
    return next(i for i, (most, _) in enumerate(SIZE_CLASSES) if most is None or t.nbytes <= most)


def _measure(communicator: Communicator, group: dist.ProcessGroup, nbytes: int) -> list[float]:
    """Seconds of the quickest of some trials, through shared memory and through torch.distributed."""
    t = torch.zeros(nbytes // 4, dtype=torch.float32)
    best = [float("inf")] * 2
    for trial in range(TRIALS + 1):
        for way in range(2):
            start = time.perf_counter()
            if way == 0:
                communicator.probe(t)
            else:
                reduce_by_torch(t, "sum", group, communicator)
            if trial:  # the first finds buffers and connections cold
                best[way] = min(best[way], time.perf_counter() - start)
    return best


def reduce_by_torch(t: torch.Tensor, op: str, group: dist.ProcessGroup, communicator: Communicator | None) -> None:
    """`dist.all_reduce` of a contiguous tensor, in place, with the errors of this package."""
    inner = getattr(group, "inner", None)  # of a group of the backend "engine", whose all_reduce would come here again
    try:
        if inner is not None and t.device.type == "cpu":
            inner.allreduce([t], REDUCE_OPS[op]).wait()
        else:
            dist.all_reduce(t, REDUCE_OPS[op], group=group)
    except RuntimeError as error:
        if communicator is None:
            raise
        raise PeerError(f"all_reduce: {communicator.fail(str(error))}") from None
    if op == "avg":
        t.div_(group.size(), rounding_mode=None if t.is_floating_point() else "trunc")


GLOO_LETS_GO = 0.05  # seconds
_members: "weakref.WeakKeyDictionary[dist.ProcessGroup, Member]" = weakref.WeakKeyDictionary()
_connecting: "weakref.WeakKeyDictionary[dist.ProcessGroup, threading.Lock]" = weakref.WeakKeyDictionary()
_looking = threading.Lock()


def member_of(group: dist.ProcessGroup) -> Member:
    """This process's member of `group`, which every rank makes with its first call."""
    member = _members.get(group)
    if member is None:
        with _looking:
            connecting = _connecting.setdefault(group, threading.Lock())
        with connecting:  # one for each group: ranks may make theirs in different orders, in several threads
            if group not in _members:
                _members[group] = Member(group)
            member = _members[group]
    if member.process != os.getpid():  # a forked child's answers would be taken for its parent's
        raise RuntimeError(
            f"engine.distributed: this group belongs to process {member.process}, which made it: "
            "a forked child needs one of its own"
        )
    return member


def _close(ways: list[Communicator | Network], worker: Worker, process: int, reason: str) -> None:
    if process != os.getpid():  # a forked child, which would close its parent's connections
        return
    for way in ways:
        way.close(reason)
    worker.stop()


@atexit.register
def _close_all() -> None:
    """A thread in native code while the interpreter goes would abort the process, and a waiting one hold it up.

    So would a thread of gloo's that is about to let go of the last tensor it was given, for which it wants the
    interpreter's lock. There is no way to ask for it; it is given a while in which the lock is free.
    """
    members = list(_members.values())
    for member in members:
        member.close("this rank is exiting")
    if members:
        time.sleep(GLOO_LETS_GO)

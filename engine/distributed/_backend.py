"""The c10d backend "engine": `dist.init_process_group("engine")`, and every `dist.all_reduce` is this package's.

Importing :mod:`engine.distributed` registers it. All other collectives, and all-reduces that this package has no kernel
for (other dtypes, products, sparse tensors, tensors on a GPU), go to gloo on the CPU and to NCCL on CUDA.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.distributed._all_reduce import begin, check_writable, op_name
from engine.distributed._member import _members
from engine.distributed._shared_memory import DTYPES, OPS
from engine.distributed._work import Work

NAME = "engine"


class EngineProcessGroup(dist.ProcessGroup):
    """A process group with gloo and NCCL inside, that all-reduces by itself."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        backend_type = dist.ProcessGroup.BackendType
        self.inner = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)
        self._set_default_backend(backend_type.GLOO)
        self._register_backend(torch.device("cpu"), backend_type.GLOO, self.inner)
        if torch.cuda.is_available() and dist.is_nccl_available():
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, options)
            self._register_backend(torch.device("cuda"), backend_type.NCCL, nccl)

    # What C++ may call (DDP compares its parameters so) is passed on here, and not left to the base class. That would
    # call gloo with the interpreter's lock held, while a thread of gloo, whose queue is locked, waits for it to let go
    # of a tensor: both for ever.

    def allgather(self, *args: Any, **named: Any) -> Any:  # type: ignore[override]
        """Of the inner group."""
        return self._of(args, named).allgather(*args, **named)

    def allreduce_coalesced(self, *args: Any, **named: Any) -> Any:  # type: ignore[override]
        """Of the inner group."""
        return self._of(args, named).allreduce_coalesced(*args, **named)

    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> Any:  # type: ignore[override]
        """Of the inner group, and it waits for all-reduces before it, as gloo's does."""
        opts, timeout = (None, opts) if isinstance(opts, timedelta) else (opts, timeout)
        opts = dist.BarrierOptions() if opts is None else opts
        if timeout is not None:
            opts.timeout = timeout
        device = opts.device if getattr(opts, "device", None) is not None else torch.device("cpu")
        member, waits = _members.get(self), not getattr(opts, "asyncOp", True)
        if member is not None and waits:
            member.worker.drain()
        work = self._get_backend(device).barrier(opts)  # type: ignore[attr-defined]  # in the caller's thread and order
        return work if member is None or waits else _C10dWork(member.worker.submit(lambda: _passed(work)), None)

    def broadcast(self, *args: Any, **named: Any) -> Any:  # type: ignore[override]
        """Of the inner group."""
        return self._of(args, named).broadcast(*args, **named)

    def reduce_scatter(self, *args: Any, **named: Any) -> Any:  # type: ignore[override]
        """Of the inner group."""
        return self._of(args, named).reduce_scatter(*args, **named)

    def send(self, *args: Any, **named: Any) -> Any:  # type: ignore[override]
        """Of the inner group."""
        return self._of(args, named).send(*args, **named)

    def recv(self, *args: Any, **named: Any) -> Any:  # type: ignore[override]
        """Of the inner group."""
        return self._of(args, named).recv(*args, **named)

    def _of(self, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """The inner group for the device of the first tensor among the arguments."""
        first: Any = (*args, *named.values())
        while isinstance(first, (list, tuple)):
            if not first:
                return self.inner  # whose error is clear
            first = first[0]
        return self._get_backend(first.device if isinstance(first, torch.Tensor) else torch.device("cpu"))

    def getBackendName(self) -> str:
        """What `dist.get_backend` and log lines show."""
        return NAME

    def allreduce(  # type: ignore[override]
        self,
        tensors: Any = None,
        opts: Any = None,
        timeout: timedelta | None = None,
        *,
        op: Any = None,
        tensor: torch.Tensor | None = None,
    ) -> Any:
        """What `dist.all_reduce`, DDP and c10d's own ops call, with one tensor; c10d's other overloads go as well."""
        tensors = [tensor] if tensors is None and tensor is not None else tensors
        if isinstance(tensors, torch.Tensor):
            tensors = [tensors]
        if not isinstance(opts, dist.AllreduceOptions):
            given, opts = opts if op is None else op, dist.AllreduceOptions()
            opts.reduceOp = dist.ReduceOp.SUM if given is None else given
            opts.timeout = opts.timeout if timeout is None else timeout
        op = op_name(opts.reduceOp)
        t = tensors[0] if len(tensors) == 1 else None
        if t is None or op not in OPS or t.device.type != "cpu" or t.dtype not in DTYPES or t.layout != torch.strided:
            return self._of([tensors], {}).allreduce(tensors, opts)
        check_writable(t)
        if getattr(opts, "asyncOp", True):
            return _C10dWork(begin(t, op, self, async_op=True), t)
        begin(t, op, self)
        return _C10dWork(None, t)


def _passed(barrier: Any) -> torch.Tensor:
    barrier.wait()
    return torch.empty(0)


class _C10dWork(dist._Work):
    """A :class:`Work` in c10d's clothes; None is one that is done."""

    def __init__(self, work: Work | None, t: torch.Tensor | None) -> None:
        super().__init__()
        self._work = work
        if work is not None:
            # To C++ an error that Python set is a value, which DDP takes for the result; one that `then` raises isn't.
            self._future = work.get_future().then(lambda done: done.value())
        else:
            self._future = torch.futures.Future()
            self._future.set_result([t])

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Raises what the operation raised; c10d's 0 stands for no timeout but the group's."""
        return self._work.wait(timeout if timeout > timedelta(0) else None) if self._work is not None else True

    def is_completed(self) -> bool:
        """Whether it is done, well or not."""
        return self._future.done()

    def get_future(self) -> torch.futures.Future:
        """Of a list with the tensor."""
        return self._future

    def result(self) -> list[torch.Tensor]:
        """Waits, and returns what the future does."""
        self.wait()
        return self._future.value()


def register() -> None:
    """Makes the name known to torch.distributed."""
    dist.Backend.register_backend(NAME, EngineProcessGroup, devices=["cpu", "cuda"])

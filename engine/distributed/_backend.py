"""The c10d backend "engine": `dist.init_process_group("engine")`, and every `dist.all_reduce` is this package's.

Importing :mod:`engine.distributed` registers it. All other collectives, and all-reduces that this package has no kernel
for (other dtypes, products, sparse tensors, tensors on a GPU), go to gloo on the CPU and to NCCL on CUDA.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.distributed._all_reduce import begin
from engine.distributed._shared_memory import DTYPES
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

    def getBackendName(self) -> str:
        """What `dist.get_backend` and log lines show."""
        return NAME

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:  # type: ignore[override]
        """What `dist.all_reduce`, DDP and c10d's own ops call; `tensors` has one element."""
        opts = dist.AllreduceOptions() if opts is None else opts
        op = _op(opts.reduceOp)
        t = tensors[0]
        if len(tensors) > 1 or op is None or t.device.type != "cpu" or t.dtype not in DTYPES or t.is_sparse:
            return self._get_backend(t.device).allreduce(tensors, opts)  # type: ignore[attr-defined]
        if getattr(opts, "asyncOp", True):
            return _C10dWork(begin(t, op, self, async_op=True), t)
        begin(t, op, self)
        return _C10dWork(None, t)


class _C10dWork(dist._Work):
    """A :class:`Work` in c10d's clothes; None is one that is done."""

    def __init__(self, work: Work | None, t: torch.Tensor) -> None:
        super().__init__()
        self._work = work
        if work is not None:
            self._future = work.get_future()
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


def _op(reduce_op: Any) -> str | None:
    """Our word for c10d's; None where there is none."""
    for op in ("sum", "avg", "max", "min"):
        if reduce_op == getattr(dist.ReduceOp, op.upper()):
            return op
    return None


def register() -> None:
    """Makes the name known to torch.distributed."""
    dist.Backend.register_backend(NAME, EngineProcessGroup, devices=["cpu", "cuda"])

"""Collectives among the processes that `torch.distributed` has started, and models sharded over them."""

from engine.distributed import _backend, functional
from engine.distributed._all_reduce import PeerError, all_reduce, bytes_sent
from engine.distributed._fsdp import FsdpReduceScatter
from engine.distributed._hook import HookState, ring_hook
from engine.distributed._parallel_linear import ColumnParallelLinear, RowParallelLinear
from engine.distributed._scatter_gather import all_gather, reduce_scatter
from engine.distributed._tensor_parallel import tensor_parallel_
from engine.distributed._work import Work

__all__ = [
    "ColumnParallelLinear",
    "FsdpReduceScatter",
    "HookState",
    "PeerError",
    "RowParallelLinear",
    "Work",
    "all_gather",
    "all_reduce",
    "bytes_sent",
    "functional",
    "reduce_scatter",
    "ring_hook",
    "tensor_parallel_",
]

_backend.register()

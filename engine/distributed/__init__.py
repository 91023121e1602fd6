"""Collectives among the processes that `torch.distributed` has started, and models sharded over them."""

from engine.distributed._all_reduce import PeerError, all_reduce, bytes_sent
from engine.distributed._fsdp import FsdpReduceScatter
from engine.distributed._hook import HookState, ring_hook
from engine.distributed._parallel_linear import ColumnParallelLinear, RowParallelLinear
from engine.distributed._tensor_parallel import tensor_parallel_

__all__ = [
    "ColumnParallelLinear",
    "FsdpReduceScatter",
    "HookState",
    "PeerError",
    "RowParallelLinear",
    "all_reduce",
    "bytes_sent",
    "ring_hook",
    "tensor_parallel_",
]

"""Collectives among the processes that `torch.distributed` has started."""

from engine.distributed import _backend, functional
from engine.distributed._all_reduce import PeerError, all_reduce, bytes_sent
from engine.distributed._hook import HookState, ring_hook
from engine.distributed._scatter_gather import all_gather, reduce_scatter
from engine.distributed._work import Work

__all__ = [
    "HookState",
    "PeerError",
    "Work",
    "all_gather",
    "all_reduce",
    "bytes_sent",
    "functional",
    "reduce_scatter",
    "ring_hook",
]

_backend.register()

"""Collectives among the processes that `torch.distributed` has started."""

from engine.distributed import _backend, functional
from engine.distributed._all_reduce import PeerError, all_reduce
from engine.distributed._scatter_gather import all_gather, reduce_scatter
from engine.distributed._work import Work

__all__ = ["PeerError", "Work", "all_gather", "all_reduce", "functional", "reduce_scatter"]

_backend.register()

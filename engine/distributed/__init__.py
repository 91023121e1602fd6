"""Collectives among the processes that `torch.distributed` has started."""

from engine.distributed._all_reduce import PeerError, all_reduce

__all__ = ["PeerError", "all_reduce"]

"""Collectives among the processes that `torch.distributed` has started."""

from engine.distributed._all_reduce import PeerError, all_reduce, bytes_sent
from engine.distributed._hook import HookState, ring_hook

__all__ = ["HookState", "PeerError", "all_reduce", "bytes_sent", "ring_hook"]

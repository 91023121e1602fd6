"""Connects the ranks of a group through shared memory, and hands tensors to the native class."""

import importlib
import json
import logging
import os
import secrets
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

OPS = ("sum", "avg", "max", "min")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64)

logger = logging.getLogger("engine.distributed")


class PeerError(RuntimeError):
    """Another rank died, stalled or called something else; the text names it, its host and the operation's number."""


class Communicator:
    """The shared memory of one group, seen from one of its ranks."""

    def __init__(self, native: Any, memory: Any, timeout: float) -> None:
        self._memory, self._timeout, self._failure = memory, timeout, native.PeerFailure
        self._ops = {op: getattr(native.RingOp, op) for op in OPS}
        self._dtypes = {dtype: getattr(native.RingDtype, str(dtype).removeprefix("torch.")) for dtype in DTYPES}

    def all_reduce(self, t: torch.Tensor, op: str) -> None:
        """Reduces a contiguous tensor in place."""
        dtype = self._dtypes[t.dtype]
        try:
            self._memory.all_reduce(t.data_ptr(), t.numel(), dtype, self._ops[op], self._timeout, logger.warning)
        except self._failure as error:
            raise PeerError(f"all_reduce: {error}") from None


def connect(group: dist.ProcessGroup) -> tuple[Communicator | None, str]:
    """Every rank of `group` calls it; all get a communicator, or all get None and why.

    Each rank publishes where its segment is, opens every other's by `/proc/<pid>/fd/<fd>` and finds its random token
    in it, on a host with the same boot id: this proves that they share memory, whatever containers they are in.
    """
    store = dist.PrefixStore("engine.all_reduce", c10d._get_process_group_store(group))
    return connect_ranks(store, dist.get_rank(group), group.size(), _timeout_seconds(group))


def connect_ranks(store: dist.Store, rank: int, size: int, timeout: float) -> tuple[Communicator | None, str]:
    """The same for ranks 0 to `size` that share a store."""
    native, memory, refusal = None, None, ""
    token = secrets.token_hex(16)
    try:
        if os.environ.get("ENGINE_SHARED_MEMORY") == "0":
            raise RuntimeError("switched off by ENGINE_SHARED_MEMORY=0")
        native = importlib.import_module("engine._native")
        memory = native.SharedMemory(rank, size, token)
    except (ImportError, RuntimeError) as error:
        refusal = f"rank {rank} on {socket.gethostname()}: {error}"
    place = {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pid": os.getpid(),
        "descriptor": memory.descriptor if memory is not None else -1,
        "token": token,
    }
    store.set(f"place/{rank}", json.dumps(place))
    places = [json.loads(store.get(f"place/{other}")) for other in range(size)]
    if memory is not None:
        refusal = _open_peers(memory, rank, places)
    store.set(f"refusal/{rank}", refusal or "none")
    refusals = [store.get(f"refusal/{other}").decode() for other in range(size)]
    if memory is not None:
        memory.close_descriptor()  # everybody has it mapped, or nobody needs it
    refused = next((text for text in refusals if text != "none"), "")
    if refused:
        return None, refused
    return Communicator(native, memory, timeout), ""


def _open_peers(memory: Any, rank: int, places: list[dict[str, Any]]) -> str:
    """Why a peer's segment can't be opened; empty where all are open."""
    for other, place in enumerate(places):
        if other == rank:
            continue
        where = f"rank {other} on {place['host']}"
        if place["descriptor"] < 0:
            return f"{where} has no shared memory"
        if not place["boot"] or place["boot"] != places[rank]["boot"]:
            return f"{where} is not on the host of rank {rank}"
        try:
            memory.open_peer(other, place["pid"], place["descriptor"], place["token"], place["host"])
        except RuntimeError as error:
            return f"{where}: {error}"
    return ""


def _boot_id() -> str:
    """A random name of the running kernel, "" where there is none to read."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _timeout_seconds(group: dist.ProcessGroup) -> float:
    """The group's own timeout, which torch keeps in its backend."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None and hasattr(options, "_timeout"):
            return options._timeout.total_seconds()
    return c10d.default_pg_timeout.total_seconds()

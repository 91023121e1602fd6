"""Connects the ranks of a group through shared memory, and hands tensors to the native class."""

import importlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

KINDS = ("all_reduce", "reduce_scatter", "all_gather")
OPS = ("sum", "avg", "max", "min")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64)

logger = logging.getLogger("engine.distributed")


class PeerError(RuntimeError):
    """Another rank died, stalled or called something else; the text names it, its host and the operation's number."""


class Communicator:
    """The shared memory of one group, seen from one of its ranks. Tensors are contiguous, on the CPU."""

    def __init__(self, native: Any, memory: Any, timeout: float) -> None:
        self._memory, self._timeout, self._failure = memory, timeout, native.PeerFailure
        self._kinds = {kind: getattr(native.RingKind, kind) for kind in KINDS}
        self._ops = {op: getattr(native.RingOp, op) for op in OPS}
        self._dtypes = {dtype: getattr(native.RingDtype, str(dtype).removeprefix("torch.")) for dtype in DTYPES}
        self._codecs = {codec: getattr(native.RingCodec, codec or "none") for codec in (None, "bf16", "int8", "bitmap")}
        self._number = 0  # of operations begun
        self._lock = threading.Lock()  # held by an operation

    def all_reduce(
        self,
        t: torch.Tensor,
        op: str,
        codec: str | None = None,
        density: float = 0.01,
        compared: bool = False,
    ) -> None:
        """Reduces `t` in place. Nothing is encoded, but ranks must agree on the codec.

        `compared`: the operation was begun by `compare`.
        """
        self._number += not compared
        self._run("all_reduce", t, t, op, t.numel(), codec, density if codec == "bitmap" else 0.0)

    def reduce_scatter(self, t: torch.Tensor, result: torch.Tensor, op: str) -> None:
        """Reduces `t`, as many elements a rank as `result` has, and leaves this rank's in `result`."""
        self._number += 1
        self._run("reduce_scatter", t, result, op, result.numel())

    def all_gather(self, t: torch.Tensor, result: torch.Tensor) -> None:
        """Puts every rank's `t` into `result`, one after the other."""
        self._number += 1
        self._run("all_gather", t, result, "sum", t.numel())

    def compare(self, kind: str, t: torch.Tensor, op: str) -> None:
        """Begins an operation whose data goes another way: raises where ranks call something else."""
        self._number += 1
        self._run(kind, t, t, op, t.numel(), compare=True)

    def probe(self, t: torch.Tensor) -> None:
        """Sums `t` within the operation that is under way; for measuring, and for agreeing on what was measured."""
        self._run("all_reduce", t, t, "sum", t.numel())

    def agree(self, t: torch.Tensor) -> None:
        """`t` becomes the ranks' largest, within the operation that is under way."""
        self._run("all_reduce", t, t, "max", t.numel())

    def _run(
        self,
        kind: str,
        t: torch.Tensor,
        result: torch.Tensor,
        op: str,
        numel: int,
        codec: str | None = None,
        density: float = 0.0,
        compare: bool = False,
    ) -> None:
        with self._lock:
            try:
                self._memory.run(
                    self._number,
                    self._kinds[kind],
                    t.data_ptr(),
                    result.data_ptr(),
                    numel,
                    self._dtypes[t.dtype],
                    self._ops[op],
                    self._codecs[codec],
                    density,
                    compare,
                    self._timeout,
                    logger.warning,
                )
            except self._failure as error:
                raise PeerError(f"{kind}: {error}") from None

    def fail(self, reason: str) -> str:
        """Refuses further use after an error that came another way; returns the text that says who was lost, if any."""
        end = time.monotonic() + 0.2  # a rank that dies closes its connections a moment before it is gone
        text = self._memory.lost()
        while not text and time.monotonic() < end:
            time.sleep(0.01)
            text = self._memory.lost()
        text = text or f"{reason} in operation {self._number}"
        self._memory.fail(text)
        return text

    def close(self, reason: str) -> None:
        """Ends an operation that waits, in whatever thread, and gives the memory back."""
        self._memory.interrupt(reason)
        if self._lock.acquire(timeout=2):
            self._memory = _Closed(reason, self._failure)
            self._lock.release()


class _Closed:
    """Stands in for the memory that was given back."""

    def __init__(self, reason: str, failure: type[Exception]) -> None:
        self._reason, self._failure = reason, failure

    def run(self, *args: object) -> None:
        """Refuses."""
        raise self._failure(self._reason)

    def interrupt(self, text: str) -> None:
        """There is nothing to end."""

    def lost(self) -> str:
        """Why nothing works any more, in the place of a peer's name."""
        return self._reason

    def fail(self, text: str) -> None:
        """It refuses already."""


def connect(group: dist.ProcessGroup) -> tuple[Communicator | None, str]:
    """Every rank of `group` calls it; all get a communicator, or all get None and why.

    Each rank publishes where its segment is, opens every other's by `/proc/<pid>/fd/<fd>` and finds its random token
    in it, on a host with the same boot id: this proves that they share memory, whatever containers they are in.
    """
    store = dist.PrefixStore("engine.all_reduce", c10d._get_process_group_store(group))
    return connect_ranks(store, dist.get_rank(group), group.size(), _timeout_seconds(group))


def connect_ranks(store: dist.Store, rank: int, size: int, timeout: float) -> tuple[Communicator | None, str]:
    """The same for ranks 0 to `size` that share a store."""
    # A group of the same name may have been here before: what it left in the store is not looked at.
    store = dist.PrefixStore(str(store.add(f"generation/{rank}", 1)), store)
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
    places = [json.loads(_get(store, "place", other, timeout)) for other in range(size)]
    if memory is not None:
        refusal = _open_peers(memory, rank, places)
    store.set(f"refusal/{rank}", refusal or "none")
    refusals = [_get(store, "refusal", other, timeout, memory if not refusal else None) for other in range(size)]
    if memory is not None:
        memory.close_descriptor()  # everybody has it mapped, or nobody needs it
    refused = next((text for text in refusals if text != "none"), "")
    if refused:
        return None, refused
    return Communicator(native, memory, timeout), ""


def _get(store: dist.Store, what: str, rank: int, timeout: float, memory: Any = None) -> str:
    """What `rank` has set, waited for as long as it lives and the timeout lasts."""
    end = time.monotonic() + timeout
    while not store.check([f"{what}/{rank}"]):
        lost = memory.lost() if memory is not None else ""
        if lost:
            raise PeerError(f"while connecting: {lost}")
        if time.monotonic() > end:
            raise PeerError(f"while connecting: rank {rank} did not answer within {timeout} s in operation 1")
        try:
            store.wait([f"{what}/{rank}"], timedelta(seconds=0.1))
        except RuntimeError:  # not yet there
            continue
    return store.get(f"{what}/{rank}").decode()


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

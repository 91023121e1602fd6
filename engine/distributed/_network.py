"""Ranks that don't all share a host: their gloo connections, what they compare before each operation, and errors."""

import json
import logging
import os
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from engine.distributed._exchange import GATHER, Exchange, Place
from engine.distributed._shared_memory import (
    DTYPES,
    KINDS,
    OPS,
    Communicator,
    PeerError,
    _boot_id,
    _timeout_seconds,
    connect_ranks,
)
from engine.ops.ring_codec import CODECS

logger = logging.getLogger("engine.distributed")

HEADER = struct.Struct("<qqiiiid")  # operation's number, numel, kind, dtype, op, codec, density
HEADER_TAG = 0
WARN_AFTER = 10.0  # seconds
GRACE = 0.4  # seconds in which every survivor of a failure reports itself
UNKNOWN = "unknown"  # what a survivor reports that was not the cause


class Network:
    """One group's connections between hosts, seen from one of its ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(group), group.size()
        self._others = [rank for rank in range(self.size) if rank != self.rank]
        self.timeout = _timeout_seconds(group)
        self.bytes_sent = 0  # to other hosts, by all operations
        store = dist.PrefixStore("engine.network", c10d._get_process_group_store(group))
        # A group of the same name may have been here before: what it left in the store is not looked at.
        self._store = dist.PrefixStore(str(store.add(f"generation/{self.rank}", 1)), store)
        # Connections of our own: after an error they are closed, which wakes whoever waits for this rank.
        wait = timedelta(seconds=self.timeout)
        self._gloo: Any = dist.ProcessGroupGloo(dist.PrefixStore("gloo", self._store), self.rank, self.size, wait)
        self._store.set(
            f"host/{self.rank}", json.dumps([_boot_id(), os.readlink("/proc/self/ns/pid"), socket.gethostname()])
        )
        where = [json.loads(self._store.get(f"host/{rank}")) for rank in range(self.size)]
        self._names = [f"rank {rank} on {name}" for rank, (_, _, name) in enumerate(where)]
        self._place, self._local = self._find_place(group, [(boot, space) for boot, space, _ in where])
        self._number, self._error = 0, ""
        self._headers = torch.empty(self.size, HEADER.size, dtype=torch.uint8)
        self._lock = threading.Lock()
        self._waiting_since, self._waits_for = 0.0, self.rank  # 0 while no operation runs
        if self.timeout > WARN_AFTER:
            threading.Thread(target=_warn_when_slow, args=(weakref.ref(self),), daemon=True).start()

    def _find_place(self, group: dist.ProcessGroup, hosts: list) -> tuple[Place, Communicator | None]:
        """By hosts, where each has equally many ranks, more than one, which prove that they share memory."""
        flat = Place(range(self.size), self.rank, 0, 1)
        ranks: dict[Any, list[int]] = {}
        for rank, host in enumerate(hosts):
            ranks.setdefault(host, []).append(rank)
        by_host = list(ranks.values())
        self.hosts = len(by_host)
        each = len(by_host[0])
        if each == 1 or len(by_host) == 1 or any(len(of) != each for of in by_host):
            return flat, None
        host = next(i for i, of in enumerate(by_host) if self.rank in of)
        local_rank = by_host[host].index(self.rank)
        store = dist.PrefixStore(f"host {host}", self._store)
        local, reason = connect_ranks(store, local_rank, each, self.timeout)
        self._store.set(f"local/{self.rank}", reason or "none")
        reasons = [self._store.get(f"local/{rank}").decode() for rank in range(self.size)]
        if any(text != "none" for text in reasons):
            return flat, None
        return Place([of[local_rank] for of in by_host], host, local_rank, each), local

    def all_reduce(
        self, t: Tensor, op: str, codec: str | None = None, residual: Tensor | None = None, density: float = 0.01
    ) -> None:
        """Reduces a contiguous tensor in place; with a codec it and `residual`, of as many elements, are float32."""
        flat, left = _flat(t), None if residual is None else _flat(residual)
        self._run("all_reduce", t, op, lambda: self._reduce(flat, op, codec, left, density), codec, density)

    def reduce_scatter(self, t: Tensor, result: Tensor, op: str) -> None:
        """Reduces a contiguous tensor, and leaves this rank's part in `result`: all_reduce's, to the bit."""

        def reduce() -> None:
            whole, n = _flat(t).clone(), result.numel()
            self._reduce(whole, op)
            result.copy_(whole[self.rank * n : (self.rank + 1) * n].view_as(result))

        self._run("reduce_scatter", result, op, reduce)

    def all_gather(self, t: Tensor, result: Tensor) -> None:
        """Puts every rank's `t` into `result`, one after the other; both are contiguous."""

        def gather() -> None:
            flat, parts = _flat(t), result.view(self.size, t.numel())
            parts[self.rank].copy_(flat)
            works = [self._receive(parts[rank], rank, GATHER) for rank in self._others]
            works += [self._send(flat, rank, GATHER) for rank in self._others]
            for work in works:
                work()
            self.bytes_sent += t.nbytes * (self.size - self._place.local_size)

        self._run("all_gather", t, "sum", gather)

    def _run(
        self,
        kind: str,
        t: Tensor,
        op: str,
        function: Callable[[], None],
        codec: str | None = None,
        density: float = 0.0,
    ) -> None:
        """Runs an operation once all ranks are known to call the same, of as many elements as `t` has."""
        with self._lock:
            if self._error:
                raise PeerError(f"{kind}: this group failed before: {self._error}")
            try:
                self._number += 1
                self._waiting_since = time.monotonic()
                try:
                    self._compare(kind, t, op, codec, density)
                    function()
                except Exception as error:
                    self._error = self._explain(error)
                    raise PeerError(f"{kind}: {self._error}") from None
            except PeerError:
                raise
            except BaseException:  # an interrupt, be it while an error was explained
                self._error = f"{self._names[self.rank]} was interrupted in operation {self._number}"
                self._leave(self._error, self._error)
                raise
            finally:
                self._waiting_since = 0.0

    def _reduce(
        self, t: Tensor, op: str, codec: str | None = None, residual: Tensor | None = None, density: float = 0.0
    ) -> None:
        if op == "avg" and t.dtype == torch.int32:
            wide = t.long()  # the sum may not fit where the average does
            self._reduce(wide, op)
            t.copy_(wide)
        elif codec is None and self._local is None and t.dtype not in (torch.float16, torch.bfloat16):
            self._by_gloo(t, op)
        else:
            exchange = Exchange(t, op, codec, residual, density, self._place, self._local, self._send, self._receive)
            exchange.run()
            self.bytes_sent += exchange.bytes_sent

    def _by_gloo(self, t: Tensor, op: str) -> None:
        """gloo's own ring: it uses all of the wire, and is quicker than ours for small tensors."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(
            {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}.get(op, dist.ReduceOp.SUM)
        )
        options.timeout = timedelta(seconds=self.timeout)
        self._waits_for = (self.rank + 1) % self.size
        self._gloo.allreduce([t], options).wait()
        self.bytes_sent += 2 * t.numel() * t.element_size() * (self.size - 1) // self.size
        if op == "avg":
            t.div_(self.size, rounding_mode=None if t.is_floating_point() else "trunc")

    def _send(self, t: Tensor, rank: int, tag: int) -> Callable[[], None]:
        return self._bounded(self._gloo.send([t], rank, tag), rank)

    def _receive(self, t: Tensor, rank: int, tag: int) -> Callable[[], None]:
        return self._bounded(self._gloo.recv([t], rank, tag), rank)

    def _bounded(self, work: Any, rank: int) -> Callable[[], None]:
        def wait() -> None:
            self._waits_for = rank
            work.wait(timedelta(seconds=self.timeout))

        return wait

    def _compare(self, kind: str, t: Tensor, op: str, codec: str | None, density: float) -> None:
        """Every rank compares itself with all others before any data goes out: all find a difference, or none."""
        coded = CODECS.index(codec) if codec else -1
        what = (t.numel(), KINDS.index(kind), DTYPES.index(t.dtype), OPS.index(op), coded, density)
        own = torch.frombuffer(bytearray(HEADER.pack(self._number, *what)), dtype=torch.uint8)
        receives = [self._receive(self._headers[rank], rank, HEADER_TAG) for rank in self._others]
        sends = [self._send(own, rank, HEADER_TAG) for rank in self._others]
        for work in receives + sends:
            work()
        for rank in self._others:
            number, *theirs = HEADER.unpack(self._headers[rank].numpy().tobytes())
            if (number, *theirs) != (self._number, *what):
                raise PeerError(
                    f"operation {self._number}: {self._names[rank]} called {_words(*theirs)}, "
                    f"rank {self.rank} {_words(*what)}"
                )

    def _explain(self, error: Exception) -> str:
        """What went wrong, in words; afterwards everybody who waits for this rank knows that something did."""
        text = str(error).removeprefix("all_reduce: ")
        if isinstance(error, PeerError) and text.startswith("operation "):
            return text  # a difference, which every rank sees by itself
        self._leave(text, UNKNOWN)
        reports = self._reports()
        cause = next((report for report in reports.values() if report != UNKNOWN), "")
        if cause:
            return cause
        lost = [rank for rank in self._others if rank not in reports]
        if not lost:
            return f"{text} in operation {self._number}"
        names = " and ".join(self._names[rank] for rank in lost)
        if "timed out" in text.lower() or "did not answer" in text:
            return f"{names} did not answer within {self.timeout} s in operation {self._number}"
        return f"{names} died in operation {self._number}"

    def _leave(self, reason: str, report: str) -> None:
        """Wakes whoever waits for this rank, with a report of why."""
        self._store_bounded(lambda: self._store.set(f"failed/{self.rank}", report))
        self._close_connections(reason)

    def _close_connections(self, reason: str) -> None:
        gloo, local, self._gloo, self._local = self._gloo, self._local, None, None
        if gloo is not None:
            gloo.abort()
        if local is not None:
            local.close(reason)

    def close(self, reason: str) -> None:
        """Ends an operation that waits, in whatever thread, and gives the connections back."""
        self._error = self._error or reason
        self._close_connections(reason)

    def _reports(self) -> dict[int, str]:
        """What others report, until one knows the cause; every survivor does, as a closed connection wakes the next."""
        reports: dict[int, str] = {}
        deadline = time.monotonic() + GRACE
        while len(reports) < len(self._others) and time.monotonic() < deadline:
            for rank in self._others:
                if rank not in reports and (report := self._report(rank)):
                    reports[rank] = report
            if any(report != UNKNOWN for report in reports.values()):
                break
            time.sleep(0.02)
        return reports

    def _report(self, rank: int) -> str:
        """Empty where there is none yet."""
        found: list[str] = []

        def look() -> None:
            if self._store.check([f"failed/{rank}"]):
                found.append(self._store.get(f"failed/{rank}").decode())

        self._store_bounded(look)
        return "".join(found)

    def _store_bounded(self, call: Callable[[], object]) -> None:
        """The store may be held by the very process that is lost."""

        def quietly() -> None:
            try:
                call()
            except RuntimeError as error:
                logger.debug("the store does not answer: %s", error)

        thread = threading.Thread(target=quietly, daemon=True)
        thread.start()
        thread.join(GRACE / 4)


def _flat(t: Tensor) -> Tensor:
    """A contiguous tensor in one dimension; `view` would keep what stride a single element came with."""
    return t.as_strided((t.numel(),), (1,))


def _warn_when_slow(network: "weakref.ref[Network]") -> None:
    """Ends with the network."""
    warned = 0.0
    while (one := network()) is not None:
        since = one._waiting_since
        if since and since != warned and time.monotonic() - since >= WARN_AFTER:
            warned = since
            logger.warning("operation %d has taken 10 s, waiting for %s", one._number, one._names[one._waits_for])
        del one
        time.sleep(0.5)


def _words(numel: int, kind: int, dtype: int, op: int, codec: int, density: float) -> str:
    words = f"{numel} {str(DTYPES[dtype]).removeprefix('torch.')}"
    if KINDS[kind] != "all_gather":
        words = f"{OPS[op]} of {words}"
    if codec >= 0:
        words += f" by {CODECS[codec]}" + (f" with density {density}" if CODECS[codec] == "bitmap" else "")
    return f"{KINDS[kind]} ({words})"

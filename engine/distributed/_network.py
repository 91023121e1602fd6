"""Ranks that don't all share a host: their gloo connections, what they compare before each operation, and errors."""

import dataclasses
import itertools
import json
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from engine.distributed._announcement import Announcement, Call
from engine.distributed._exchange import GATHER, Exchange, Place
from engine.distributed._shared_memory import Communicator, PeerError, _boot_id, _timeout_seconds, connect_ranks
from engine.distributed._work import Operation, Steps, Work, Worker

logger = logging.getLogger("engine.distributed")

WARN_AFTER = 10.0  # seconds
GRACE = 0.4  # seconds in which every survivor of a failure reports itself
UNKNOWN = "unknown"  # what a survivor reports that was not the cause


@dataclasses.dataclass(frozen=True)
class Collective:
    """An operation that can be done.

    Attributes:
        call: what the ranks compare.
        steps: what does it.
        touched: the tensors that it reads and writes.
        overlaps: whether it may begin while the one before ends (see Exchange).
    """

    call: Call
    steps: Callable[[], Steps]
    touched: tuple[Tensor, ...]
    overlaps: bool = False


@dataclasses.dataclass
class _Waiting:
    """How long a group waits for a rank, and for which it waits now."""

    timeout: timedelta
    rank: int


class _Transfer:
    """A send or receive under way; calling it waits until it is done."""

    def __init__(self, work: Any, rank: int, waiting: _Waiting) -> None:
        self.work, self._rank, self._waiting = work, rank, waiting

    def __call__(self) -> None:
        self._waiting.rank = self._rank
        if self.work is None:
            raise RuntimeError("the connections are closed")
        try:
            self.work.wait(self._waiting.timeout)
        finally:
            self.work = None


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
        self._error = ""
        self._waiting = _Waiting(timedelta(seconds=self.timeout), self.rank)
        self._closing = threading.Lock()
        self._transfers: weakref.WeakSet[_Transfer] = weakref.WeakSet()
        self._number, self._order = 0, threading.Lock()  # of operations that were called
        self._turn = threading.Condition()
        self._unfinished: dict[int, bool] = {}  # by number: what was called and has not ended; whether a worker does it
        self._begun: dict[int, float] = {}  # by number: when it was this operation's turn
        self._pool: list[Tensor] = []  # of buffers
        self._refused: list[Announcement] = []
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
    ) -> Collective:
        """Reduces a tensor in place; with a codec in float32, and `residual` is float32 of as many elements."""

        def steps() -> Steps:
            whole = plain(t) if codec is None else plain(t).float()
            yield from self._reduce(_flat(whole), op, codec, None if residual is None else _flat(residual), density)
            if whole.data_ptr() != t.data_ptr():
                t.detach().copy_(whole)
            return t

        dtype = t.dtype if codec is None else torch.float32
        call = Call("all_reduce", t.numel(), dtype, op, codec, density if codec == "bitmap" else 0.0)
        touched = (t,) if residual is None else (t, residual)
        return Collective(call, steps, touched, self._local is None and not self._goes_by_gloo(dtype, codec))

    def reduce_scatter(self, t: Tensor, op: str) -> Collective:
        """Reduces a tensor, whose first dimension's length the ranks divide: a new one with this rank's part."""

        def steps() -> Steps:
            whole = plain(t).clone()
            yield from self._reduce(_flat(whole), op)
            each = whole.shape[0] // self.size
            return whole[self.rank * each : (self.rank + 1) * each].clone()

        return Collective(Call("reduce_scatter", t.numel() // self.size, t.dtype, op), steps, (t,))

    def all_gather(self, t: Tensor) -> Collective:
        """Puts every rank's tensor into a new one, one after the other."""

        def steps() -> Steps:
            mine = _flat(plain(t))
            result = t.new_empty(self.size * t.shape[0], *t.shape[1:]) if t.dim() else t.new_empty(self.size)
            parts = result.view(self.size, mine.numel())
            parts[self.rank].copy_(mine)
            works = [self._receive(parts[rank], rank, GATHER) for rank in self._others]
            works += [self._send(mine, rank, GATHER) for rank in self._others]
            for work in works:
                work()
            yield False
            self.bytes_sent += mine.nbytes * (self.size - self._place.local_size)
            return result

        return Collective(Call("all_gather", t.numel(), t.dtype), steps, (t,))

    def run(self, collective: Collective) -> Tensor:
        """Does it in this thread, in its turn; returns its result."""
        number = 0
        try:
            with self._order:
                number = self._number + 1
                announcement = self._announce(collective.call, by_worker=False)
            steps = self._steps(announcement, collective)
            while True:
                try:
                    next(steps)
                except StopIteration as end:
                    return end.value
        except Exception:
            raise
        except BaseException:
            self._give_up(number, "was interrupted")
            raise

    def submit(self, collective: Collective, worker: Worker) -> Work:
        """Does it in the worker's thread, in its turn; its call goes out to the others at once."""
        number = 0
        try:
            with self._order:
                number = self._number + 1
                announcement = self._announce(collective.call, by_worker=True)
                operation = Operation(lambda: self._steps(announcement, collective), numbered=True)
                if collective.overlaps:
                    operation.touched = collective.touched
                    operation.may_begin = lambda: announcement.has_arrived() and self._is_next(number)
                return worker.submit_operation(operation)
        except BaseException as error:  # an interrupt, or no thread could be started
            self._give_up(number, f"gave up ({error})" if isinstance(error, Exception) else "was interrupted")
            raise

    def _announce(self, call: Call, by_worker: bool) -> Announcement:
        """Gives the call its number and sends it out; in the order of the numbers all is sent, and done."""
        self._number += 1
        with self._turn:
            self._unfinished[self._number] = by_worker
        others = self._others if not self._error else []
        return Announcement(self._number, call, others, self._send, self._receive)

    def _give_up(self, number: int, why: str) -> None:
        """Leaves the group, be it while an error is explained: the others wait for what won't come."""
        self._error = f"{self._names[self.rank]} {why} in operation {number or self._number}"
        self._leave(self._error, self._error)
        with self._turn:
            self._turn.notify_all()

    def _steps(self, announcement: Announcement, collective: Collective) -> Steps:
        """Those of an operation, once all ranks are known to call the same; its errors, explained.

        It ends, well or not, after all that came before: what goes wrong in one leaves the one before alone.
        """
        kind, number = collective.call.kind, announcement.number
        try:
            with self._turn:
                self._turn.wait_for(lambda: self._error or self._is_next(number))
            if self._error:
                if announcement.is_sent:
                    # Others may still answer, and gloo would never rest with an answer for which there is no room.
                    self._refused.append(announcement)
                raise PeerError(f"{kind}: this group failed before: {self._error}")
            self._begun[number] = time.monotonic()
            try:
                announcement.compare(self.rank, self._names)
                result = yield from collective.steps()
                yield from self._until_first(number)
            except Exception as error:
                yield from self._until_first(number)
                if not self._error:  # of an operation that was under way besides
                    self._error = self._explain(error, number)
                raise PeerError(f"{kind}: {self._error}") from None
            return result
        finally:
            self._begun.pop(number, None)
            with self._turn:
                self._unfinished.pop(number, None)
                self._turn.notify_all()

    def _until_first(self, number: int) -> Iterator[bool]:
        """Steps in which those before go on, until none is left."""
        while True:
            with self._turn:
                if next(iter(self._unfinished)) == number:
                    return
            yield False

    def _is_next(self, number: int) -> bool:
        """Whether all operations before it have ended, or are the worker's as it is: that knows when one may begin."""
        with self._turn:
            before = itertools.takewhile(lambda other: other < number, self._unfinished)
            return all(self._unfinished[number] and self._unfinished[other] for other in before)

    def _reduce(
        self, t: Tensor, op: str, codec: str | None = None, residual: Tensor | None = None, density: float = 0.0
    ) -> Iterator[bool]:
        """Steps that reduce a flat contiguous tensor."""
        if op == "avg" and t.dtype == torch.int32:
            wide = t.long()  # the sum may not fit where the average does
            yield from self._reduce(wide, op)
            t.copy_(wide)
        elif self._goes_by_gloo(t.dtype, codec):
            self._by_gloo(t, op)
        else:
            ways = (self._place, self._local, self._send, self._receive, self._pool)
            exchange = Exchange(t, op, codec, residual, density, *ways)
            yield from exchange.steps()
            self.bytes_sent += exchange.bytes_sent

    def _goes_by_gloo(self, dtype: torch.dtype, codec: str | None) -> bool:
        return codec is None and self._local is None and dtype not in (torch.float16, torch.bfloat16)

    def _by_gloo(self, t: Tensor, op: str) -> None:
        """gloo's own ring: it uses all of the wire, and is quicker than ours for small tensors."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(
            {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}.get(op, dist.ReduceOp.SUM)
        )
        options.timeout = timedelta(seconds=self.timeout)
        self._waiting.rank = (self.rank + 1) % self.size
        self._gloo.allreduce([t], options).wait()
        self.bytes_sent += 2 * t.numel() * t.element_size() * (self.size - 1) // self.size
        if op == "avg":
            t.div_(self.size, rounding_mode=None if t.is_floating_point() else "trunc")

    def _send(self, t: Tensor, rank: int, tag: int) -> Callable[[], None]:
        return self._transfer(self._gloo.send([t], rank, tag), rank)

    def _receive(self, t: Tensor, rank: int, tag: int) -> Callable[[], None]:
        return self._transfer(self._gloo.recv([t], rank, tag), rank)

    def _transfer(self, work: Any, rank: int) -> _Transfer:
        transfer = _Transfer(work, rank, self._waiting)
        with self._closing:
            self._transfers.add(transfer)
            if self._gloo is None:  # closed meanwhile
                transfer.work = None
        return transfer

    def _explain(self, error: Exception, number: int) -> str:
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
            return f"{text} in operation {number}"
        names = " and ".join(self._names[rank] for rank in lost)
        if "timed out" in text.lower() or "did not answer" in text:
            return f"{names} did not answer within {self.timeout} s in operation {number}"
        return f"{names} died in operation {number}"

    def _leave(self, reason: str, report: str) -> None:
        """Wakes whoever waits for this rank, with a report of why."""
        self._store_bounded(lambda: self._store.set(f"failed/{self.rank}", report))
        self._close_connections(reason)

    def _close_connections(self, reason: str) -> None:
        with self._closing:
            gloo, local, self._gloo, self._local = self._gloo, self._local, None, None
            transfers = list(self._transfers)
        if gloo is not None:
            gloo.abort()
        # Whatever holds one of its works, a traceback say, keeps the sockets open, and the others waiting.
        for transfer in transfers:
            transfer.work = None
        if local is not None:
            local.close(reason)

    def close(self, reason: str) -> None:
        """Gives the connections back. What waits in gloo, in another thread, ends with the group's timeout."""
        self._error = self._error or reason
        self._close_connections(reason)
        with self._turn:
            self._turn.notify_all()

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


def plain(t: Tensor) -> Tensor:
    """The elements of `t` in order in memory: in its own, or in a copy where it is strided or lazily negated."""
    return t.detach().resolve_neg().contiguous()


def _flat(t: Tensor) -> Tensor:
    """A contiguous tensor in one dimension; `view` would keep what stride a single element came with."""
    return t.as_strided((t.numel(),), (1,))


def _warn_when_slow(network: "weakref.ref[Network]") -> None:
    """Ends with the network."""
    warned = 0
    while (one := network()) is not None:
        number, since = min(one._begun.copy().items(), default=(0, 0.0))
        if number > warned and time.monotonic() - since >= WARN_AFTER:
            warned = number
            logger.warning("operation %d has taken 10 s, waiting for %s", number, one._names[one._waiting.rank])
        del one
        time.sleep(0.5)

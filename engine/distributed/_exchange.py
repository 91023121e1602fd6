"""One all-reduce between hosts, in windows that overlap: encode and send, reduce, pass round.

A tensor goes in windows; of each window every rank owns one piece. A rank sends every other rank's piece to its owner,
who adds up its own and what comes, always in the same order, in float32, encodes the sum once and sends it to all. The
owner itself keeps what the others will decode, so that all hold the same bits. Ranks are addressed in ring order, so
that nobody is sent to by two at a time. Where several ranks share a host (`local`), they first add up each window in
shared memory, then each carries one part of it between the hosts, and in the end they collect each other's parts.

    window             1     2     3     4     5
    encode, send       X     X     X     X     X
    reduce, send                   X     X     X   ...      two windows later
    decode                                     X   ...      another two later

Once all windows are sent the next operation's first ones may follow: it need not wait for this one's reductions. Nor
does a rank that already does so hold up one that doesn't: it has sent its last sum before it waits for anything of the
next operation's.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.ops import ring_decode, ring_encode, ring_prune_encode
from engine.ops.ring_codec import BLOCK, wire_bytes

DELAY = 2  # windows between one stage and the next
AHEAD = 2  # windows for which receives are posted before they are sent to
SLOTS = 2 * DELAY + AHEAD + 1
# Elements of a piece at most, by codec: a few hundred KB on the wire, enough to hide what a message costs.
PIECE = {None: 1 << 18, "bf16": 1 << 18, "int8": 1 << 18, "bitmap": 1 << 21}
SMALLEST_PIECE = 1 << 16
WINDOWS = {None: 32, "bf16": 32, "int8": 32, "bitmap": 4}  # wanted, so that filling and draining cost little
SCATTER, GATHER = 1, 2  # tags
POOLED = 2  # buffers that are kept for the next operations, of which two may be under way at once

Send = Callable[[Tensor, int, int], Any]  # tensor, rank, tag; returns a work
Receive = Send


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rank stands: `column` are the ranks that it exchanges with, one a host, itself among them."""

    column: Sequence[int]
    host: int  # its own index in the column
    local_rank: int
    local_size: int


@dataclasses.dataclass(frozen=True)
class Windows:
    """How a tensor of n elements is cut. The pieces of a window belong to the ranks in order: local rank, then host."""

    n: int
    size: int  # elements of a window
    hosts: int
    local_size: int

    @property
    def count(self) -> int:
        """Number of windows."""
        return -(-self.n // self.size) if self.n else 0

    def window(self, i: int) -> slice:
        """The elements of window i."""
        return slice(i * self.size, min((i + 1) * self.size, self.n))

    def piece(self, i: int, local_rank: int, host: int) -> slice:
        """The elements of window i that this rank owns: whole blocks, but for the end of the tensor."""
        window = self.window(i)
        each = -(-(window.stop - window.start) // (self.hosts * self.local_size) // BLOCK) * BLOCK
        begin = min(window.stop, window.start + (local_rank * self.hosts + host) * each)
        return slice(begin, min(window.stop, begin + each))


def plan(n: int, codec: str | None, place: Place) -> Windows:
    """Windows as large as pieces may be; of a small tensor smaller ones, so that they still overlap."""
    ranks = len(place.column) * place.local_size
    piece = min(PIECE[codec], max(SMALLEST_PIECE, n // (WINDOWS[codec] * ranks)))
    return Windows(n, -(-piece // BLOCK) * BLOCK * ranks, len(place.column), place.local_size)


class Exchange:
    """The all-reduce of one flat contiguous tensor, its buffers taken from `pool` where one there is large enough."""

    def __init__(
        self,
        t: Tensor,
        op: str,
        codec: str | None,
        residual: Tensor | None,
        density: float,
        place: Place,
        local: Any,
        send: Send,
        receive: Receive,
        pool: list[Tensor],
    ) -> None:
        self.t, self.op, self.codec, self.residual, self.density = t, op, codec, residual, density
        self.place, self.local, self.send, self.receive = place, local, send, receive
        self.windows = plan(t.numel(), codec, place)
        own, ring = place.host, len(place.column)
        self.others = [(own + turn) % ring for turn in range(1, ring)]
        self.rows = {host: row for row, host in enumerate(self.others)}  # of a slot's buffers
        self.bytes_sent = 0
        self.pending: dict[tuple[int, int, int], Any] = {}  # receives by window, tag, host
        self.sends: list[list[Any]] = [[] for _ in range(SLOTS)]
        size = t.element_size() * PIECE[None] if codec is None else wire_bytes(codec, PIECE[codec], density)
        size = -(-min(size, self._largest()) // 8) * 8
        # scatter in, scatter out, gather in (a row for each other host), gather out
        # Of windows that fall into equal parts, the part that this rank carries between the hosts.
        part = self.windows.size // place.local_size if local is not None else 0
        self.parts = t.new_empty(SLOTS, part)
        shape = (SLOTS, 3 * len(self.others) + 1, size)
        self.pool, needed = pool, math.prod(shape)
        try:
            self.memory = pool.pop()
        except IndexError:
            self.memory = torch.empty(0, dtype=torch.uint8)
        if self.memory.numel() < needed:
            self.memory = torch.empty(needed, dtype=torch.uint8)
        self.buffers = self.memory[:needed].view(shape)

    def _largest(self) -> int:
        longest = self.windows.piece(0, 0, 0)
        return self._bytes(longest.stop - longest.start)

    def _bytes(self, n: int) -> int:
        return n * self.t.element_size() if self.codec is None else wire_bytes(self.codec, n, self.density)

    def _buffer(self, i: int, kind: int, host: int, n: int) -> Tensor:
        """kind: 0 scatter in, 1 scatter out, 2 gather in, 3 gather out."""
        row = kind * len(self.others) + (0 if kind == 3 else self.rows[host])
        return self.buffers[i % SLOTS, row, : self._bytes(n)]

    def _piece(self, i: int, host: int) -> slice:
        return self.windows.piece(i, self.place.local_rank, host)

    def _in_parts(self, i: int) -> bool:
        """Whether the host's ranks share window i out: all but perhaps the last, which is uneven."""
        window = self.windows.window(i)
        return self.local is not None and window.stop - window.start == self.windows.size

    def _elements(self, i: int, host: int) -> Tensor:
        """The elements of a piece of window i."""
        piece = self._piece(i, host)
        if not self._in_parts(i):
            return self.t[piece]
        n = piece.stop - piece.start
        return self.parts[i % SLOTS, host * n : (host + 1) * n]

    def steps(self) -> Iterator[bool]:
        """Does all of it, a window's worth at a time, and yields whether all windows are sent."""
        count = self.windows.count
        for i in range(min(AHEAD, count)):
            self._post(i)
        for i in range(count + 2 * DELAY if count else 0):
            if i < count:
                self._scatter(i)
            if 0 <= i - DELAY < count:
                self._reduce(i - DELAY)
            if i >= 2 * DELAY:
                self._collect(i - 2 * DELAY)
            # The order among a host's ranks must not depend on when messages from others arrive.
            yield i >= count - 1 and self.local is None
        for works in self.sends:
            for work in works:
                work()
        self.pool.append(self.memory)  # after an error it isn't: something may still arrive there
        del self.pool[:-POOLED]

    def _post(self, i: int) -> None:
        """Posts the receives of window i."""
        own = self._piece(i, self.place.host)
        for host in self.others:
            rank, theirs = self.place.column[host], self._piece(i, host)
            if own.stop > own.start:
                into = self._buffer(i, 0, host, own.stop - own.start)
                self.pending[i, SCATTER, host] = self.receive(into, rank, SCATTER)
            if theirs.stop > theirs.start:
                into = self._buffer(i, 2, host, theirs.stop - theirs.start)
                if self.codec is None:
                    into = self._elements(i, host).view(torch.uint8)
                self.pending[i, GATHER, host] = self.receive(into, rank, GATHER)

    def _send(self, i: int, wire: Tensor, host: int, tag: int) -> None:
        self.sends[i % SLOTS].append(self.send(wire, self.place.column[host], tag))
        self.bytes_sent += wire.numel()

    def _scatter(self, i: int) -> None:
        for work in self.sends[i % SLOTS]:  # of the window that used the slot before: long done
            work()
        self.sends[i % SLOTS].clear()
        self._share_out(i)
        if i + AHEAD < self.windows.count:
            self._post(i + AHEAD)
        for host in self.others:
            piece = self._piece(i, host)
            if piece.stop > piece.start:
                self._send(i, self._encode(i, host, self._buffer(i, 1, host, piece.stop - piece.start)), host, SCATTER)

    def _share_out(self, i: int) -> None:
        """Adds up a window among the ranks of this host."""
        window, op = self.t[self.windows.window(i)], "sum" if self.op == "avg" else self.op
        if self._in_parts(i):
            self.local.reduce_scatter(window, self.parts[i % SLOTS], op)
        elif self.local is not None:
            self.local.all_reduce(window, op)

    def _encode(self, i: int, host: int, wire: Tensor) -> Tensor:
        x = self._elements(i, host)
        left = None if self.residual is None else self.residual[self._piece(i, host)]
        if self.codec is None:
            return x.view(torch.uint8)
        if self.codec == "bitmap":
            ring_prune_encode(x, left, self.density, wire)
        else:
            ring_encode(x, left, self.codec, wire)
        return wire

    def _reduce(self, i: int) -> None:
        """Adds up the own piece: the own values first, then the other hosts' in order."""
        own = self._piece(i, self.place.host)
        n = own.stop - own.start
        if n == 0:
            return
        x = self._elements(i, self.place.host)
        if self.codec is None:
            self._reduce_plain(i, x)
        else:
            for host in sorted(self.others):
                self.pending.pop((i, SCATTER, host))()
                ring_decode(self._buffer(i, 0, host, n), self.codec, x, add=True)
        wire = self._encode(i, self.place.host, self._buffer(i, 3, 0, n))
        for host in self.others:
            self._send(i, wire, host, GATHER)
        if self.codec is not None:
            self._decode(wire, x)

    def _reduce_plain(self, i: int, x: Tensor) -> None:
        total = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        for host in sorted(self.others):
            self.pending.pop((i, SCATTER, host))()
            theirs = self._buffer(i, 0, host, x.numel()).view(x.dtype)
            if self.op in ("max", "min"):
                (torch.maximum if self.op == "max" else torch.minimum)(total, theirs.to(total.dtype), out=total)
            else:
                total.add_(theirs)
        if self.op == "avg":
            ranks = len(self.place.column) * self.place.local_size
            total.div_(ranks, rounding_mode=None if x.is_floating_point() else "trunc")
        if total is not x:
            x.copy_(total)

    def _decode(self, wire: Tensor, x: Tensor) -> None:
        factor = 1 / (len(self.place.column) * self.place.local_size) if self.op == "avg" else 1.0
        # What was pruned has left zeros: only a few of the cache's lines are touched again.
        ring_decode(wire, self.codec, x, factor, add=self.codec == "bitmap")

    def _collect(self, i: int) -> None:
        for host in self.others:
            piece = self._piece(i, host)
            if piece.stop == piece.start:
                continue
            self.pending.pop((i, GATHER, host))()
            if self.codec is not None:
                self._decode(self._buffer(i, 2, host, piece.stop - piece.start), self._elements(i, host))
        if self.local is not None:
            self._collect_local(i)

    def _collect_local(self, i: int) -> None:
        """The ranks of this host exchange their parts; of an uneven window by a sum of each one's part and zeros."""
        window, place = self.windows.window(i), self.place
        if self._in_parts(i):
            self.local.all_gather(self.parts[i % SLOTS], self.t[window])
            return
        begin = self.windows.piece(i, place.local_rank, 0).start
        end = self.windows.piece(i, place.local_rank, len(place.column) - 1).stop
        self.t[window.start : begin].zero_()
        self.t[end : window.stop].zero_()
        self.local.all_reduce(self.t[window], "sum")

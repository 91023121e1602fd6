"""What ranks that don't share a host compare before each operation: every rank tells all others what it calls."""

import dataclasses
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.distributed._shared_memory import DTYPES, KINDS, OPS, PeerError
from engine.ops.ring_codec import CODECS

WIRE = struct.Struct("<qqiiiidB")  # operation's number, numel, kind, dtype, op, codec, density, HERE
HERE = 1  # comes last: memory that was zero shows by it that all has arrived
TAG = 0

Transfer = Callable[[Tensor, int, int], Callable[[], None]]  # begins to send or receive tensor, rank, tag: what waits


@dataclasses.dataclass(frozen=True)
class Call:
    """An operation as its caller asked for it."""

    kind: str
    numel: int
    dtype: torch.dtype
    op: str = "sum"
    codec: str | None = None
    density: float = 0.0

    def pack(self, number: int) -> bytes:
        """As it goes over the wire, with the operation's number."""
        codec = CODECS.index(self.codec) if self.codec else -1
        kind, dtype, op = KINDS.index(self.kind), DTYPES.index(self.dtype), OPS.index(self.op)
        return WIRE.pack(number, self.numel, kind, dtype, op, codec, self.density, HERE)

    @classmethod
    def unpack(cls, wire: bytes) -> tuple[int, "Call"]:
        """The inverse of `pack`."""
        number, numel, kind, dtype, op, codec, density, _ = WIRE.unpack(wire)
        name = CODECS[codec] if codec >= 0 else None
        return number, cls(KINDS[kind], numel, DTYPES[dtype], OPS[op], name, density)

    def __str__(self) -> str:
        """For an error's message."""
        words = f"{self.numel} {str(self.dtype).removeprefix('torch.')}"
        if self.kind != "all_gather":
            words = f"{self.op} of {words}"
        if self.codec is not None:
            words += f" by {self.codec}" + (f" with density {self.density}" if self.codec == "bitmap" else "")
        return f"{self.kind} ({words})"


class Announcement:
    """One operation's call, sent to all other ranks, and theirs on their way here. Making it waits for nobody."""

    def __init__(self, number: int, call: Call, others: Sequence[int], send: Transfer, receive: Transfer) -> None:
        self.number, self.call, self._others = number, call, others
        self._theirs = torch.zeros(len(others), WIRE.size, dtype=torch.uint8)
        self._own = torch.frombuffer(bytearray(call.pack(number)), dtype=torch.uint8)
        self._waits: list[Callable[[], None]] = []
        self._error: Exception | None = None
        try:
            self._waits += [receive(self._theirs[row], rank, TAG) for row, rank in enumerate(others)]
            self._waits += [send(self._own, rank, TAG) for rank in others]
        except Exception as error:  # raised by `compare`, when it is this operation's turn
            self._error = error

    @property
    def is_sent(self) -> bool:
        """Whether the others are told of it."""
        return len(self._others) > 0

    def has_arrived(self) -> bool:
        """Whether all others have called something, so that `compare` needn't wait. gloo can't be asked: it is seen."""
        return bool((self._theirs[:, -1] == HERE).all())

    def compare(self, rank: int, names: Sequence[str]) -> None:
        """Every rank compares itself with all others before any data goes out: all find a difference, or none."""
        if self._error is not None:
            raise self._error
        for wait in self._waits:
            wait()
        for row, other in enumerate(self._others):
            number, call = Call.unpack(self._theirs[row].numpy().tobytes())
            if (number, call) != (self.number, self.call):
                raise PeerError(f"operation {self.number}: {names[other]} called {call}, rank {rank} {self.call}")

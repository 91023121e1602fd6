"""all_reduce: through shared memory where all ranks of a group are on one host, else between hosts through gloo."""

import logging
import threading
import weakref

import torch
import torch.distributed as dist

from engine.distributed._network import Network
from engine.distributed._shared_memory import DTYPES, OPS, Communicator, PeerError, connect
from engine.ops.ring_codec import CODECS

__all__ = ["PeerError", "all_reduce", "bytes_sent"]

logger = logging.getLogger("engine.distributed")

# By group. A destroyed group takes its communicator with it.
_communicators: "weakref.WeakKeyDictionary[dist.ProcessGroup, Communicator | Network]" = weakref.WeakKeyDictionary()
_connecting = threading.Lock()


def all_reduce(
    t: torch.Tensor,
    op: str = "sum",
    group: dist.ProcessGroup | None = None,
    codec: str | None = None,
    *,
    residual: torch.Tensor | None = None,
    density: float = 0.01,
) -> None:
    """Reduces `t` over all ranks of `group`, in place; afterwards every rank holds the same bits.

    Where all ranks are processes of one host, the elements go through shared memory and are reduced in rank order:
    the result is the same from run to run too. float16 and bfloat16 are added up in float32 and rounded once. Between
    hosts each rank adds up one part of the tensor in a fixed order and passes it on, through gloo connections; where
    every host has as many ranks, more than one, they add up inside the host first. A tensor that is not on the CPU
    goes through `torch.distributed.all_reduce`.

    A `codec` says what is sent between hosts in place of the elements; inside a host they are exact, and nothing is
    encoded where there is no other. It rounds twice, what a rank sends and the sum, whatever the number of ranks:

    - "bf16": 2 bytes an element.
    - "int8": blocks of 256 with a float32 scale, 1.016 bytes an element. A block that holds a NaN or an infinity
      becomes NaN on every rank.
    - "bitmap": only about a fraction `density` of the largest magnitudes, as a bitmask and bfloat16 values, 0.125 +
      2.5 * density bytes an element at most. Meant for gradients, with a `residual`. A NaN or an infinity makes NaN of
      the up to 524,288 elements that are sent with it.

    Every rank must call it in the same order with the same number of elements, dtype, op and codec; where they differ,
    every rank raises. After an error the group refuses further calls with the first error's text.

    Args:
        t: any shape, contiguous or not; float32, float64, float16, bfloat16, int32 or int64; with a codec float32,
            float16 or bfloat16, on the CPU.
        op: "sum", "avg", "max" or "min", with a codec "sum" or "avg". The average of integers is rounded towards zero.
        group: the process group, the default one where it is None.
        codec: None, "bf16", "int8" or "bitmap".
        residual: error feedback, float32 of as many elements as `t`, contiguous, zero at first and kept by the caller
            from call to call: what could not be sent is added to the next call's `t`. What the owner of a part loses
            when it encodes the sum stays in the owner's residual. Changed in place.
        density: for "bitmap", in (0, 1].

    Raises:
        PeerError: another rank died, did not answer within the group's timeout, or called something else.
        TypeError: another dtype, or a codec for what is not on the CPU.
        ValueError: another op, codec or density, a residual without a codec or of another size, or this process is not
            in `group`.
    """
    group = _check_arguments(t, op, group, codec, residual, density)
    communicator = _communicator(group) if t.device.type == "cpu" else None
    if communicator is None:
        _by_torch(t, op, group)
    elif group.size() == 1:
        _take_residual(t, residual)
    elif isinstance(communicator, Network):
        narrow = codec is not None and t.dtype != torch.float32
        flat = t.detach().float() if narrow else t.detach()
        flat = flat.contiguous().view(-1)
        communicator.all_reduce(flat, op, codec, None if residual is None else residual.view(-1), density)
        if flat.data_ptr() != t.data_ptr():
            t.detach().copy_(flat.view(t.shape))
    else:
        _take_residual(t, residual)
        packed = t.detach().contiguous()
        communicator.all_reduce(packed, op)
        if packed.data_ptr() != t.data_ptr():
            t.detach().copy_(packed)


def bytes_sent(group: dist.ProcessGroup | None = None) -> int:
    """How many bytes of tensors this rank has sent through the network for `group`; none while all is in one host."""
    communicator = _communicators.get(dist.group.WORLD if group is None else group)
    return communicator.bytes_sent if isinstance(communicator, Network) else 0


def _check_arguments(
    t: torch.Tensor,
    op: str,
    group: dist.ProcessGroup | None,
    codec: str | None,
    residual: torch.Tensor | None,
    density: float,
) -> dist.ProcessGroup:
    if op not in OPS:
        raise ValueError(f"all_reduce: op: expected one of {', '.join(OPS)}, got {op!r}")
    _check_dtype(t, DTYPES if codec is None else (torch.float32, torch.float16, torch.bfloat16))
    if t.layout != torch.strided:
        raise TypeError(f"all_reduce: t: expected a dense tensor, got {t.layout}")
    if codec is not None:
        if codec not in CODECS:
            raise ValueError(f"all_reduce: codec: expected None or one of {', '.join(CODECS)}, got {codec!r}")
        if op not in ("sum", "avg"):
            raise ValueError(f"all_reduce: op: expected sum or avg with a codec, got {op!r}")
        if t.device.type != "cpu":
            raise TypeError(f"all_reduce: t: expected a tensor on the CPU with a codec, got one on {t.device}")
        if not 0 < density <= 1:
            raise ValueError(f"all_reduce: density: expected a number in (0, 1], got {density}")
    if residual is not None:
        if codec is None:
            raise ValueError("all_reduce: residual: there is none without a codec")
        fits = residual.dtype == torch.float32 and residual.numel() == t.numel() and residual.is_contiguous()
        if not fits or residual.device != t.device:
            raise ValueError(f"all_reduce: residual: expected {t.numel()} contiguous float32 elements on {t.device}")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError("all_reduce: group: no process group, or this process is not in it")
    return group


def _check_dtype(t: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if t.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"all_reduce: t: expected one of {names}, got {str(t.dtype).removeprefix('torch.')}")


def _take_residual(t: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Where nothing is encoded, what was left over before is due at once."""
    if residual is not None:
        t.detach().add_(residual.view(t.shape).to(t.dtype))
        residual.zero_()


def _communicator(group: dist.ProcessGroup) -> Communicator | Network:
    try:
        return _communicators[group]
    except KeyError:
        pass
    with _connecting:
        if group not in _communicators:
            shared, reason = connect(group)
            if shared is not None:
                _communicators[group] = shared
            else:
                network = _communicators[group] = Network(group)
                level = logging.INFO if network.hosts > 1 else logging.WARNING
                logger.log(level, "all_reduce goes through gloo: %s", reason)
        return _communicators[group]


def _by_torch(t: torch.Tensor, op: str, group: dist.ProcessGroup) -> None:
    reduce_op = {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}.get(op, dist.ReduceOp.SUM)
    packed = t.detach().contiguous()  # the same memory where it is contiguous already
    dist.all_reduce(packed, reduce_op, group=group)
    if op == "avg":  # gloo has no average of its own
        packed.div_(group.size(), rounding_mode=None if t.is_floating_point() else "trunc")
    if packed.data_ptr() != t.data_ptr():
        t.detach().copy_(packed)

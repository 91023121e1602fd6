"""all_reduce: through shared memory where all ranks of a group are on one host, else between hosts through gloo."""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import profiler

from engine.distributed._member import Member, member_of, reduce_by_torch
from engine.distributed._network import plain
from engine.distributed._shared_memory import DTYPES, OPS, PeerError
from engine.distributed._work import Work
from engine.ops.ring_codec import CODECS

__all__ = ["PeerError", "all_reduce", "bytes_sent"]


def all_reduce(
    t: torch.Tensor,
    op: str | dist.ReduceOp.RedOpType = "sum",
    group: dist.ProcessGroup | None = None,
    codec: str | None = None,
    async_op: bool = False,
    *,
    residual: torch.Tensor | None = None,
    density: float = 0.01,
) -> Work | None:
    """Reduces `t` over all ranks of `group`, in place; afterwards every rank holds the same bits.

    Where all ranks are processes of one host, the elements go through shared memory and are reduced in rank order:
    the result is the same from run to run too. float16 and bfloat16 are added up in float32 and rounded once. Where
    `torch.distributed.all_reduce` gives the same numbers (integers but for their average, and sums and averages of
    float32 or float64 over two ranks), the first call of a size class measures it too, and the faster way is taken.
    Between hosts, through gloo, each rank adds up one part of the tensor in a fixed order and passes it on; where
    every host has as many ranks, more than one, they add up inside the host first (float16 and bfloat16 are rounded
    there too). A line of the log (`engine.distributed`) says why ranks don't share memory.

    A `codec` says what is sent between hosts in place of the elements. Where all ranks are on one, nothing is encoded
    (it would take longer, and round): the result is that without a codec, and a residual is added and becomes zero.
    Between hosts a codec rounds twice, what a rank sends and the sum, whatever the number of ranks; what a rank adds to
    its own part is exact:

    - "bf16": 2 bytes an element.
    - "int8": blocks of 256 with a float32 scale, 1.016 bytes an element. A block that holds a NaN or an infinity
      becomes NaN on every rank.
    - "bitmap": only about a fraction `density` of the largest magnitudes, as bitmasks and bfloat16 values: at most
      0.016 + 3.75 * density bytes an element, and some hundred. Meant for gradients, with a `residual`. A NaN or an
      infinity makes NaN of the elements that are sent with it, 2 Mi at most.

    Every rank must call it in the same order with the same number of elements, dtype, op and codec; where they differ,
    every rank raises. After an error the group refuses further calls with the first error's text. Under `torch.compile`
    it becomes the op `engine::all_reduce`.

    Args:
        t: any shape, contiguous or not; float32, float64, float16, bfloat16, int32 or int64; with a codec float32,
            float16 or bfloat16.
        op: "sum", "avg", "max" or "min", or c10d's ReduceOp of that name; with a codec "sum" or "avg". The average of
            integers is rounded towards zero.
        group: the process group, the default one where it is None.
        codec: None, "bf16", "int8" or "bitmap".
        async_op: returns at once; the operation runs in a thread of the group, in the order of the calls.
        residual: error feedback, float32 of as many elements as `t`, contiguous, zero at first and kept by the caller
            from call to call: what could not be sent is added to the next call's `t`. What the owner of a part loses
            when it encodes the sum stays in the owner's residual. Changed in place.
        density: for "bitmap", in (0, 1].

    Returns:
        None, or with `async_op` a :class:`Work`.

    Raises:
        PeerError: another rank died, did not answer within the group's timeout, or called something else. With
            `async_op` it is `Work.wait` that raises it.
        RuntimeError: this process was forked from the one that made `group`.
        TypeError: another dtype, or a codec for what is not on the CPU.
        ValueError: another op, codec or density, a residual without a codec or of another size, elements of `t` that
            share memory (as `expand` makes them), or this process is not in `group`.
    """
    word = op_name(op)
    group = _check_arguments(t, word, group, codec, residual, density)
    check_writable(t)
    if torch.compiler.is_compiling():
        if async_op or residual is not None:
            raise ValueError("all_reduce: async_op and residual: expected none under torch.compile")
        reduced = torch.ops.engine.all_reduce(t.detach(), word, group.group_name, codec, density)
        t.detach().copy_(reduced)
        return None
    return begin(t, word, group, codec, async_op, residual, density)


def begin(
    t: torch.Tensor,
    op: str,
    group: dist.ProcessGroup,
    codec: str | None = None,
    async_op: bool = False,
    residual: torch.Tensor | None = None,
    density: float = 0.01,
    watched: bool = False,
) -> Work | None:
    """The same, of arguments that have been checked; torch.profiler sees it from here until it is done."""
    if profiler._is_profiler_enabled and not watched:
        with profiler.record_function("engine:all_reduce") as span:
            work = begin(t, op, group, codec, async_op, residual, density, watched=True)
            if work is not None:
                span._call_end_callbacks_on_future(work.get_future())
        return work
    if t.device.type != "cpu":
        return _by_torch(t, op, group, async_op)
    member = member_of(group)
    if member.network is not None:
        return _by_network(t, op, member, codec, async_op, residual, density)
    if group.size() == 1 or member.communicator is None:
        member.worker.drain()
        _take_residual(t, residual)
        return _by_torch(t, op, group, async_op)
    how = (op, group, member, codec, residual, density)
    if async_op and (codec is not None or member.goes_through_memory(t, op, group.size())):
        return member.worker.submit(lambda: _through_memory(t, *how))
    # Asynchronous or not: torch.distributed may be called, and that in the caller's thread, in the order of its calls.
    member.worker.drain()
    if not async_op:
        _through_memory(t, *how)
        return None
    try:
        _through_memory(t, *how)
    except PeerError as caught:
        return member.worker.submit(_raise(caught))
    return member.worker.submit(lambda: t)


def _raise(error: Exception) -> Any:
    def function() -> torch.Tensor:
        raise error

    return function


def _through_memory(
    t: torch.Tensor,
    op: str,
    group: dist.ProcessGroup,
    member: Member,
    codec: str | None,
    residual: torch.Tensor | None,
    density: float,
) -> torch.Tensor:
    communicator = member.communicator
    assert communicator is not None
    flat = plain(t)
    if codec is not None:
        if residual is not None:
            flat = flat.float().add_(residual.view(flat.shape))
        communicator.all_reduce(flat, op, codec, density)
        if residual is not None:
            residual.zero_()
    elif member.goes_through_memory(flat, op, group.size()):
        communicator.all_reduce(flat, op)
    else:
        communicator.compare("all_reduce", flat, op)
        if member.shared_memory_is_faster(communicator, group, flat):
            communicator.all_reduce(flat, op, compared=True)
        else:
            reduce_by_torch(flat, op, group, communicator)
    if flat.data_ptr() != t.data_ptr():
        t.detach().copy_(flat)
    return t


def _by_network(
    t: torch.Tensor,
    op: str,
    member: Member,
    codec: str | None,
    async_op: bool,
    residual: torch.Tensor | None,
    density: float,
) -> Work | None:
    network = member.network
    assert network is not None
    collective = network.all_reduce(t, op, codec, residual, density)
    if async_op:
        return network.submit(collective, member.worker)
    network.run(collective)
    return None


def bytes_sent(group: dist.ProcessGroup | None = None) -> int:
    """How many bytes of tensors this rank has sent to other hosts for `group`; none while all ranks are on one."""
    network = member_of(check_group("bytes_sent", group)).network
    return 0 if network is None else network.bytes_sent


def _by_torch(t: torch.Tensor, op: str, group: dist.ProcessGroup, async_op: bool) -> Work | None:
    flat = plain(t)
    if group.size() > 1:
        reduce_by_torch(flat, op, group, None)
    if flat.data_ptr() != t.data_ptr():
        t.detach().copy_(flat)
    return member_of(group).worker.submit(lambda: t) if async_op else None


def _take_residual(t: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Where nothing is encoded, what was left over before is due at once."""
    if residual is not None:
        t.detach().add_(residual.view(t.shape).to(t.dtype))
        residual.zero_()


def _check_arguments(
    t: torch.Tensor,
    op: str,
    group: dist.ProcessGroup | None,
    codec: str | None,
    residual: torch.Tensor | None,
    density: float,
) -> dist.ProcessGroup:
    check_tensor("all_reduce", t, op, DTYPES if codec is None else (torch.float32, torch.float16, torch.bfloat16))
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
    return check_group("all_reduce", group)


def op_name(op: Any) -> Any:
    """The word for an op of c10d's; whatever else is given, as it is."""
    for word in OPS:
        if not isinstance(op, str) and op == getattr(dist.ReduceOp, word.upper()):
            return word
    return op


def check_tensor(name: str, t: torch.Tensor, op: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """What every collective asks of its tensor and its op."""
    if op not in OPS:
        raise ValueError(f"{name}: op: expected one of {', '.join(OPS)}, got {op!r}")
    if t.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: t: expected one of {names}, got {str(t.dtype).removeprefix('torch.')}")
    if t.layout != torch.strided:
        raise TypeError(f"{name}: t: expected a dense tensor, got {t.layout}")


def check_writable(t: torch.Tensor) -> None:
    """Of a tensor that is reduced in place; to learn of it when the result is written would be too late."""
    if t.is_contiguous() or 0 not in t.stride():
        return
    shape, strides = list(t.shape), list(t.stride())
    if any(size > 1 and stride == 0 for size, stride in zip(shape, strides, strict=True)):
        raise ValueError(
            f"all_reduce: t: expected elements that each have memory of their own, got {shape} with strides {strides}"
        )


def check_group(name: str, group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group that is meant."""
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{name}: group: no process group, or this process is not in it")
    return group

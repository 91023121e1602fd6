"""One rank of a test: `python worker.py NAMES RANK WORLD_SIZE STORE BACKEND` runs the functions NAMES below in turn.

It prints "passed NAME" after each, and ends with the first that fails.
"""

import atexit
import contextlib
import itertools
import logging
import os
import random
import resource
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from engine.distributed import (
    PeerError,
    _all_reduce,
    _member,
    _shared_memory,
    all_gather,
    all_reduce,
    functional,
    reduce_scatter,
)
from engine.distributed._shared_memory import DTYPES, OPS

rank, world_size = int(sys.argv[2]), int(sys.argv[3])
RANKS = range(world_size)
TIMEOUT = 2.0


def data(of, numel, dtype, seed):
    generator = torch.Generator().manual_seed(1000 * seed + of)
    if dtype.is_floating_point:
        return torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(-1000, 1000, (numel,), generator=generator).to(dtype)


def truth(numel, dtype, op, seed):
    stacked = torch.stack([data(of, numel, dtype, seed).double() for of in RANKS])
    if op in ("max", "min"):
        return getattr(stacked, f"a{op}")(0)
    total = stacked.sum(0)
    if op == "avg":
        total = total / world_size if dtype.is_floating_point else (total / world_size).trunc()
    return total


def same_on_every_rank(t):
    raw = t.contiguous().view(torch.uint8)
    others = [torch.empty_like(raw) for _ in range(world_size)]
    dist.all_gather(others, raw)
    return all(torch.equal(raw, other) for other in others)


def uses_shared_memory(group=None):
    return _member._members[group or dist.group.WORLD].communicator is not None


def ops_of_c10d():
    for op in OPS:
        t, same = data(rank, 1000, torch.float32, 3), data(rank, 1000, torch.float32, 3)
        all_reduce(t, op)
        all_reduce(same, getattr(dist.ReduceOp, op.upper()))
        assert torch.equal(t, same)
    half = reduce_scatter(data(rank, world_size, torch.float32, 3), dist.ReduceOp.MAX)
    assert torch.equal(half, truth(world_size, torch.float32, "max", 3)[rank : rank + 1].float())
    try:
        all_reduce(torch.ones(1, dtype=torch.int32), dist.ReduceOp.BAND)
    except ValueError as error:
        assert "op: expected one of sum, avg, max, min" in str(error)
    else:
        raise AssertionError("no error")


def values():
    sizes = [0, 1, 3, 1000, 4097, 32768, 100003]
    for seed, (dtype, op, numel) in enumerate(itertools.product(DTYPES, OPS, sizes)):
        t, again = data(rank, numel, dtype, seed), data(rank, numel, dtype, seed)
        expected = truth(numel, dtype, op, seed)
        all_reduce(t, op)
        all_reduce(again, op)
        assert torch.equal(t, again), "other bits in a second run"
        if numel in (3, 100003):
            assert same_on_every_rank(t)
        if op in ("max", "min") or not dtype.is_floating_point:
            assert torch.equal(t.double(), expected), (dtype, op, numel)
        else:
            # Rounded once to dtype, or world_size times in the accumulator: world_size units of the larger terms.
            eps = torch.finfo(dtype).eps
            bound = eps * (expected.abs() + world_size * (8 if eps < 1e-4 else 1e-3))
            assert ((t.double() - expected).abs() <= bound).all(), (dtype, op, numel)
    assert uses_shared_memory()


def shapes():
    flat = data(rank, 600, torch.float32, 1)
    expected = truth(600, torch.float32, "sum", 1)
    for t, want in [
        (flat.clone().view(2, 300).t(), expected.view(2, 300).t()),
        (flat.clone()[::3], expected[::3]),
        (flat.clone().view(2, 3, 100)[:, 1], expected.view(2, 3, 100)[:, 1]),
        (flat.clone()[0], expected[0]),
        (flat.clone().requires_grad_(), expected),
    ]:
        all_reduce(t)
        assert torch.allclose(t.detach().double(), want, atol=1e-5)
    inner = flat.clone()
    all_reduce(inner[100:200])
    assert torch.equal(inner[:100], flat[:100]) and torch.equal(inner[200:], flat[200:])
    big = data(rank, 3_000_000, torch.float32, 2)  # more than all slots together hold
    all_reduce(big)
    assert torch.allclose(big.double(), truth(3_000_000, torch.float32, "sum", 2), atol=1e-5)
    assert same_on_every_rank(big)
    nan = torch.full((5000,), float("nan") if rank == world_size - 1 else 1.0)
    for op in OPS:
        t = nan.clone()
        all_reduce(t, op)
        assert t.isnan().all(), op
    pairs = [dist.new_group([0, 1]), dist.new_group([1, 2] if world_size > 2 else [0, 1])]
    for group in pairs * 2:
        if dist.get_rank(group) >= 0:
            t = torch.full((10,), float(rank))
            all_reduce(t, group=group)
            assert t[0] == sum(dist.get_process_group_ranks(group)) and uses_shared_memory(group)


def arguments():
    for call, error in [
        (lambda: all_reduce(torch.ones(3), "product"), ValueError),
        (lambda: all_reduce(torch.ones(3, dtype=torch.bool)), TypeError),
        (lambda: all_reduce(torch.ones(3).to_sparse()), TypeError),
        (lambda: all_reduce(torch.ones(3), group=dist.GroupMember.NON_GROUP_MEMBER), ValueError),
        (lambda: all_reduce(torch.ones(2, 1).expand(2, 3)), ValueError),
    ]:
        try:
            call()
        except error:
            continue
        raise AssertionError("no error")


def refuses_further_use(text, group=None):
    try:
        all_reduce(torch.ones(3), group=group)
    except PeerError as error:
        assert text in str(error), (text, str(error))
    else:
        raise AssertionError("a failed group was used again")


def mismatches():
    """The last rank calls something else, in a new group each time."""
    usual = {"t": torch.ones(20000), "op": "sum"}
    for other in [
        {"t": torch.ones(20001)},
        {"t": torch.ones(2)},
        {"t": torch.ones(20000, dtype=torch.int32)},
        {"op": "max"},
        {"codec": "int8"},
        {"codec": "bitmap", "density": 0.5},
        {"kind": all_gather},
        {"kind": reduce_scatter},
        {"async_op": True, "op": "min"},
    ]:
        group = dist.new_group()
        all_reduce(torch.ones(10), group=group)
        call = {**usual, **(other if rank == world_size - 1 else {})}
        if "density" in other and rank < world_size - 1:
            call["codec"] = "bitmap"
        kind = call.pop("kind", all_reduce)
        if kind is not all_reduce:
            call["t"] = torch.ones(20000 * (world_size if kind is reduce_scatter else 1))
        if kind is all_gather:
            del call["op"]
        start = time.monotonic()
        try:
            work = kind(**call, group=group)
            if call.get("async_op"):
                work.wait()
        except PeerError as error:
            text = str(error)
        else:
            raise AssertionError("no error")
        assert time.monotonic() - start < 1.5
        assert "operation 2" in text and "called" in text and "rank " in text, text
        refuses_further_use(text.partition(": ")[2], group)


def lost(how, numel):
    """The last rank is killed or stopped."""
    t = torch.ones(numel)
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    all_reduce(t, group=group)
    if rank == world_size - 1:
        os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])
    start = time.monotonic()
    try:
        all_reduce(t, group=group)
    except PeerError as error:
        text, seconds = str(error), time.monotonic() - start
    else:
        raise AssertionError("no error")
    assert f"rank {world_size - 1} on {os.uname().nodename}" in text and "operation 2" in text, text
    # The rank needs a moment to die; a stopped one is waited for as long as the group's timeout says.
    assert seconds < 1 if how == "killed" else TIMEOUT <= seconds < TIMEOUT + 0.5, seconds
    refuses_further_use(text.removeprefix("all_reduce: "), group)


def lost_in_backward():
    """The last rank dies where DDP averages gradients by the backend itself: C++ takes the future's result."""
    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    ddp(torch.ones(2, 64)).sum().backward()
    loss = ddp(torch.ones(2, 64)).sum()
    if rank == world_size - 1:
        os._exit(0)
    try:
        loss.backward()
    except RuntimeError as error:
        assert f"PeerError: all_reduce: rank {world_size - 1}" in str(error), error
    else:
        raise AssertionError("no error")


def slow():
    """The last rank comes after eleven seconds: a line of the log says so to the others, and nobody fails."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("engine.distributed").addHandler(handler)
    t = torch.ones(10)
    all_reduce(t)
    if rank == world_size - 1:
        time.sleep(11)
    all_reduce(t)
    texts = [record.getMessage() for record in records if record.levelno == logging.WARNING]
    if rank != world_size - 1:
        assert len(texts) == 1 and f"operation 2 has waited 10 s for rank {world_size - 1}" in texts[0], texts


class Limited:
    """Stands in for the native module: its constructor runs under a resource limit."""

    def __init__(self, native, limit, value):
        self.native, self.limit, self.value = native, limit, value

    def __getattr__(self, name):
        return getattr(self.native, name)

    def SharedMemory(self, *arguments):
        soft, hard = resource.getrlimit(self.limit)
        resource.setrlimit(self.limit, (self.value, hard))
        try:
            return self.native.SharedMemory(*arguments)
        finally:
            resource.setrlimit(self.limit, (soft, hard))


def refused_memory():
    """One rank gets no descriptor, no room or no mapping: all fall back, and no one dies of SIGBUS."""
    import_module = _shared_memory.importlib.import_module
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for limit, value in [
        (resource.RLIMIT_NOFILE, 3),  # memfd_create fails
        (resource.RLIMIT_FSIZE, 1 << 16),  # posix_fallocate
        (resource.RLIMIT_AS, mapped + (1 << 20)),  # mmap
    ]:
        if rank == 0:
            _shared_memory.importlib.import_module = lambda name, how=(limit, value): Limited(import_module(name), *how)
        group = dist.new_group()
        for op, dtype in itertools.product(OPS, (torch.float32, torch.int64)):
            t = data(rank, 1000, dtype, 3).view(10, 100).t()
            all_reduce(t, op, group)
            assert torch.allclose(t.double(), truth(1000, dtype, op, 3).view(10, 100).t(), atol=1e-5)
        t = data(rank, 40 * world_size, torch.float32, 4)
        want = truth(40 * world_size, torch.float32, "avg", 4).float()
        assert torch.allclose(reduce_scatter(t, "avg", group), want[40 * rank : 40 * (rank + 1)], atol=1e-6)
        assert torch.equal(all_gather(torch.tensor(rank), group), torch.arange(world_size))
        left = torch.full_like(t, 0.5)
        all_reduce(t, "sum", group, "int8", residual=left)  # with its codec all the same, through gloo
        dist.all_reduce(left, group=group)
        want = truth(t.numel(), torch.float32, "sum", 4).float() + 0.5 * world_size
        assert torch.allclose(t + left, want, atol=1e-4) and left.any()
        work = all_reduce(t, "max", group, async_op=True)
        assert work.wait() and work.result()[0] is t
        assert not uses_shared_memory(group)
        _shared_memory.importlib.import_module = import_module


def held():
    maps = Path("/proc/self/maps").read_text().count("engine-all-reduce")
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), maps


def assert_nothing_left(before):
    """As much as before is held. A thread that was joined stays in /proc until the kernel has ended it too."""
    deadline = time.monotonic() + 2
    while held() != before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert held() == before, (before, held())
    assert not [name for name in os.listdir("/dev/shm") if "engine" in name]


def leaks():
    group = dist.new_group()  # gloo's own sockets and threads come and go with a group: only ours count
    t = torch.ones(10)
    before = held()
    for _ in range(20):
        all_reduce(t, "max", group)
        assert held()[0] == before[0] + world_size - 1  # one descriptor a peer, to see it die
        all_reduce(t, "max", group, async_op=True).wait()
        dist.barrier(group)
        del _member._members[group]
    assert_nothing_left(before)


def groups_again():
    """A group of the same name is made again, in the same store."""
    for round in range(3):
        group = c10d._new_group_with_tag(list(RANKS), backend="gloo", group_desc="again")
        store = c10d._get_process_group_store(group)
        t = torch.full((5,), float(rank + round))
        all_reduce(t, group=group)
        assert t[0] == sum(of + round for of in RANKS)
        dist.barrier(group)
        _member._members[group].close("done")
        _member._members[group].communicator, reason = _shared_memory.connect_ranks(
            dist.PrefixStore("engine.all_reduce", store), rank, world_size, TIMEOUT
        )
        assert not reason
        t = torch.full((5,), float(rank))
        all_reduce(t, group=group)
        assert t[0] == sum(RANKS)
        dist.destroy_process_group(group)


def on_one_core():
    """Ranks that share a core may move to others; where they are allowed to run stays as it was."""
    allowed = os.sched_getaffinity(0)
    for _ in range(20):
        os.sched_setaffinity(0, {min(allowed)})
        os.sched_setaffinity(0, allowed)
        for n in (10, 100_000):
            t = torch.full((n,), float(rank))
            all_reduce(t)
            assert t.eq(sum(RANKS)).all()
        time.sleep(0.002)
    assert os.sched_getaffinity(0) == allowed


def scatter_and_gather():
    for seed, (dtype, op, n) in enumerate(itertools.product(DTYPES, OPS, [0, 1, 777, 50001])):
        t = data(rank, world_size * n, dtype, seed).view(world_size * n, 1)
        whole = t.clone()
        all_reduce(whole, op)
        part = reduce_scatter(t, op)
        assert torch.equal(part, whole[rank * n : (rank + 1) * n]), (dtype, op, n)
        assert torch.equal(all_gather(part), whole)
    t = data(rank, 12 * world_size, torch.float32, 1)
    turned = t.view(4, 3 * world_size).t()
    part = reduce_scatter(turned)
    assert part.shape == (3, 4) and part.is_contiguous()
    whole = turned.contiguous()
    all_reduce(whole)
    assert torch.equal(part, whole[3 * rank : 3 * rank + 3])
    assert torch.equal(all_gather(torch.tensor(float(rank))), torch.arange(float(world_size)))
    works = [all_gather(part.t(), async_op=True), reduce_scatter(t, async_op=True)]
    assert torch.equal(works[0].result()[0], all_gather(part.t()))
    assert torch.equal(works[1].result()[0], reduce_scatter(t))


def unusual():
    """Tensors as views leave them, tensors without elements, and averages whose sums need more bits than they have."""
    for dtype in DTYPES:
        t = torch.full((4, 4), rank + 1).to(dtype)[:1, ::2][:, :1]  # a single element, with strides of more
        all_reduce(t)
        assert t.item() == sum(of + 1 for of in RANKS), dtype

    def negated():  # what `.imag` of a conjugate is
        return torch._neg_view(torch.full((world_size,), rank + 1.0))

    for how in ({"op": "max"}, {"op": "sum", "codec": "bf16"}):
        t, want = negated(), -1.0 if how["op"] == "max" else -sum(of + 1.0 for of in RANKS)
        all_reduce(t, **how)
        assert t.tolist() == [want] * world_size, (how, t)
    assert reduce_scatter(negated(), "max", async_op=True).result()[0].tolist() == [-1]
    assert all_gather(negated()[:1], async_op=True).result()[0].tolist() == [-1.0 - of for of in RANKS]
    assert all_gather(torch.zeros(2, 0)).shape == (2 * world_size, 0)
    assert reduce_scatter(torch.zeros(world_size, 0)).shape == (1, 0)
    for dtype, value in [(torch.int32, 2_000_000_000), (torch.int32, -3), (torch.int64, 2**62)]:
        t = torch.full((2 * world_size,), value, dtype=dtype) + rank
        total = sum(torch.full((2,), value) + of for of in RANKS)  # of int64 it wraps around
        want = total.div(world_size, rounding_mode="trunc").to(dtype)
        assert torch.equal(reduce_scatter(t, "avg"), want), (dtype, value)
        all_reduce(t, "avg")
        assert torch.equal(t, want.repeat(world_size)), (dtype, value)


def forked():
    """A child is refused, which would be taken for its parent, and leaves the group as it was."""
    t = torch.full((3,), rank + 1.0)
    all_reduce(t.clone())
    all_reduce(t.clone(), "max", async_op=True).wait()
    for _ in range(3):  # CPython 3.11's fork may never return in the child where another thread just began or ended
        child = os.fork()
        if child == 0:
            try:
                all_reduce(torch.full((3,), 100.0))
            except RuntimeError as error:
                if f"belongs to process {os.getppid()}" in str(error):
                    _member._close_all()  # as at its exit, which gloo itself does not survive
                    os._exit(0)
            os._exit(1)
        stuck = threading.Timer(15, os.kill, (child, signal.SIGKILL))
        stuck.start()
        status = os.waitpid(child, 0)[1]
        stuck.cancel()
        if status != signal.SIGKILL:
            break
    assert status == 0
    all_reduce(t)
    assert t.tolist() == [sum(of + 1 for of in RANKS)] * 3


def codecs():
    """Inside one host nothing is encoded: the bits without a codec. What was left over before is added, in float32."""
    communicator = _member.member_of(dist.group.WORLD).communicator
    for codec, op in [("bf16", "avg"), ("int8", "sum"), ("bitmap", "sum")]:
        for n in [0, 1, 255, 65537, 300001]:
            t, plain = data(rank, n, torch.float32, 7), data(rank, n, torch.float32, 7)
            all_reduce(t, op, codec=codec)
            communicator.all_reduce(plain, op)
            assert torch.equal(t, plain) and same_on_every_rank(t)
        for dtype in (torch.float32, torch.bfloat16):
            t, left = data(rank, 5000, dtype, 8).view(50, 100).t(), data(rank, 5000, torch.float32, 9)
            wide = (t.float().flatten() + left).view(100, 50)
            communicator.all_reduce(wide, op)
            all_reduce(t, op, codec=codec, residual=left)
            assert torch.equal(t, wide.to(dtype)) and not left.any()
        t, left = data(rank, 70000, torch.float32, 9), torch.zeros(70000)
        if rank == world_size - 1:
            t[123] = float("nan")
        all_reduce(t, op, codec=codec, residual=left)
        assert t.isnan().nonzero().tolist() == [[123]] and not left.any()


def asynchronous():
    tensors = [data(rank, 1000 * i + 1, torch.float32, i) for i in range(30)]
    wanted = [t.clone() for t in tensors]
    works = [all_reduce(t, async_op=True) for t in tensors]
    for t in wanted[:2]:
        all_reduce(t)  # in order: after those under way
    assert all(work.is_completed() for work in works)
    for t in wanted[2:]:
        all_reduce(t)
    for t, want, work in zip(tensors, wanted, works, strict=True):
        assert work.wait() and torch.equal(t, want) and work.result()[0] is t
    chained = all_reduce(torch.ones(3), async_op=True).get_future().then(lambda done: done.value()[0] + 1)
    assert chained.wait()[0] == world_size + 1
    late = torch.ones(100_000, dtype=torch.int64)
    if rank == 0:
        work = all_reduce(late, async_op=True, codec=None)
        with contextlib.suppress(TimeoutError):
            work.wait(timedelta(seconds=0.01))
        time.sleep(0.1)
    else:
        time.sleep(0.1)
        work = all_reduce(late, async_op=True)
    assert work.wait(5) and work.get_future().wait()[0][0] == world_size


def choice():
    """Where plain dist.all_reduce was faster on the slowest rank, all ranks go that way, and still compare calls.

    Only what has the same bits that way.
    """
    measure, by_torch = _member._measure, []
    _member._measure = lambda *_: [1.0 + rank, 1.5] if rank else [1.0, 0.1]  # only rank 1 finds gloo faster
    reduce_by_torch = _all_reduce.reduce_by_torch
    _all_reduce.reduce_by_torch = lambda t, op, *rest: by_torch.append((t.dtype, op)) or reduce_by_torch(t, op, *rest)
    group = dist.new_group()
    member = _member.member_of(group)
    for async_op in (False, True):
        t = torch.full((2000,), rank + 1, dtype=torch.int32)
        work = all_reduce(t, "sum", group, async_op=async_op)
        assert work is None or work.wait()
        assert t[0] == world_size * (world_size + 1) // 2
    assert by_torch == [(torch.int32, "sum")] * 2 and set(member._faster.values()) == {False}
    for dtype, op in itertools.product(DTYPES, OPS):  # as if nothing had been measured
        t, again = data(rank, 2000, dtype, 1), data(rank, 2000, dtype, 1)
        member._faster[0] = False
        all_reduce(t, op, group)
        member._faster[0] = True
        all_reduce(again, op, group)
        assert torch.equal(t, again), (dtype, op)
    of_two = {(dtype, op) for dtype in (torch.float32, torch.float64) for op in ("sum", "avg")}
    of_integers = {(dtype, op) for dtype in (torch.int32, torch.int64) for op in ("sum", "max", "min")}
    assert set(by_torch) == of_integers | (of_two if world_size == 2 else set())
    member._faster[0] = False
    try:
        all_reduce(torch.ones(2000 + rank, dtype=torch.int64), "sum", group)
    except PeerError as error:
        assert "called" in str(error), error
    else:
        raise AssertionError("no error")
    _member._measure, _all_reduce.reduce_by_torch = measure, reduce_by_torch
    group = dist.new_group()
    all_reduce(torch.ones(2000, dtype=torch.int32), group=group)
    assert _member.member_of(group)._faster.keys() == {0}


def compiled():
    def forward(x):
        y = functional.all_reduce(x * 2, "avg")
        z = all_gather(reduce_scatter(y.view(-1)))
        with torch.no_grad():
            copy = y.detach().clone()
            all_reduce(copy, "max", codec=None)
        return z + copy.view(-1)

    x = data(rank, 6 * world_size, torch.float32, 5).view(world_size, 6)
    results = []
    for function in (forward, torch.compile(forward, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        (y * torch.arange(y.numel())).sum().backward()
        results.append((y.detach(), leaf.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    # y is an average of 2x, z sums it over the ranks: dz/dx = 2 on every rank, of each rank's loss.
    assert torch.allclose(results[0][1].view(-1), 2.0 * world_size * torch.arange(6.0 * world_size))
    name = dist.group.WORLD.group_name
    for arguments in [("all_reduce", "max", name, None, 0.01), ("all_reduce", "sum", name, "int8", 0.01)]:
        y = getattr(torch.ops.engine, arguments[0])(x.clone().requires_grad_(), *arguments[1:])
        try:
            y.sum().backward()
        except RuntimeError as error:
            assert "no gradient" in str(error)
        else:
            raise AssertionError("no error")
    for op, arguments in [
        (torch.ops.engine.all_reduce, ("sum", name, None, 0.01)),
        (torch.ops.engine.reduce_scatter, ("avg", name)),
        (torch.ops.engine.all_gather, (name,)),
    ]:
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op.default, (x.clone(), *arguments), test_utils=utils)


def backend():
    """What `dist` and DDP themselves do in a group of the backend "engine"."""
    assert dist.get_backend() == "engine"
    for op in OPS:
        t = data(rank, 3000, torch.float32, 6)
        work = dist.all_reduce(t, getattr(dist.ReduceOp, op.upper()), async_op=op == "max")
        assert work is None or work.wait()
        assert torch.allclose(t.double(), truth(3000, torch.float32, op, 6), atol=1e-5)
    assert uses_shared_memory()
    number = _member.member_of(dist.group.WORLD).communicator._number
    flag = torch.tensor([rank == 0, True])
    dist.all_reduce(flag, dist.ReduceOp.MIN)  # of booleans, gloo's
    product = torch.tensor([float(rank + 1)])
    dist.all_reduce(product, dist.ReduceOp.PRODUCT)
    dist.barrier()
    objects = [None] * world_size
    dist.all_gather_object(objects, rank)
    assert flag.tolist() == [False, True] and product[0] > rank and objects == list(RANKS)
    dist.broadcast(product, 0)
    received = torch.empty(3)
    if rank == 0:
        dist.send(torch.arange(3.0), 1)
    elif rank == 1:
        dist.recv(received, 0)
        assert received.tolist() == [0, 1, 2]
    every = [torch.empty(2) for _ in RANKS]
    dist.all_gather(every, torch.full((2,), float(rank)))
    part = torch.empty(2)
    dist.reduce_scatter(part, [torch.full((2,), float(of)) for of in RANKS])
    assert [t[0] for t in every] == list(RANKS) and part.tolist() == [rank * world_size] * 2
    assert _member.member_of(dist.group.WORLD).communicator._number == number
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    x = data(rank, 640, torch.float32, 7).view(10, 64)
    parallel(x).square().sum().backward()
    gradient = model.weight.grad.clone()
    model.weight.grad = None
    model(x).square().sum().backward()
    dist.all_reduce(model.weight.grad, dist.ReduceOp.AVG)
    assert torch.allclose(gradient, model.weight.grad, rtol=1e-5)
    assert _member.member_of(dist.group.WORLD).communicator._number > number
    group = dist.new_group()
    t = torch.ones(4)
    dist.all_reduce(t, group=group)
    assert t[0] == world_size and dist.get_backend(group) == "engine"


def overloads():
    """What may be called of a group of the backend "engine" itself, as of gloo's."""
    group, most = dist.group.WORLD, dist.ReduceOp.MAX
    for call, want in [
        (lambda t: group.allreduce(t), sum(of + 1 for of in RANKS)),
        (lambda t: group.allreduce([t]), sum(of + 1 for of in RANKS)),
        (lambda t: group.allreduce(t, most), world_size),
        (lambda t: group.allreduce([t], most, timedelta(seconds=9)), world_size),
        (lambda t: group.allreduce(tensors=[t], op=most, timeout=timedelta(seconds=9)), world_size),
        (lambda t: group.allreduce(tensor=t, op=most), world_size),
    ]:
        t = torch.full((1, 3), rank + 1.0)
        assert call(t).result()[0] is t and t.tolist() == [[want] * 3]
    done = dist.AllreduceOptions()
    done.asyncOp = False
    assert group.allreduce([t], opts=done).result()[0] is t
    for call, error, text in [
        (lambda: group.allreduce([]), RuntimeError, "requires non-empty"),
        (lambda: group.allreduce_coalesced([]), RuntimeError, "requires non-empty"),
        (lambda: dist.all_reduce(torch.ones(1).expand(3)), ValueError, "with strides [0]"),
    ]:
        try:
            call()
        except error as raised:
            assert text in str(raised), raised
        else:
            raise AssertionError("no error")


def barriers():
    """They wait for all-reduces for which nobody waited."""
    group, late = dist.group.WORLD, timedelta(seconds=20)
    member = _member.member_of(group)
    for barrier in [
        dist.barrier,
        lambda: dist.barrier(async_op=True).wait(),
        lambda: group.barrier().wait(),
        lambda: group.barrier(late).wait(),
        lambda: group.barrier(timeout=late).wait(),
    ]:
        t = torch.full((3,), rank)
        if rank == 0:
            member.worker.submit(lambda t=t: time.sleep(0.1) or t)
        dist.all_reduce(t, dist.ReduceOp.MAX, async_op=True)
        barrier()
        assert t.tolist() == [world_size - 1] * 3


def profiled():
    """One event each, which lasts until the operation is done."""
    t = torch.ones(3)
    all_reduce(t)
    with torch.profiler.profile() as profile:
        all_reduce(t, "max")
        if rank > 0:
            time.sleep(0.3)
        work = all_reduce(t, "max", async_op=True)
        work.wait()
    events = [event for event in profile.events() if event.name == "engine:all_reduce"]
    assert len(events) == 2
    if rank == 0:
        assert events[1].time_range.elapsed_us() > 100_000, events


def kill_cycles(cycles):
    """Rank 0 forks a peer, which is killed at some moment of an operation; so many times. World size 1."""
    random.seed(0)
    folder = Path(sys.argv[4]).parent
    connect = _shared_memory.connect_ranks
    before, threads = None, threading.active_count()
    for cycle in range(cycles):
        path = str(folder / f"cycle{cycle}")
        t = torch.ones(random.choice([10, 20_000, 500_000]))
        child = os.fork()
        if child == 0:
            communicator, _ = connect(dist.FileStore(path, 2), 1, 2, 10.0)
            while True:
                communicator.all_reduce(t, "max")
        communicator, reason = connect(dist.FileStore(path, 2), 0, 2, 10.0)
        assert not reason, reason
        killed = []

        def kill(child=child, killed=killed):
            killed.append(time.monotonic())
            os.kill(child, signal.SIGKILL)

        threading.Timer(random.random() * 0.005, kill).start()
        try:
            while True:
                communicator.all_reduce(t, "max")
        except PeerError as error:
            assert "rank 1" in str(error) and "died in operation" in str(error), error
        assert time.monotonic() - killed[0] < 1
        os.waitpid(child, 0)
        communicator.close("done")
        del communicator
        Path(path).unlink(missing_ok=True)  # the store removes it itself, but not where its peer was killed
        while threading.active_count() > threads:  # the timer's
            time.sleep(0.001)
        before = before or held()
    assert_nothing_left(before)


def survivor_leaves():
    """Of three ranks one is killed, another learns of it and ends: the last one names who was killed. World size 1."""
    path, killed, survivor = str(Path(sys.argv[4]).parent / "survivor"), 2, 1
    t, children = torch.ones(10), {}
    for child in (survivor, killed):
        children[child] = os.fork()
        if children[child] == 0:
            communicator, _ = _shared_memory.connect_ranks(dist.FileStore(path, 3), child, 3, 10.0)
            if child == killed:
                signal.pause()
            with contextlib.suppress(PeerError):
                communicator.all_reduce(t, "max")
            os._exit(0)
    communicator, reason = _shared_memory.connect_ranks(dist.FileStore(path, 3), 0, 3, 10.0)
    assert not reason, reason
    os.kill(children[killed], signal.SIGKILL)
    for child in children.values():
        os.waitpid(child, 0)
    try:
        communicator.all_reduce(t, "max")
    except PeerError as error:
        assert f"rank {killed} on {os.uname().nodename} died in operation 1" in str(error), error
    else:
        raise AssertionError("no error")
    communicator.close("done")


def leave(how):
    """The processes end without destroying the group, in the middle of something. None may hang or abort."""
    t = torch.ones(100_000)
    all_reduce(t)
    if how == "waiting" and rank == 0:  # a thread waits for ranks that don't come
        all_reduce(t, async_op=True)
    if how == "daemon" and rank == 0:
        threading.Thread(target=all_reduce, args=(t,), daemon=True).start()
        time.sleep(0.2)
    if how == "early" and rank > 0:
        time.sleep(0.2)
        try:
            all_reduce(t)
        except PeerError as error:
            assert "rank 0" in str(error), error
        else:
            raise AssertionError("no error")
    start = time.monotonic()
    atexit.register(lambda: print(f"left after {time.monotonic() - start:.1f} s", flush=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    store = dist.FileStore(sys.argv[4], world_size)
    backend_name = sys.argv[5]
    names = sys.argv[1].split(",")
    timeout = timedelta(seconds=60)  # to start in; what waits for a lost rank makes a group of its own
    dist.init_process_group(backend_name, rank=rank, world_size=world_size, store=store, timeout=timeout)
    for call in names:
        name, *rest = call.split(":")
        globals()[name](*(int(word) if word.isdigit() else word for word in rest))
        print("passed", call, flush=True)
    if name not in ("lost", "lost_in_backward", "leave"):
        dist.destroy_process_group()
    elif name != "leave":
        os._exit(0)  # gloo's own shutdown would wait for the lost rank

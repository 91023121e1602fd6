"""One rank of a test: `python worker.py NAMES RANK WORLD_SIZE STORE` runs the functions NAMES below."""

import itertools
import os
import resource
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from engine.distributed import PeerError, _all_reduce, all_reduce
from engine.distributed._shared_memory import DTYPES, OPS

rank, world_size = int(sys.argv[2]), int(sys.argv[3])


def data(of, numel, dtype, seed):
    generator = torch.Generator().manual_seed(1000 * seed + of)
    if dtype.is_floating_point:
        return torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(-1000, 1000, (numel,), generator=generator).to(dtype)


def truth(numel, dtype, op, seed):
    stacked = torch.stack([data(of, numel, dtype, seed).double() for of in range(world_size)])
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
    return _all_reduce._communicators[group or dist.group.WORLD] is not None


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
    for other, other_op in [
        (torch.ones(20001), "sum"),
        (torch.ones(2), "sum"),
        (torch.ones(20000, dtype=torch.int32), "sum"),
        (torch.ones(20000), "max"),
    ]:
        group = dist.new_group()
        all_reduce(torch.ones(10), group=group)
        t, op = (other, other_op) if rank == world_size - 1 else (torch.ones(20000), "sum")
        start = time.monotonic()
        try:
            all_reduce(t, op, group)
        except PeerError as error:
            text = str(error)
        else:
            raise AssertionError("no error")
        assert time.monotonic() - start < 1.5
        assert "operation 2" in text and "called" in text and "rank " in text, text
        refuses_further_use(text.removeprefix("all_reduce: "), group)


def lost(how, numel):
    """The last rank is killed or stopped."""
    t = torch.ones(numel)
    all_reduce(t)
    if rank == world_size - 1:
        print("pid", os.getpid(), flush=True)
        os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])
    start = time.monotonic()
    try:
        all_reduce(t)
    except PeerError as error:
        text, seconds = str(error), time.monotonic() - start
    else:
        raise AssertionError("no error")
    assert f"rank {world_size - 1} on {os.uname().nodename}" in text and "operation 2" in text, text
    # The rank needs a moment to die; a stopped one is waited for as long as the group's timeout says.
    assert seconds < 1 if how == "killed" else 2 <= seconds < 2.5, seconds
    assert threading.active_count() == 1
    refuses_further_use(text.removeprefix("all_reduce: "))


def refused_memory():
    """One rank may not reserve a segment: all fall back, and no one dies of SIGBUS."""
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    for op in OPS:
        for dtype in (torch.float32, torch.int64):
            t = data(rank, 1000, dtype, 3).view(10, 100).t()
            all_reduce(t, op)
            assert torch.allclose(t.double(), truth(1000, dtype, op, 3).view(10, 100).t(), atol=1e-5)
    assert not uses_shared_memory()


def leaks():
    def held():
        maps = Path("/proc/self/maps").read_text().count("engine-all-reduce")
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), maps

    group = dist.new_group()  # gloo's own sockets and threads come and go with a group: only ours count
    t = torch.ones(10)
    before = held()
    for _ in range(20):
        all_reduce(t, "max", group)
        assert held()[0] == before[0] + world_size - 1  # one descriptor a peer, to see it die
        dist.barrier(group)
        del _all_reduce._communicators[group]
        dist.barrier(group)
        if rank == 0:
            store = dist.distributed_c10d._get_process_group_store(group)
            for other in range(world_size):
                for key in ("place", "refusal"):
                    store.delete_key(f"engine.all_reduce/{key}/{other}")
        dist.barrier(group)
    assert held() == before, (before, held())
    assert not [name for name in os.listdir("/dev/shm") if "engine" in name]


if __name__ == "__main__":
    torch.set_num_threads(1)
    store = dist.FileStore(sys.argv[4], world_size)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, store=store, timeout=timedelta(seconds=2))
    for call in sys.argv[1].split(","):
        name, *rest = call.split(":")
        globals()[name](*(int(word) if word.isdigit() else word for word in rest))
    print("done", flush=True)
    os._exit(0) if name == "lost" else dist.destroy_process_group()

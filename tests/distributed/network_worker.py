"""One rank of a test between hosts: `python network_worker.py NAMES RANK WORLD_SIZE STORE` runs the functions NAMES."""

import copy
import itertools
import os
import pickle
import signal
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from worker import (  # some of them run between hosts too
    data,
    forked,  # noqa: F401
    rank,
    refuses_further_use,
    same_on_every_rank,
    scatter_and_gather,  # noqa: F401
    truth,
    unusual,  # noqa: F401
    uses_shared_memory,
    world_size,
)

from engine.distributed import HookState, PeerError, _member, all_gather, all_reduce, reduce_scatter, ring_hook
from engine.distributed._shared_memory import DTYPES, OPS


def network(group=None):
    return _member._members[group or dist.group.WORLD].network


def network_values():
    sizes = [0, 1, 1000, 100003]
    for seed, (dtype, op, numel) in enumerate(itertools.product(DTYPES, OPS, sizes)):
        t = data(rank, numel, dtype, seed)
        expected = truth(numel, dtype, op, seed)
        all_reduce(t, op)
        if op in ("max", "min") or not dtype.is_floating_point:
            assert torch.equal(t.double(), expected), (dtype, op, numel)
        else:
            eps = torch.finfo(dtype).eps
            bound = eps * (expected.abs() + world_size * (8 if eps < 1e-4 else 1e-3))
            assert ((t.double() - expected).abs() <= bound).all(), (dtype, op, numel)
        if numel == 100003:
            assert same_on_every_rank(t)
    assert not uses_shared_memory() and network().bytes_sent > 0


def network_codecs():
    """Relative errors, the same bits on every rank and in a second run, every shape and dtype."""
    for codec, most in (("bf16", 0.005), ("int8", 0.01)):
        for seed, (numel, op) in enumerate([(1, "sum"), (1000, "avg"), (300_001, "sum"), (1_000_000, "avg")]):
            t, again = data(rank, numel, torch.float32, seed), data(rank, numel, torch.float32, seed)
            expected = truth(numel, torch.float32, op, seed)
            all_reduce(t, op, codec=codec)
            all_reduce(again, op, codec=codec)
            assert torch.equal(t, again) and same_on_every_rank(t)
            assert (t.double() - expected).norm() <= most * expected.norm() + 1e-30, (codec, numel)
        half = data(rank, 600, torch.bfloat16, 1).view(2, 300).t()
        all_reduce(half, codec=codec)
        expected = truth(600, torch.bfloat16, "sum", 1).view(2, 300).t()
        assert half.dtype == torch.bfloat16 and (half.double() - expected).norm() <= 0.02 * expected.norm()
    t = data(rank, 200_000, torch.float32, 5)
    all_reduce(t, codec="bitmap", density=0.05)
    kept = t != 0
    assert same_on_every_rank(t) and 0.03 < kept.double().mean() < 0.08


def network_residuals():
    """With a residual nothing is lost: all that was put in is in the results and what is still left over."""
    for codec, op in itertools.product(("bf16", "int8", "bitmap"), ("sum", "avg")):
        numel, results = 200_001, torch.zeros(200_001, dtype=torch.float64)
        put, residual = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel)
        for step in range(5):
            t = data(rank, numel, torch.float32, step)
            put += truth(numel, torch.float32, "sum", step)
            all_reduce(t, op, codec=codec, residual=residual, density=0.05)
            results += t.double() * (world_size if op == "avg" else 1)
        left = residual.double()
        dist.all_reduce(left)
        assert torch.allclose(results + left, put, atol=1e-4), (codec, op)
        assert residual.abs().max() > 0


def network_not_finite():
    for codec, bad in itertools.product(("bf16", "int8", "bitmap"), (float("nan"), float("inf"))):
        t, residual = data(rank, 100_000, torch.float32, 1), torch.zeros(100_000)
        if rank == world_size - 1:
            t[[0, 99_999]] = bad
        all_reduce(t, codec=codec, residual=residual, density=0.05)
        finite = t.isfinite()
        assert same_on_every_rank(finite) and not finite[[0, 99_999]].any() and residual.isfinite().all()
        if codec == "int8":
            assert int((~finite).sum()) == 256 + 100_000 % 256 and t[:256].isnan().all()


def network_arguments():
    t, residual = torch.ones(3), torch.zeros(3)
    for call, error in [
        (lambda: all_reduce(t, "max", codec="int8"), ValueError),
        (lambda: all_reduce(t, codec="zip"), ValueError),
        (lambda: all_reduce(t.double(), codec="int8"), TypeError),
        (lambda: all_reduce(t, residual=residual), ValueError),
        (lambda: all_reduce(t, codec="int8", residual=residual[:2]), ValueError),
        (lambda: all_reduce(t, codec="bitmap", density=0), ValueError),
        (lambda: all_reduce(torch.ones(3, device="meta"), codec="int8"), TypeError),
        (lambda: all_reduce(torch.ones(1).expand(3)), ValueError),
    ]:
        try:
            call()
        except error:
            continue
        raise AssertionError("no error")
    all_reduce(t)
    assert t.tolist() == [world_size] * 3


def network_mismatches():
    """The last rank calls something else, in a new group each time."""
    t = torch.ones(21000)
    usual = (all_reduce, t, {})
    for right, wrong in [
        (usual, (all_reduce, torch.ones(21001), {})),
        (usual, (all_reduce, t, {"codec": "bf16"})),
        ((all_reduce, t, {"codec": "bitmap"}), (all_reduce, t, {"codec": "bitmap", "density": 0.5})),
        (usual, (all_reduce, t, {"op": "avg"})),
        (usual, (all_reduce, t.half(), {})),
        (usual, (all_gather, t, {})),
        (usual, (reduce_scatter, t.repeat(world_size), {})),
        ((all_gather, t, {}), (all_gather, t[1:], {})),
        ((all_gather, t, {}), (all_gather, t.int(), {})),
        ((reduce_scatter, t, {}), (reduce_scatter, t, {"op": "max"})),
        ((reduce_scatter, t, {}), (all_gather, t[: 21000 // world_size], {"async_op": True})),
    ]:
        group = dist.new_group()
        all_reduce(torch.ones(10), group=group)
        kind, of, keywords = wrong if rank == world_size - 1 else right
        try:
            work = kind(of.clone(), group=group, **keywords)
            if "async_op" in keywords:
                work.wait()
        except PeerError as error:
            text = str(error)
        else:
            raise AssertionError("no error")
        assert text.startswith(f"{kind.__name__}: operation 2: ") and "called" in text, text
        refuses_further_use(text.partition(": ")[2], group)


def network_queued():
    """Queued operations give what they give one at a time, to the bit: of all sizes, some of the same tensor."""
    kinds = [("int8", True), (None, False), ("int8", False), ("bitmap", True), ("bf16", True), ("int8", True)]
    sizes = [300_000, 1, 0, 1_000_000, 70_000, 300_000, 1_000_000]

    def begun(queued):
        tensors, residuals, works = [], [], []
        for seed, (numel, (codec, feedback)) in enumerate(itertools.product(sizes, kinds)):
            t = data(rank, numel, torch.float32, seed)
            residual = torch.zeros(numel) if feedback else None
            tensors.append(t)
            residuals.append(residual)
            twice = 2 if seed % 3 == 0 else 1  # of which the second reads what the first wrote
            for _ in range(twice):
                works.append(all_reduce(t, "avg", codec=codec, residual=residual, async_op=True))
                if not queued:
                    works[-1].wait()
            if seed % 7 == 0:
                works.append(all_gather(t[:10], async_op=True))
            if seed % 5 == 0:
                works.append(reduce_scatter(t[: numel // world_size * world_size], async_op=True))
            if seed % 11 == 0:
                all_reduce(torch.ones(1000), codec="int8")  # in the caller's thread, after all that is queued
        time.sleep(0.05 * rank)  # ranks needn't be equally far
        results = [work.result()[0] for work in works]
        return [*tensors, *results, *(r for r in residuals if r is not None)]

    plain, queued = begun(False), begun(True)
    assert len(plain) == len(queued)
    for i, (a, b) in enumerate(zip(plain, queued, strict=True)):
        assert torch.equal(a, b), i
    assert not network()._unfinished and len(network()._pool) <= 2


def network_callbacks():
    """What is chained to a future may call other operations, also where more are queued behind; works end in order."""
    ended, got = [], []

    def call(done):
        t = torch.ones(1000)
        all_reduce(t, codec="int8")
        got.append(t[0].item())

    works = [all_reduce(torch.ones(n), codec="int8", async_op=True) for n in (3_000_000, 0, 1000, 500_000)]
    chained = [work.get_future().then(lambda done, i=i: ended.append(i)) for i, work in enumerate(works)]
    for future in [*chained, works[0].get_future().then(call)]:
        future.wait()
    assert ended == [0, 1, 2, 3] and got == [world_size], (ended, got)


def network_queued_mismatch():
    """The second of three queued operations differs on the last rank: the first is done, the others say why not."""
    group = dist.new_group()
    tensors = [torch.full((600_000,), float(rank)) for _ in range(3)]
    last = rank == world_size - 1
    ops = ["sum", "avg" if last else "sum", "sum"]
    works = [all_reduce(t, op, group=group, codec="int8", async_op=True) for t, op in zip(tensors, ops, strict=True)]
    works[0].wait()
    assert torch.allclose(tensors[0], torch.full((600_000,), float(sum(range(world_size)))), rtol=0.02)
    for number, work in ((2, works[1]), (3, works[2])):
        try:
            work.wait()
        except PeerError as error:
            text = str(error)
        else:
            raise AssertionError("no error")
        begins = "all_reduce: operation 2: " if number == 2 else "all_reduce: this group failed before: operation 2: "
        assert text.startswith(begins) and "avg of 600000 float32 by int8" in text, text
    refuses_further_use("operation 2: ", group)
    dist.barrier()
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1  # no thread turns in vain for what nobody takes any more


def network_from_threads():
    """Two threads of one process call: whatever is called first on a rank is called first on all, and none waits."""
    tensors, errors = [torch.full((200_000,), float(i)) for i in range(40)], []
    order = threading.Condition()
    turn = [0]

    def call(mine):
        try:
            for i in mine:
                with order:
                    order.wait_for(lambda i=i: turn[0] == i)
                    work = all_reduce(tensors[i], codec="int8", async_op=True) if i % 3 else None
                    if work is None:
                        all_reduce(tensors[i], codec="int8")
                    turn[0] += 1
                    order.notify_all()
                if work is not None and i % 2:
                    work.wait()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(range(first, 40, 2),)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    all_reduce(torch.ones(1))
    assert not errors and not any(thread.is_alive() for thread in threads), errors
    for i, t in enumerate(tensors):
        assert torch.allclose(t, torch.full((200_000,), float(i * world_size)), rtol=0.02), i


def network_interrupted(codec="none"):
    """An interrupt stays what it is; the group is refused from then on, here and by the others, who learn why."""

    def interrupt(*_):
        raise KeyboardInterrupt

    all_reduce(torch.ones(10), group=(group := dist.new_group()))
    signal.signal(signal.SIGALRM, interrupt)
    if rank == 0:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
    elif rank == world_size - 1:
        time.sleep(0.5)  # rank 0 is told of the signal once it need not wait
    start, raised = time.monotonic(), KeyboardInterrupt if rank == 0 else PeerError
    try:
        all_reduce(torch.ones(1_000_000), group=group, codec=None if codec == "none" else codec)
    except raised as error:
        text = str(error)
    else:
        raise AssertionError("no error")
    expected = f"rank 0 on {os.uname().nodename} was interrupted in operation 2"
    assert rank == 0 or text == f"all_reduce: {expected}", text
    refuses_further_use(expected, group)
    assert time.monotonic() - start < 1.5, time.monotonic() - start


def network_lost(how, codec):
    """The last rank is killed or stopped; its groups learn of it one after the other."""
    codec, t = None if codec == "none" else codec, torch.ones(1_200_000)
    calls = [lambda group: all_reduce(t, group=group, codec=codec), lambda group: all_gather(t, group)]
    if how == "killed":
        calls.append(lambda group: reduce_scatter(t, group=group))
    groups = [dist.new_group(timeout=timedelta(seconds=2)) for _ in calls]
    for call, group in zip(calls, groups, strict=True):
        call(group)
    if rank == world_size - 1:
        os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])
    words = {"killed": "died", "stopped": "did not answer within"}[how]
    for call, group in zip(calls, groups, strict=True):
        start = time.monotonic()
        try:
            call(group)
        except PeerError as error:
            text, seconds = str(error), time.monotonic() - start
        else:
            raise AssertionError("no error")
        assert f"rank {world_size - 1} on {os.uname().nodename} {words}" in text and "operation 2" in text, text
        assert seconds < 1 if how == "killed" else 1.9 <= seconds < 2.5, seconds
        refuses_further_use(text.partition(": ")[2], group)


def network_lost_queued():
    """The last rank is killed amid queued operations: every one that is not done raises, and names it."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    tensors = [torch.ones(4_000_000) for _ in range(6)]
    all_reduce(tensors[0], group=group, codec="int8")
    if rank == world_size - 1:
        threading.Timer(0.03, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    start = time.monotonic()
    works = [all_reduce(t, group=group, codec="int8", async_op=True) for t in tensors]
    texts = []
    for work in works:
        try:
            work.wait()
        except PeerError as error:
            texts.append(str(error))
    assert texts and all(f"rank {world_size - 1} on {os.uname().nodename} died" in text for text in texts), texts
    assert time.monotonic() - start < 1.5, time.monotonic() - start
    refuses_further_use(texts[0].partition(": ")[2], group)


def network_hierarchical():
    cases = [(op, torch.float32, 1 << 20) for op in OPS]  # whole windows; the others have an uneven one
    cases += [("avg", torch.int64, 1000), ("sum", torch.bfloat16, 700_000), ("max", torch.float32, 1)]
    for op, dtype, numel in cases:
        t, expected = data(rank, numel, dtype, 1), truth(numel, dtype, op, 1)
        all_reduce(t, op)
        # bfloat16 is rounded inside the host too: partial sums of up to about 8.
        assert torch.allclose(t.double(), expected, atol=0.07 if dtype == torch.bfloat16 else 1e-5), (op, dtype, numel)
        assert same_on_every_rank(t)
    for codec in ("int8", "bitmap"):
        t, residual = data(rank, 700_000, torch.float32, 2), torch.zeros(700_000)
        all_reduce(t, "avg", codec=codec, residual=residual)
        left = residual.double()
        dist.all_reduce(left)
        expected = truth(700_000, torch.float32, "avg", 2)
        assert torch.allclose(t.double() + left / world_size, expected, atol=1e-5) and same_on_every_rank(t)
    assert network()._place.local_size == 2 and network().hosts == 2


def hook_model(state, bucket_cap_mb=0.05):
    torch.manual_seed(0)
    layers = [
        torch.nn.Linear(64, 128),
        torch.nn.Tanh(),
        torch.nn.Linear(128, 64),
        torch.nn.Tanh(),
        torch.nn.Linear(64, 1),
    ]
    ddp = DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=bucket_cap_mb)
    if state is not None:
        ddp.register_comm_hook(state, ring_hook)
    return ddp, torch.optim.SGD(ddp.parameters(), lr=0.05)


def train(ddp, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * step + rank)
        x = torch.randn(32, 64, generator=generator)
        loss = (ddp(x) - x.sin().sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / world_size


def hook_trains():
    """With error feedback the loss ends where plain DDP's does, and every rank holds the same weights."""
    plain = train(*hook_model(None), range(60))
    for codec, most in (("int8", 0.003), (None, 1e-4), ("bf16", 0.003)):
        state = HookState(codec=codec, warmup_steps=2)
        ddp, optimizer = hook_model(state)
        loss = train(ddp, optimizer, range(60))
        assert abs(loss - plain) <= most * plain, (codec, loss, plain)
        assert all(same_on_every_rank(p.detach()) for p in ddp.parameters()) and state.step == 60
        assert bool(state._buckets) == (codec is not None)


def hook_survives():
    """A state that was pickled goes on as if nothing had happened, though DDP's buckets start anew."""
    state = HookState(codec="bitmap", density=0.1)
    ddp, optimizer = hook_model(state)
    train(ddp, optimizer, range(5))
    saved, weights = pickle.dumps(state), copy.deepcopy(ddp.module.state_dict())
    assert any(residual.abs().max() > 0 for residual in state._residuals.values())
    loaded = pickle.loads(saved)
    again, its_optimizer = hook_model(loaded)
    again.module.load_state_dict(weights)
    residuals = list(loaded._residuals.values())
    assert loaded.step == 5 and all(
        torch.equal(a, b) for a, b in zip(residuals, state._residuals.values(), strict=True)
    )
    # The buckets differ in the first step, and with them what bitmap picks: what is conserved is the sum.
    for each, optimizer_of in ((ddp, optimizer), (again, its_optimizer)):
        loss = train(each, optimizer_of, range(5, 30))
        assert loss < 10 and all(same_on_every_rank(p.detach()) for p in each.parameters())
    other = DistributedDataParallel(torch.nn.Linear(3, 1))
    other.register_comm_hook(pickle.loads(saved), ring_hook)
    try:
        other(torch.ones(1, 3)).sum().backward()
    except (ValueError, RuntimeError) as error:
        assert "another model" in str(error), error
    else:
        raise AssertionError("no error")


if __name__ == "__main__":
    torch.set_num_threads(1)
    store = dist.FileStore(sys.argv[4], world_size)
    timeout = timedelta(seconds=60)  # to start in; what waits for a lost rank makes a group of its own
    dist.init_process_group("gloo", rank=rank, world_size=world_size, store=store, timeout=timeout)
    for call in sys.argv[1].split(","):
        name, *rest = call.split(":")
        globals()[name](*(int(word) if word.isdigit() else word for word in rest))
    print("done", flush=True)
    os._exit(0) if name.endswith("lost") else dist.destroy_process_group()

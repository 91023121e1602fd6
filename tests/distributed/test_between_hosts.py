"""all_reduce between hosts, each process taken for a host of its own, and HookState: real processes over gloo."""

import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_all_reduce import pytestmark  # noqa: F401  (the mark holds here too)

from engine.distributed import HookState
from engine.distributed._exchange import BLOCK, Place, plan
from engine.distributed._work import Operation, Worker

WORKER = Path(__file__).parent / "network_worker.py"
NETBENCH = Path(__file__).parents[2] / "bench" / "netbench.py"


def run(names, world_size, folder):
    """Runs functions of network_worker.py on so many ranks; the last is lost in the end."""
    arguments = [str(world_size), str(folder / "store")]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), names, str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        for process in ranks[:-1]:
            text, _ = process.communicate(timeout=100)
            assert process.returncode == 0 and "done" in text, text
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


@pytest.fixture(autouse=True)
def hosts_of_their_own(monkeypatch):
    monkeypatch.setenv("ENGINE_SHARED_MEMORY", "0")


@pytest.mark.parametrize("n", [1, 255, 256, 70000, 5_000_000])
@pytest.mark.parametrize("hosts, local_size", [(2, 1), (3, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize("codec", [None, "int8"])
def test_pieces_cover_a_tensor_once(n, hosts, local_size, codec):
    windows = plan(n, codec, Place(range(hosts), 0, 0, local_size))
    seen = torch.zeros(n, dtype=torch.int32)
    for i in range(windows.count):
        for local_rank in range(local_size):
            pieces = [windows.piece(i, local_rank, host) for host in range(hosts)]
            assert all((piece.start - pieces[0].start) % BLOCK == 0 for piece in pieces if piece.stop > piece.start)
            for piece in pieces:
                seen[piece] += 1
    assert (seen == 1).all()


# Starting processes takes most of the time: what can share them does. What loses a rank comes last.
@pytest.mark.parametrize(
    "world_size, names",
    [
        (
            2,
            "network_residuals,network_not_finite,network_arguments,network_queued,network_callbacks,network_queued_mismatch,"
            "network_from_threads,forked,hook_trains,hook_survives,network_interrupted,network_interrupted:int8,"
            "network_lost:stopped:int8",
        ),
        (
            3,
            "network_values,network_codecs,network_queued,network_callbacks,network_queued_mismatch,scatter_and_gather,unusual,"
            "network_mismatches,network_interrupted,network_interrupted:int8,network_lost:killed:int8",
        ),
        (2, "network_values,unusual,network_lost:killed:none"),
        (3, "network_lost_queued"),
    ],
)
def test_among_ranks(world_size, names, tmp_path):
    run(names, world_size, tmp_path)


def steps_of(log, name, count, sent):
    for i in range(count):
        log.append((name, i))
        yield i >= sent
    return torch.tensor(count)


@pytest.mark.parametrize("case", ["apart", "not ready", "same memory", "alone"])
def test_a_worker_begins_the_next_operation_once_the_one_before_has_sent_all(case):
    log, memory = [], torch.zeros(4)
    second = {
        "apart": {"may_begin": lambda: True, "touched": (torch.zeros(4),)},
        "not ready": {"may_begin": lambda: False},
        "same memory": {"may_begin": lambda: True, "touched": (memory[2:],)},
        "alone": {},
    }[case]
    worker, gate = Worker(), threading.Event()
    first = worker.submit(lambda: gate.wait() or torch.zeros(1))
    works = [
        worker.submit_operation(Operation(lambda: steps_of(log, "a", 5, 2), lambda: True, (memory[:2],))),
        worker.submit_operation(Operation(lambda: steps_of(log, "b", 4, 9), **second)),
        worker.submit_operation(Operation(lambda: steps_of(log, "c", 1, 0), lambda: True)),
    ]
    gate.set()
    first.wait(5)
    assert [work.result()[0].item() for work in works] == [5, 4, 1]
    a, b = [("a", i) for i in range(5)], [("b", i) for i in range(4)]
    together = [*a[:4], b[0], a[4], *b[1:]]
    assert log == [*(together if case == "apart" else [*a, *b]), ("c", 0)]
    worker.stop()


def test_an_operation_that_fails_beside_another():
    log, worker = [], Worker()

    def failing():
        yield True
        raise ValueError("spoiled")

    works = [
        worker.submit_operation(Operation(failing, lambda: True)),
        worker.submit_operation(Operation(lambda: steps_of(log, "b", 3, 0), lambda: True)),
    ]
    with pytest.raises(ValueError, match="spoiled"):
        works[0].wait(5)
    assert works[1].result()[0].item() == 3
    worker.stop()


class Bucket:
    def __init__(self, *parameters):
        self._parameters = parameters

    def parameters(self):
        return self._parameters

    def buffer(self):
        return torch.cat([p.detach().view(-1) for p in self._parameters])


def test_residuals_move_with_their_parameters():
    a, b, c = (torch.nn.Parameter(torch.zeros(n)) for n in (3, 4, 5))
    state = HookState()
    state._residual(Bucket(a, b)).copy_(torch.arange(7.0))
    state._residual(Bucket(c)).fill_(9)
    rebuilt = state._residual(Bucket(c, a)), state._residual(Bucket(b))
    assert rebuilt[0].tolist() == [9] * 5 + [0, 1, 2] and rebuilt[1].tolist() == [3, 4, 5, 6]
    assert state._residual(Bucket(b)) is rebuilt[1] and len(state._buckets) == 2
    loaded = pickle.loads(pickle.dumps(state))
    assert loaded._residual(Bucket(a, b)).tolist() == list(range(7))  # as before the first rebuild
    with pytest.raises(ValueError, match="another model"):
        pickle.loads(pickle.dumps(state))._residual(Bucket(b, a))


@pytest.mark.parametrize("wrong", [{"codec": "zip"}, {"warmup_steps": -1}, {"density": 0}])
def test_hook_state_errors(wrong):
    with pytest.raises(ValueError, match="HookState: "):
        HookState(**wrong)


def test_netbench_says_why_it_skips():
    """Without the tools: with them it would take minutes."""
    done = subprocess.run(
        [sys.executable, str(NETBENCH)], env={**os.environ, "PATH": "/nowhere"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("netbench skipped: "), done.stderr


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_two_ranks_on_each_of_two_hosts(tmp_path, monkeypatch):
    """Hosts as process namespaces: ranks open each other's segments inside one alone."""
    monkeypatch.delenv("ENGINE_SHARED_MEMORY")
    probe = subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("process namespaces are refused here")
    worker = f"{sys.executable} {WORKER} unusual,network_hierarchical"
    enter = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c"]
    hosts = [
        subprocess.Popen(
            [*enter, f"{worker} {first} 4 {tmp_path}/store & {worker} {first + 1} 4 {tmp_path}/store; wait $!"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for first in (0, 2)
    ]
    try:
        texts = [host.communicate(timeout=100)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert all(text.count("done") == 2 for text in texts), texts

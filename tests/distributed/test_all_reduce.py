"""Collectives among real processes: values against float64, and what happens when a rank dies, stalls or differs.

Starting processes takes most of the time: the checks of worker.py that can share a process group do.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from engine import backends

WORKER = Path(__file__).parent / "worker.py"

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo"),
    pytest.mark.skipif(backends._library("_native") is None, reason="needs the native libraries"),
]

# By world size and backend. What loses a rank comes last.
SHARED = {
    (1, "gloo"): [
        "arguments",
        "values",
        "ops_of_c10d",
        "scatter_and_gather",
        "unusual",
        "asynchronous",
        "kill_cycles:25",
        "survivor_leaves",
    ],
    (2, "engine"): [
        "values",
        "unusual",
        "forked",
        "choice",
        "backend",
        "overloads",
        "barriers",
        "profiled",
        "compiled",
        "codecs",
        "leaks",
        "groups_again",
        "on_one_core",
        "lost:stopped:100000",
    ],
    (3, "gloo"): [
        *[
            "values",
            "shapes",
            "scatter_and_gather",
            "unusual",
            "forked",
            "codecs",
            "asynchronous",
            "choice",
            "mismatches",
        ],
        *["refused_memory", "on_one_core", "lost:killed:100"],
    ],
}


class Hung(Exception):
    """Ranks that did not end, with what they printed and where each of their threads stood."""


def launch(names, world_size, folder, backend="gloo", seconds=120):
    """Runs functions of worker.py on so many ranks; returns what each prints, and its exit code."""
    arguments = [sys.executable, "-X", "faulthandler", str(WORKER), ",".join(names)]
    ranks = [
        subprocess.Popen(
            [*arguments, str(rank), str(world_size), str(folder / "store"), backend],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    lost = "lost" in names[-1]
    texts, codes = [], []
    try:
        for process in ranks[: world_size - lost]:
            text, _ = process.communicate(timeout=seconds)
            texts.append(text)
            codes.append(process.returncode)
    except subprocess.TimeoutExpired:
        for process in ranks:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGABRT)  # faulthandler prints the stacks
        raise Hung("\n".join(process.communicate(timeout=20)[0] for process in ranks)) from None
    finally:
        for process in ranks:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.communicate()
    return texts, codes


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Runs a group's functions when the first of them is asked for."""
    results = {}

    def texts_of(key):
        if key not in results:
            results[key], _ = launch(SHARED[key], key[0], tmp_path_factory.mktemp("ranks"), key[1])
        return results[key]

    return texts_of


@pytest.mark.parametrize("world_size, backend, name", [(*key, name) for key, names in SHARED.items() for name in names])
def test_among_ranks(world_size, backend, name, launched):
    for text in launched((world_size, backend)):
        assert f"passed {name}\n" in text, text


def test_a_lost_rank_ends_a_backward_pass(tmp_path):
    texts, codes = launch(["lost_in_backward"], 2, tmp_path, "engine")
    assert codes == [0] and "passed lost_in_backward" in texts[0], texts


@pytest.mark.parametrize("how", ["waiting", "daemon", "early"])
def test_ends_without_being_destroyed(how, tmp_path):
    texts, codes = launch([f"leave:{how}"], 2, tmp_path)
    assert codes == [0, 0], texts
    assert all(float(text.split("left after ")[1].split()[0]) < 3 for text in texts), texts


# Imported after the group is there, as torch._dynamo must not be: its default arguments would keep the group.
IMPORTS_LATE = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import engine

engine.distributed.all_reduce(torch.ones(4))
engine.distributed.all_reduce(torch.ones(4), async_op=True).wait()
engine.distributed.functional.all_reduce(torch.ones(4))
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
engine.distributed.tensor_parallel_(model, dist.group.WORLD, {"0": "rowwise"})
model(torch.ones(4))
del model
dist.destroy_process_group()
assert "torch._dynamo" not in sys.modules
print(*(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")))
"""


def test_a_destroyed_group_ends_its_threads_though_engine_was_imported_late():
    text = subprocess.run([sys.executable, "-c", IMPORTS_LATE], capture_output=True, text=True, check=False)
    assert text.returncode == 0 and text.stdout, text.stderr
    assert "gloo" not in text.stdout


@pytest.mark.slow
def test_warns_after_ten_seconds(tmp_path):
    texts, codes = launch(["slow"], 2, tmp_path)
    assert codes == [0, 0], texts


@pytest.mark.slow
def test_a_thousand_kills_leave_nothing(tmp_path):
    texts, codes = launch(["kill_cycles:1000"], 1, tmp_path, seconds=600)
    assert codes == [0], texts

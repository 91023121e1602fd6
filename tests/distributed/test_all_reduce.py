"""all_reduce among real processes: values against float64, and what happens when a rank dies, stalls or differs."""

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


def run(name, world_size, tmp_path, lost=False):
    """Runs functions of worker.py on so many ranks; the last of them ends by itself only where it isn't `lost`."""
    command = [sys.executable, str(WORKER), name]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    texts = []
    try:
        for process in ranks[: world_size - lost]:
            text, _ = process.communicate(timeout=25)
            texts.append(text)
            assert process.returncode == 0 and "done" in text, text
    finally:
        for process in ranks:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.communicate()
    return texts


@pytest.mark.parametrize(
    "names, world_size", [("arguments,values", 1), ("values,shapes,leaks", 2), ("values,shapes", 3)]
)
def test_values_and_groups(names, world_size, tmp_path):
    run(names, world_size, tmp_path)


def test_a_mismatch_is_an_error_on_every_rank(tmp_path):
    run("mismatches", 3, tmp_path)


@pytest.mark.parametrize("how, numel", [("killed", 100), ("stopped", 100000)])
def test_a_lost_peer(how, numel, tmp_path):
    run(f"lost:{how}:{numel}", 3, tmp_path, lost=True)


def test_falls_back_where_memory_is_refused(tmp_path):
    texts = run("refused_memory", 2, tmp_path)
    assert all("goes through gloo: rank 0" in text and "reserve" in text for text in texts), texts

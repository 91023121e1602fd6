"""The shared memory of one process: what it refuses to open, and what is left after it was closed."""

import os
import tempfile

import pytest
import torch

from engine import backends

pytestmark = pytest.mark.skipif(backends._library("_native") is None, reason="needs the native libraries")


@pytest.fixture
def native():
    return pytest.importorskip("engine._native")


def test_opens_sealed_segments_alone(native):
    """An ordinary file could be cut short later, which would end this process by a signal."""
    memory = native.SharedMemory(0, 2, "own")
    with tempfile.TemporaryFile() as file:
        file.write(b"token".ljust(os.fstat(memory.descriptor).st_size, b"\0"))
        file.flush()
        with pytest.raises(RuntimeError, match="is another file"):
            memory.open_peer(1, os.getpid(), file.fileno(), "token", "here")


def test_what_it_could_not_open_leaves_nothing_and_can_be_opened_again(native):
    memory, peer = native.SharedMemory(0, 2, "own"), native.SharedMemory(1, 2, "token")
    before = len(os.listdir("/proc/self/fd"))
    for descriptor, text in ((1 << 30, "cannot open"), (peer.descriptor, "is another segment")):
        with pytest.raises(RuntimeError, match=text):
            memory.open_peer(1, os.getpid(), descriptor, "another token", "here")
    assert len(os.listdir("/proc/self/fd")) == before
    memory.open_peer(1, os.getpid(), peer.descriptor, "token", "here")
    with pytest.raises(ValueError, match="no such peer"):
        memory.open_peer(1, os.getpid(), peer.descriptor, "token", "here")


def test_a_closed_communicator_says_why(native):
    distributed = pytest.importorskip("engine.distributed._shared_memory")
    communicator = distributed.Communicator(native, native.SharedMemory(0, 1, "token"), 1.0)
    communicator.close("the process ends")
    assert communicator.fail("a connection was lost") == "the process ends"
    with pytest.raises(distributed.PeerError, match="all_reduce: the process ends"):
        communicator.all_reduce(torch.ones(3), "sum")

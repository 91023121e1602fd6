import zlib

import pytest
import torch

import engine


def pytest_configure(config):
    torch.set_num_threads(2)


@pytest.fixture(params=engine.backends.cpu_variants())
def variant(request):
    """Runs the test once for every instruction set that this machine can force."""
    with engine.backends.force_cpu_variant(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def seed(request):
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))

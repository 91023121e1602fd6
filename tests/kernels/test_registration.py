"""Every module of engine.kernels that the backend names makes itself the owner of its ops, once."""

import importlib

import pytest
import torch
from triton_tools import interpreted

pytest.importorskip("triton")
import engine


@interpreted
@pytest.mark.skipif(torch.cuda.is_available(), reason="they are registered already")
@pytest.mark.parametrize("name", engine.backends.TRITON_KERNELS)
def test_registers_once(name):
    module = importlib.import_module(f"engine.kernels.{name}")
    ops = ["ring_encode", "ring_prune_encode", "ring_decode"] if name == "ring_codec" else [name]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert not any(has(f"engine::{op}", "CUDA") for op in ops)
    module.register()
    module.register()
    assert all(has(f"engine::{op}", "CUDA") for op in ops)

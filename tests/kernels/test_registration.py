"""Every module of engine.kernels that the backend names makes itself the owner of its op, once."""

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
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert not has(f"engine::{name}", "CUDA")
    module.register()
    module.register()
    assert has(f"engine::{name}", "CUDA")

"""Runs the tests of every Triton kernel that are marked `interpreted`, in one process of their own."""

import re
from pathlib import Path

import pytest
from build_tools import run_pytest
from triton_tools import compiled

pytest.importorskip("triton")


@compiled
def test_every_kernel_in_interpreter_mode():
    out = run_pytest([Path(__file__).parent], TRITON_INTERPRET="1")
    assert re.search(r"[1-9]\d* passed", out), out[-8000:]

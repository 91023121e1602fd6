"""Who owns what, what can be forced, and what happens where a library is missing or broken."""

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import engine
from engine import backends
from engine.backends import CPU_VARIANTS
from engine.ops._library import REFERENCES

ROOT = Path(__file__).parents[1]

# The native owner of each (op, dispatch key). An op that is missing under CUDA runs there by its reference.
OWNERS = {
    "CPU": {
        "bitmap_gather",
        "bitmap_int8_linear",
        "bitmap_int8_linear.patches",
        "bitmap_linear",
        "bitmap_linear_backward_input",
        "bitmap_linear_backward_values",
        "bitmap_to_dense",
        "block_int8_linear",
        "block_int8_linear.patches",
        "block_linear",
        "block_to_dense",
        "csr_linear",
        "int8_dequantize",
        "int8_embedding",
        "int8_fake_quantize",
        "int8_linear",
        "int8_linear.patches",
        "int8_quantize",
        "int8_weight_linear",
        "magnitude_threshold",
        "magnitude_threshold_of_list",
        "prune_quantize_to_bitmap",
        "prune_to_bitmap",
        "prune_to_block",
        "prune_to_csr",
        "prune_to_semi_structured",
        "ring_decode",
        "ring_encode",
        "ring_prune_encode",
        "semi_structured_gather",
        "semi_structured_int8_linear",
        "semi_structured_int8_linear.patches",
        "semi_structured_linear",
        "semi_structured_to_dense",
        "threshold_prune",
        "transpose",
    },
    "CUDA": {
        "bitmap_gather",
        "bitmap_int8_linear",
        "bitmap_linear",
        "bitmap_to_dense",
        "block_int8_linear",
        "block_linear",
        "block_to_dense",
        "csr_linear",
        "int8_dequantize",
        "int8_embedding",
        "int8_fake_quantize",
        "int8_linear",
        "int8_quantize",
        "int8_scaled_mm",
        "int8_weight_linear",
        "magnitude_threshold",
        "magnitude_threshold_of_list",
        "prune_quantize_to_bitmap",
        "prune_to_bitmap",
        "prune_to_block",
        "prune_to_csr",
        "prune_to_semi_structured",
        "ring_decode",
        "ring_encode",
        "ring_prune_encode",
        "semi_structured_int8_linear",
        "semi_structured_linear",
        "semi_structured_to_dense",
        "threshold_prune",
    },
}


def owned(key: str) -> set[str]:
    return {n for n in REFERENCES if torch._C._dispatch_has_kernel_for_dispatch_key(f"engine::{n}", key)}


def test_owners_on_the_cpu():
    assert owned("CPU") == OWNERS["CPU"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: its libraries are not loaded")
def test_owners_on_a_gpu():
    assert owned("CUDA") == OWNERS["CUDA"]


def test_owners_on_a_gpu_by_source(monkeypatch):
    """What would be loaded there: each kernel's file is listed, and each op has one owner."""
    pytest.importorskip("triton")
    owners: list[str] = []
    for kernel in engine.backends.TRITON_KERNELS:
        module = importlib.import_module(f"engine.kernels.{kernel}")
        monkeypatch.setattr(module, "own_cuda", lambda op, function: owners.append(op) if callable(function) else None)
        module.register()
    listed = runpy.run_path(str(ROOT / "setup.py"))["CUDA_OPS"]
    for op in listed:
        owners += re.findall(r'm\.impl\("(\w+)"', (ROOT / f"csrc/cuda/{op}.cu").read_text())
    assert sorted(owners) == sorted(OWNERS["CUDA"])
    assert {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")} == set(listed)
    kernels = {path.stem for path in (ROOT / "kernels").glob("[!_]*.py")}
    assert kernels == set(engine.backends.TRITON_KERNELS)


def test_every_public_op_is_registered():
    for name in engine.ops.__all__:
        assert name in REFERENCES and hasattr(torch.ops.engine, name)
        assert getattr(engine.ops, name).__doc__


def test_variants_can_be_forced():
    variants = engine.backends.cpu_variants()
    assert variants[0] == "portable" and variants == tuple(name for name in CPU_VARIANTS if name in variants)
    best = engine.backends.cpu_variant()
    with engine.backends.force_cpu_variant("portable"):
        assert engine.backends.cpu_variant() == "portable"
    assert engine.backends.cpu_variant() == best
    with pytest.raises(ValueError, match="expected one of portable"), engine.backends.force_cpu_variant("mmx"):
        pass


def test_every_feature_that_functions_are_compiled_for_is_asked_for():
    """A processor that lacks one alone, as virtual ones may, would end the process at the first such instruction."""
    csrc = Path(__file__).parents[1] / "csrc"
    strings = re.findall(r'"([a-z0-9]+,[a-z0-9,=-]+)"', (csrc / "common/isa.h").read_text())
    compiled_for = {name for names in strings for name in names.split(",") if name and "=" not in name}
    asked_for = re.split(r"[^a-z0-9]+", (csrc / "cpu/isa.cpp").read_text())
    assert {"avx2", "lzcnt", "avx512vbmi2"} <= compiled_for <= set(asked_for)


def test_status_says_why():
    status = {s.name: s for s in engine.backends.status()}
    assert status["cpu"].active and "best instruction set" in status["cpu"].detail
    assert all(s.detail for s in status.values())


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd="/")


def test_a_library_that_does_not_load_is_an_error(tmp_path):
    broken = tmp_path / "_cpu.broken.so"
    broken.write_bytes(b"not a library")
    done = python("import engine", ENGINE_CPU_LIBRARY=str(broken))
    assert done.returncode != 0 and "_cpu.broken.so is installed but does not load" in done.stderr


def test_import_is_silent_and_light():
    done = python("import sys, engine; assert not {'matplotlib', 'transformers', 'typer'} & set(sys.modules)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_package_named_kernels_is_installed():
    done = python("import engine.kernels\ntry:\n    import kernels\nexcept ImportError:\n    print('fine')")
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_reference_mode_covers_every_op(name, monkeypatch):
    class Called(Exception):
        pass

    def reference(*args):
        raise Called(name)

    monkeypatch.setitem(REFERENCES, name, reference)
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.engine, packet), overload or "default")
    of_type = {"Tensor": torch.ones(1), "List[Tensor]": [torch.ones(1)], "int": 1, "float": 0.5, "bool": True}
    of_type |= {"str": "int8", "Optional[Tensor]": None, "Optional[str]": None}
    arguments = [of_type[str(argument.type)] for argument in op._schema.arguments]
    with engine.reference_mode(), pytest.raises(Called, match=f"^{name}$"):
        op(*arguments)


def test_reference_mode_ends(monkeypatch):
    monkeypatch.setitem(REFERENCES, "int8_quantize", lambda x: (torch.full_like(x, 7, dtype=torch.int8), x[:, 0]))
    x = torch.randn(3, 4)
    with engine.reference_mode():
        assert (engine.ops.int8_quantize(x)[0] == 7).all()
    assert not (engine.ops.int8_quantize(x)[0] == 7).all()


def test_references_answer_row_by_row():
    """As the fakes promise, whatever the strides of what is given."""
    x = torch.randn(8, 12).t()
    for name, arguments in (
        ("magnitude_threshold", (x, 0.5, "row")),
        ("int8_quantize", (x,)),
        ("int8_fake_quantize", (x,)),
        ("int8_dequantize", (x.to(torch.int8), torch.ones(12), torch.float32)),
        ("threshold_prune", (x, torch.tensor(0.1))),
    ):
        results = REFERENCES[name](*arguments)
        assert all(t.is_contiguous() for t in (results if isinstance(results, tuple) else (results,))), name


@pytest.mark.parametrize("name", ["triton.language.extra.cuda", "setuptools", None, "engine.kernels"])
def test_a_triton_that_lacks_something_is_told(name, monkeypatch):
    def missing(kernel):
        raise ImportError(f"no {kernel}", name=name)

    monkeypatch.setattr(backends.importlib, "import_module", missing)
    status = backends._register_triton()
    assert not status.active and "no engine.kernels.block_int8_linear" in status.detail


@pytest.mark.parametrize("name", ["engine.ops._check", "engine.kernels._tiles"])
def test_a_kernel_that_lacks_something_of_ours_is_an_error(name, monkeypatch):
    def missing(kernel):
        raise ImportError(f"cannot import name 'x' from '{name}'", name=name)

    monkeypatch.setattr(backends.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=name):
        backends._register_triton()

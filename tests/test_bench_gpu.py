"""The code of `make bench-gpu`, tried out on the CPU over small shapes."""

import json

import pytest
import torch

from engine.bench import gpu, gpu_cases, gpu_checks
from engine.ops._library import REFERENCES

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", sorted(gpu_checks.CHECKS))
def test_checks_pass(op, monkeypatch):
    monkeypatch.setattr(gpu_checks, "SHAPES", [(5, 19, 65)])
    assert gpu_checks.check(op, CPU) > 0


def test_checks_can_fail(monkeypatch):
    monkeypatch.setitem(REFERENCES, "int8_quantize", lambda x: (torch.zeros_like(x, dtype=torch.int8), x[:, 0].float()))
    with pytest.raises(AssertionError, match=r"int8_quantize of .* is not equal to its reference to the bit"):
        gpu_checks.check("int8_quantize", CPU)
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with pytest.raises(AssertionError, match="error"):
        gpu_checks._check_product("it", x @ weight.t() + 0.01, x, weight, None)


def test_every_op_with_a_kernel_has_a_section():
    from test_backends import OWNERS

    assert OWNERS["CUDA"] <= gpu_checks.CHECKS.keys()
    assert OWNERS["CUDA"] - gpu_cases.CASES.keys() <= {"bitmap_gather", "magnitude_threshold_of_list"}


@pytest.mark.parametrize(
    "ops", [["int8_quantize", "prune_to_bitmap"], pytest.param([*gpu_cases.CASES], marks=pytest.mark.slow)]
)
def test_an_error_in_one_section_loses_no_other(ops, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "CALLS_PER_ROUND", 1e-4)
    monkeypatch.setattr(gpu_cases, "BEYOND", 1 << 20)
    monkeypatch.setattr(gpu_checks, "SHAPES", [(5, 19, 65)])
    with torch.inference_mode():
        report = {"device": "none", **gpu.describe(CPU), **gpu.run(["no_such_op", *ops], CPU, small=True)}
    assert report["errors"].keys() == {"no_such_op"} and "LookupError" in report["errors"]["no_such_op"]
    assert {r["op"] for r in report["rows"]} == set(ops)
    gpu.save(report, tmp_path / "results/none.json")
    assert json.loads((tmp_path / "results/none.json").read_text())["rows"][0]["median_us"] > 0
    assert "no_such_op: LookupError" in (tmp_path / "results/none.md").read_text()


def test_no_time_left(monkeypatch):
    monkeypatch.setattr(gpu, "SECONDS", -1.0)
    assert gpu.run(["int8_linear"], CPU, small=True)["errors"] == {"int8_linear": "not begun: no time left"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 1
    assert "no GPU is visible" in capsys.readouterr().err

"""The code of `make bench-gpu`, tried out on the CPU over small shapes, and its processes replaced by tiny ones."""

import json
import math
import sys
import time

import pytest
import torch

from engine.bench import gpu, gpu_cases, gpu_checks, gpu_worker, peers
from engine.ops._library import REFERENCES

CPU = torch.device("cpu")
ROW = {
    "op": "int8_linear", "case": "it", "median_us": 1.0, "gbps": 1.0, "gops": 0.0, "fraction_of_limit": 0.5,
    "times_as_fast_as": {"clone": 2.0}, "goals": {"clone": {"goal": 3.0, "met": False}}, "eager": ["clone"],
}  # fmt: skip


@pytest.mark.parametrize("op", sorted(gpu_checks.CHECKS))
def test_checks_pass(op, monkeypatch):
    monkeypatch.setattr(gpu_checks, "SHAPES", [(5, 19, 65)])
    checked, of = gpu_checks.check(op, CPU)
    assert checked == of > 0
    assert gpu_checks.check(op, CPU, seconds=-1.0) == (0, of)


def test_checks_can_fail(monkeypatch):
    monkeypatch.setitem(REFERENCES, "int8_quantize", lambda x: (torch.zeros_like(x, dtype=torch.int8), x[:, 0].float()))
    monkeypatch.setitem(REFERENCES, "ring_encode", lambda *args: None)
    for op in ("int8_quantize", "ring_encode"):
        with pytest.raises(AssertionError, match=rf"{op} of .* is not equal to its reference to the bit"):
            gpu_checks.check(op, CPU)
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with pytest.raises(AssertionError, match="error"):
        gpu_checks._check_product("it", x @ weight.t() + 0.01, x, weight, None)


def test_every_op_with_a_kernel_has_a_section():
    from test_backends import OWNERS

    assert OWNERS["CUDA"] <= gpu_checks.CHECKS.keys()
    within_others = {"bitmap_gather", "int8_scaled_mm", "magnitude_threshold_of_list"}
    assert OWNERS["CUDA"] - gpu_cases.CASES.keys() <= within_others


@pytest.mark.parametrize(
    "ops", [["int8_quantize", "prune_to_bitmap"], pytest.param([*gpu_cases.CASES], marks=pytest.mark.slow)]
)
def test_worker_checks_and_times(ops, monkeypatch):
    monkeypatch.setattr(gpu_worker, "CALLS_PER_ROUND", 1e-4)
    monkeypatch.setattr(gpu_cases, "BEYOND", 1 << 20)
    monkeypatch.setattr(gpu_checks, "SHAPES", [(5, 19, 65)])
    said: list[dict] = []
    with torch.inference_mode():
        gpu_worker.check(ops[0], CPU, math.inf, said.append, small=True)
        assert said[0]["checked"] == said[0]["of"]
        gpu_worker.check("no_such_op", CPU, math.inf, said.append)
        assert "LookupError" in said.pop()["error"]
        gpu_worker.time_ops(ops, CPU, said.append, small=True)
    assert [m["ends"] for m in said if "ends" in m] == ops
    rows = [m["row"] for m in said if "row" in m]
    assert {row["op"] for row in rows} == set(ops) and all(row["median_us"] > 0 for row in rows)
    assert all(gpu.line(row) for row in rows) and json.loads(json.dumps(rows)) == rows


def workers(monkeypatch, program):
    """Makes `program` the worker: its arguments are in `a`, and `say` writes a line."""
    start = "import json, sys, time; a = sys.argv[1:]; say = lambda **m: print(json.dumps(m), flush=True)\n"
    monkeypatch.setattr(gpu, "worker", lambda *arguments: [sys.executable, "-c", start + program, *arguments])


def timed(ops, seconds=60.0):
    report = {"rows": [], "errors": {}}
    kept: list[int] = []
    gpu.time_all(ops, report, time.monotonic() + seconds, lambda: kept.append(len(report["rows"])))
    return report, kept


def test_what_goes_wrong_in_one_op_loses_no_other(monkeypatch):
    monkeypatch.setattr(gpu, "STALL_SECONDS", 1.0)
    workers(
        monkeypatch,
        f"""
print("what a library has to say")
say(limits=dict(copy_gbps=1))
for op in a[1:]:
    say(begins=op)
    if op == "wrong": say(error="ValueError: it"); break
    if op == "dies": sys.exit(7)
    if op == "hangs": time.sleep(100)
    say(row={{**{ROW!r}, "op": op}})
    say(ends=op)
""",
    )
    report, kept = timed(["a", "wrong", "b", "dies", "hangs", "c"])
    assert [row["op"] for row in report["rows"]] == ["a", "b", "c"] and max(kept) == 3
    assert report["errors"] == {
        "wrong": "ValueError: it", "dies": "the process ended with 7", "hangs": "stopped: it hangs",
    }  # fmt: skip
    assert report["limits"] == {"copy_gbps": 1}


def test_a_worker_that_never_begins_ends_it_and_so_does_the_clock(monkeypatch):
    workers(monkeypatch, "sys.exit(3)")
    assert timed(["a", "b"])[0]["errors"] == {"a": "the process ended with 3", "b": "the process ended with 3"}
    workers(monkeypatch, "say(begins=a[1]); time.sleep(100)")
    assert timed(["a", "b"], 0.5)[0]["errors"] == {"a": "stopped: no time left", "b": "not timed: no time left"}
    assert timed(["a"], -1.0)[0]["errors"] == {"a": "not timed: no time left"}


def test_only_what_was_checked_is_timed(monkeypatch, capsys):
    workers(
        monkeypatch,
        """
op = a[2]
if op == "wrong": say(error="AssertionError: it")
elif op == "dies": sys.exit(7)
else: say(checked=3, of=4)
""",
    )
    report = {"checked": {}, "errors": {}}
    assert gpu.check_all(["b", "wrong", "dies", "a"], report, time.monotonic() + 60) == ["b", "a"]
    assert report["errors"] == {"wrong": "AssertionError: it", "dies": "the process ended with 7"}
    assert report["checked"]["a"] == {"checked": 3, "of": 4}
    assert gpu.check_one("a", time.monotonic()) == {"error": "not checked: no time left"}


def test_results_are_written_as_tables_too(tmp_path):
    assert "2.00× clone, eager (misses 3.00)" in gpu.line(ROW)
    report = {"device": "none", **gpu.describe(CPU), "rows": [ROW], "errors": {"x": "it"}}
    gpu.save(report, tmp_path / "results/none.json")
    assert json.loads((tmp_path / "results/none.json").read_text())["rows"] == [ROW]
    assert "x: it" in (tmp_path / "results/none.md").read_text()


def test_a_peer_that_is_left_out_is_named(monkeypatch, capsys):
    peers.say_absent.cache_clear()
    for package in ("torchao.quantization", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", None)
    x = torch.randn(4, 32)
    assert not {**gpu_cases._torchao(32, CPU, x), **gpu_cases._bitsandbytes(32, CPU, x)}
    assert not gpu_cases._cusparselt(x, torch.randn(32, 32), int8=True)
    said = capsys.readouterr().err
    assert all(f"(without {name}: " in said for name in ("torchao int8 weight", "bitsandbytes", "cuSPARSELt"))


def test_all_of_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "describe", lambda device: {"device": "Some GPU (1)", "date": "today"})
    monkeypatch.setattr(gpu, "owned_ops", lambda: ["int8_linear", "bitmap_gather", "prune_to_csr"])
    workers(
        monkeypatch,
        f"""
if a[0] == "check": say(**(dict(error="wrong") if a[2] == "prune_to_csr" else dict(checked=1, of=1)))
else:
    for op in a[1:]: say(begins=op); say(row={ROW!r}); say(ends=op)
""",
    )
    ops = ["int8_linear", "prune_to_csr", "bitmap_gather", "csr_linear"]
    assert gpu.main(["--only", *ops, "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "some-gpu-1.json").read_text())
    assert report["errors"] == {"csr_linear": "no kernel for CUDA is loaded", "prune_to_csr": "wrong"}
    assert report["rows"] == [ROW] and set(report["checked"]) == {"int8_linear", "bitmap_gather"}
    assert gpu.main(["--only", "int8_linear"]) == 0
    assert gpu.main(["--only", "int8_liner"]) == 1
    assert "there are int8_linear, bitmap_int8_linear" in capsys.readouterr().err


def test_the_command_starts_itself():
    assert gpu.worker("check", "1", "x")[-4:] == ["--worker", "check", "1", "x"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 1
    assert "no GPU is visible" in capsys.readouterr().err

"""The benchmark harness: its timer, its limits, its output. What it measures decides no test."""

import dataclasses
import importlib
import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

from engine import backends, ops
from engine.bench import OPS, common, peer_models, plot, run, tables
from engine.bench.common import Row, Timing
from engine.bench.limits import Limits, measure_limits
from engine.bench.peers import int8_linears
from engine.cli import app
from engine.ops._library import REFERENCES

LIMITS = Limits(read_gbps=10, copy_gbps=5, cache_gbps=100, fp32_gops=50, bf16_gops=0, int8_gops=200, int8_by="vpdpbusd")
needs_native = pytest.mark.skipif(not backends.cpu_variants(), reason="needs the native libraries")


def test_every_public_op_has_a_benchmark():
    public = {name for name in vars(ops) if not name.startswith("_") and name in REFERENCES}
    codec = {"ring_encode", "ring_prune_encode", "ring_decode"}  # one file, as they are one thing
    public = public - codec | {"ring_codec"} if codec <= public else public
    assert len(public) >= 14 and public <= set(OPS)


def test_timer_interleaves_and_rotates():
    calls = []
    functions = {name: lambda i, name=name: calls.append((name, i)) for name in "abc"}
    timings = common.time_interleaved(functions, 20)
    assert calls[:3] == [("a", 0), ("b", 0), ("c", 0)]  # a warm-up of each first
    rounds = [calls[i : i + 3] for i in range(3, 63, 3)]
    assert [sorted(one) for one in rounds] == [[(name, i) for name in "abc"] for i in range(20)]
    followed = {(first, second) for one in rounds for (first, _), (second, _) in itertools.pairwise(one)}
    assert len(followed) == 6  # everyone behind everyone else
    assert all(0 < t.p10 <= t.median <= t.p90 for t in timings.values())
    assert common.copies(1 << 20, 3 << 20) == 3 and common.copies(4 << 20, 3 << 20) == common.copies(0) == 1


@pytest.mark.parametrize(
    "row, seconds",
    [
        (Row("", {}, 10**10), 1.0),
        (Row("", {}, 10**10, traffic="copy"), 2.0),
        (Row("", {}, 10**10, traffic="cache"), 0.1),
        (Row("", {}, 10**9, 4 * 10**11), 2.0),
        (Row("", {}, 10**9, 4 * 10**11, "fp32"), 8.0),
    ],
)
def test_floor(row, seconds):
    assert row.floor(LIMITS) == pytest.approx(seconds)


@needs_native
def test_limits_are_measured():
    limits = measure_limits()
    assert limits.read_gbps > 0.5 and limits.copy_gbps > 0.5 and limits.cache_gbps > limits.read_gbps / 4
    if backends.cpu_variant() != "portable":
        assert limits.fp32_gops > 1 and limits.int8_gops > limits.fp32_gops and limits.int8_by
    assert "GB/s" in str(limits) and measure_limits() is limits


def test_peers_compute_the_same_task():
    linear, x = torch.nn.Linear(128, 64), torch.randn(16, 128)
    with torch.inference_mode():
        peers = int8_linears(linear, 16)
        assert "_int_mm" in peers
        for name, peer in peers.items():
            expected = linear(x) - (linear.bias if name == "_weight_int8pack_mm" else 0)
            assert (peer(x) - expected).norm() < 0.1 * expected.norm(), name


def test_whole_models_compute_the_same_task(monkeypatch, capsys):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = torch.nn.Linear(64, 32)

        def forward(self, x):
            return (self.dense(x),)

    def fail(model, inputs):
        raise RuntimeError("no compiler\nat all")

    for slow in ("_compiled", "_torchao_compiled", "_onnxruntime"):
        monkeypatch.setattr(peer_models, slow, fail)
    model, inputs = Model(), {"x": torch.randn(16, 64)}
    with torch.no_grad():
        peers = peer_models.models(model, inputs)
        assert any(name.startswith("torch.ao") for name in peers) and "fp32 compiled" not in peers
        for name, peer in peers.items():
            expected = model(**inputs)[0]
            assert (peer() - expected).norm() < 0.1 * expected.norm(), name
    assert "without fp32 compiled: RuntimeError: no compiler)" in capsys.readouterr().err


@needs_native
def test_run_prints_and_saves(monkeypatch, tmp_path, capsys):
    def main():
        timings = {"engine": Timing(1e-3, 2e-3, 3e-3), "clone": Timing(3e-3, 4e-3, 5e-3)}
        rows = [Row("8x8", timings, 2 * 10**7), Row("16x16", timings, 10**7, 10**6, traffic="copy")]
        rows += [
            Row(f"M 1, 8x8, {s:.0%}", {**timings, "fp32": timings["clone"]}, 10**7, 8, sparsity=s) for s in (0.5, 0.7)
        ]
        rows[0] = dataclasses.replace(rows[0], errors={"engine": 0.01, "clone": 0.02})
        common.print_rows("int8_quantize", rows, "engine", "a note")

    monkeypatch.setattr(importlib.import_module("engine.bench.bench_int8_quantize"), "main", main)
    monkeypatch.setattr(common, "RESULTS", [])
    monkeypatch.setattr(common, "measure_limits", lambda: LIMITS)
    run.run(["int8_quantize"], tmp_path / "rows.json", tmp_path / "rows.png")
    text = capsys.readouterr().out
    assert "2000.0 µs [1000, 3000]" in text and "100% of limit" in text
    assert "2.00x clone error 2.0%\n" in text and "2.00x clone\n" in text
    assert "geometric mean over 4 shapes:   2.00x clone" in text
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert saved["torch"] == torch.__version__ and saved["limits"]["read_gbps"] > 0
    first = saved["rows"][0]
    assert first["case"] == "8x8" and first["fraction_of_limit"] == 1 and first["timings"]["clone"]["median"] == 4e-3
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    model = {
        **first,
        "op": "minilm",
        "own": "engine",
        "timings": {**first["timings"], "fp32": first["timings"]["clone"]},
    }
    plot.save_plot([model], saved["limits"], tmp_path / "model.png")
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["int9_linear"], "no benchmark for 'int9_linear'"),
        (["int8_linear", "--json", "rows.txt"], "ending in .json"),
        (["int8_linear", "--plot", "no/such/rows.png"], "no such folder: no/such"),
    ],
)
def test_bad_arguments(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2 and message in result.output


def test_tables_hold_what_was_measured():
    def row(op, case, **medians):
        timings = {name: {"p10": 1e-6, "median": t * 1e-6, "p90": 9e-6} for name, t in medians.items()}
        return {"op": op, "note": "", "own": op, "fraction_of_limit": 0.5, "case": case, "timings": timings}

    limits = {"read_gbps": 30.0, "int8_gops": 900.0, "fp32_gops": 230.0}
    machine = {"processor": "P", "instruction_set": "avx2", "threads": 2, "torch": "2.13", "date": "2026-11-26"}
    rows = [
        row("bitmap_int8_linear", "M 1, 8192x8192, 50%", bitmap_int8_linear=4, int8_linear=3, a=8, b=6, fp32=40),
        row("int8_linear", "M 3, N 5, K 7", int8_linear=2, fp32=4),
    ]
    rows[0]["errors"] = {"bitmap_int8_linear": 0.01, "a": 0.03, "b": 0.02, "fp32": 0.0}
    results = {**machine, "limits": limits, "rows": rows}
    _, _, chosen, _, where = tables.chosen_rows(results)
    assert chosen == "| `bitmap_int8_linear`, M 1, 8192 × 8192, 50% | 4 | 50% | 1.50 (b, error 2.0%) | 10.0 |"
    assert "900 GOP/s" in where
    every = "\n".join(tables.every_row(results))
    assert "of the table: bitmap_int8_linear 1.0%, a 3.0%, b 2.0%." in every
    assert "| M 3, N 5, K 7 | 2 (1 to 9) | 50% | 2.00 |" in every and "| 0.75 | 2.00 | 1.50 | 10.00 |" in every

"""The benchmark harness: its timer, its limits, its output. What it measures decides no test."""

import dataclasses
import importlib
import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

from engine import backends, ops
from engine.bench import OPS, common, limits, peer_models, plot, run, tables
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
    found = measure_limits()
    assert found.read_gbps > 0.5 and found.copy_gbps > 0.5 and found.cache_gbps > found.read_gbps / 4
    if backends.cpu_variant() != "portable":
        assert found.fp32_gops > 1 and found.int8_gops > found.fp32_gops and found.int8_by
    assert "GB/s" in str(found) and measure_limits() is found


@needs_native
def test_limits_refuse_what_cannot_be_measured():
    native = importlib.import_module("engine._native")
    for bytes_, threads, seconds in ((0, 1, 0.01), (-1, 1, 0.01), (4096, 0, 0.01), (4096, -1, 0.01), (4096, 1, 0.0)):
        for measure in (native.read_gbps, native.copy_gbps):
            with pytest.raises(ValueError, match="expected"):
                measure(bytes_, threads, seconds)


def test_peers_compute_the_same_task():
    linear, x = torch.nn.Linear(128, 64), torch.randn(16, 128)
    with torch.inference_mode():
        peers = int8_linears(linear, 16)
        assert "_int_mm" in peers
        for name, peer in peers.items():
            expected = linear(x)
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
    monkeypatch.setattr(common, "limits_of_rows", lambda: LIMITS)
    run.run(["int8_quantize"], tmp_path / "rows.json", tmp_path / "rows.png")
    text = capsys.readouterr().out
    assert "2000.0 µs [1000, 3000]" in text and "100% of limit" in text
    assert "2.00x clone error 2.0%\n" in text and "2.00x clone\n" in text
    assert "geometric mean over 4 shapes:   2.00x clone" in text
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert saved["torch"] == torch.__version__ and saved["limits"]["read_gbps"] > 0
    first = saved["rows"][0]
    assert (
        first["case"] == "8x8"
        and first["fraction_of_limit"] == 1
        and first["limits"]["copy_gbps"] == 5
        and first["timings"]["clone"]["median"] == 4e-3
    )
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


def _row(op, case, fraction=0.5, **medians):
    timings = {name: {"p10": 1e-6, "median": t * 1e-6, "p90": 9e-6} for name, t in medians.items()}
    bound = {"moved": 2_000_000, "operations": 2_000_000, "traffic": "read", "arithmetic": "int8"}
    return {"op": op, "note": "", "own": op, "fraction_of_limit": fraction, "case": case, "timings": timings, **bound}


MACHINE = {
    **{"processor": "P", "instruction_set": "avx2", "threads": 2, "torch": "2.13", "date": "2026-11-26"},
    "limits": {"read_gbps": 30.0, "int8_gops": 900.0, "fp32_gops": 230.0},
}


def test_tables_hold_what_was_measured():
    rows = [
        _row("bitmap_int8_linear", "M 1, 8192x8192, 50%", bitmap_int8_linear=4, int8_linear=3, a=8, b=6, fp32=40),
        _row("int8_linear", "M 3, N 5, K 7", int8_linear=2, fp32=4),
    ]
    rows[0]["errors"] = {"bitmap_int8_linear": 0.01, "a": 0.03, "b": 0.02, "fp32": 0.0}
    every = "\n".join(tables.every_row({**MACHINE, "rows": rows}))
    assert "of the table: bitmap_int8_linear 1.0%, a 3.0%, b 2.0%." in every
    assert "| M 3, N 5, K 7 | 2 (1 to 9) | 50% | 2.00 |" in every and "| 0.75 | 2.00 | 1.50 | 10.00 |" in every


def test_summary_holds_every_shape():
    rows = [
        _row("bitmap_int8_linear", "M 1, 8x8, 50%", 1.2, bitmap_int8_linear=4, int8_linear=3, a=8, b=6, fp32=40),
        _row("bitmap_int8_linear", "M 1, 8x8, 70%", 0.8, bitmap_int8_linear=4, int8_linear=8, a=2, b=6, fp32=4),
        _row("bitmap_int8_linear", "M 1, 8x8, 80%", 0.3, bitmap_int8_linear=4, int8_linear=6, a=9, b=8, fp32=8),
        _row("bitmap_int8_linear", "M 64, 8x8, 80%", bitmap_int8_linear=4, int8_linear=2, b=4, fp32=4),
        _row("bitmap_int8_linear", "M 16, 8x8, 80%", bitmap_int8_linear=4, int8_linear=3, b=6, fp32=4),
        _row("int8_linear", "M 1, N 8, K 8", int8_linear=2, fp32=4),
        _row("minilm", "8 x 128 tokens", minilm=2, b=3, fp32=7),
        _row("int8_quantize", "8 x 8", int8_quantize=2, clone=1),
    ]
    rows[0]["errors"] = {"bitmap_int8_linear": 0.01, "a": 0.03, "b": 0.02, "fp32": 0.0}
    lines = tables.summary({**MACHINE, "rows": rows})
    assert [line for line in lines if line.startswith("| `")] == [
        "| `int8_linear` | 1 | 1 | 50% |  |  | 2.00 |",
        "| `bitmap_int8_linear` | 1 | 3 | 80% (30% to ≈100%) | 1.50 (0.75 to 2.00) | 1.50 (0.50 to 2.00) "
        "| 2.00 (1.00 to 10) |",
        "| `bitmap_int8_linear` | 16, 64 | 2 | 50% (50% to 50%) | 0.62 (0.50 to 0.75) | 1.25 (1.00 to 1.50) "
        "| 1.00 (1.00 to 1.00) |",
        "| `minilm` | 8 × 128 tokens | 1 | 50% |  | 1.50 | 3.50 |",
    ]
    assert "900 GOP/s" in lines[-1] and lines[-1].endswith("Fastest of others, by shape: a, b (error 2.0%).")


def test_no_row_is_a_fraction_above_the_limit():
    row = _row("int8_linear", "M 1, N 8, K 8", 1.234, int8_linear=50, fp32=4)
    assert "| 50 (1 to 9) | 40 GB/s | 0.08 |" in "\n".join(tables.every_row({**MACHINE, "rows": [row]}))
    measured_beside_it = {**MACHINE["limits"], "read_gbps": 1000.0}
    row = {**row, "operations": 10**8, "limits": measured_beside_it}
    assert "| 50 (1 to 9) | 2000 GOP/s | 0.08 |" in "\n".join(tables.every_row({**MACHINE, "rows": [row]}))
    assert not common.exceeds(1.004) and common.exceeds(1.01)


@needs_native
def test_limits_of_rows_are_the_best_of_start_before_and_after(monkeypatch):
    start = measure_limits()
    around = [(0.0, 1e9, 0.0), (2e9, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)]
    monkeypatch.setattr(limits, "_recent", {})
    monkeypatch.setattr(limits, "_bandwidths", lambda *how: around.pop(0))
    replaced = dataclasses.replace
    assert limits.limits_of_rows() == replaced(start, copy_gbps=1e9)
    assert limits.limits_of_rows() == replaced(start, read_gbps=2e9, copy_gbps=1e9)
    assert limits.limits_of_rows() == replaced(start, read_gbps=2e9)
    assert limits.limits_of_rows() == start

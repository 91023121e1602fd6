"""`make bench-gpu`: every op that has a kernel for CUDA, first checked, then timed beside its peers.

Results go to `bench/results/<device>.json` and, as a table, `.md` beside it. A section stands alone (`--only OP`), an
error in one is reported and doesn't lose the others, and those for which no time is left are said to be missing.

Calls are captured into CUDA graphs where they can be, so that what is measured is the device and not Python; the
buffers rotate beyond the L2 cache; peers take turns in one loop; the median counts.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from engine import backends
from engine.bench import gpu_cases, gpu_checks
from engine.bench.common import Timing
from engine.bench.gpu_cases import Case
from engine.ops._library import REFERENCES

RESULTS = Path(__file__).parent / "results"
SECONDS = 450.0  # for everything; what is not begun by then is left out
ROUNDS = 15
CALLS_PER_ROUND = 20e-3  # seconds that the calls of one function and round should take, at most 50 of them


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the card reaches at what each op is compared with."""

    copy_gbps: float
    int8_gops: float
    bf16_gops: float

    def seconds(self, case: Case) -> float:
        """The least that a case can take by them."""
        rate = {"int8": self.int8_gops, "bf16": self.bf16_gops}[case.arithmetic]
        return 1e-9 * max(case.moved / self.copy_gbps, case.operations / rate)


class Calls:
    """One function's calls, over its rotated buffers: as a CUDA graph, or one by one."""

    def __init__(self, function: Callable[[int], object], device: torch.device, capture: bool):
        self.function, self.device = function, device
        function(0)
        self.count = max(1, min(50, int(CALLS_PER_ROUND / max(1e-7, self._once()))))
        self.graph = self._captured() if capture and device.type == "cuda" else None
        self()

    def _once(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.function(1)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(self.count):
                self.function(i)
        return graph

    def _run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            for i in range(self.count):
                self.function(i)

    def __call__(self) -> float:
        """Seconds a call."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            self._run()
            return (time.perf_counter() - start) / self.count
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        self._run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.count


def measure(case: Case, device: torch.device) -> dict[str, Timing]:
    """Times a case's functions in turn. Our own must run as the case says.

    A peer that no graph can hold is timed call by call, and says so; one that fails is left out.
    """
    calls: dict[str, Calls] = {}
    for i, (name, function) in enumerate(case.functions.items()):
        if i == 0:
            calls[name] = Calls(function, device, case.capture)
            continue
        for capture in (True, False) if case.capture else (False,):
            try:
                calls[name if capture == case.capture else f"{name}, eager"] = Calls(function, device, capture)
                break
            except Exception as error:
                if not capture:
                    print(f"    (without {name}: {_first_line(error)})", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS if device.type == "cuda" else 2):
        for name, call in calls.items():
            times[name].append(call())
    return {name: _timing(seconds) for name, seconds in times.items()}


def _timing(seconds: list[float]) -> Timing:
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return Timing(tenths[0], statistics.median(seconds), tenths[-1])


def measure_limits(device: torch.device, small: bool) -> Limits:
    """A copy of a gibibyte, and PyTorch's own products of 8192³."""
    count, n = (1 << 12, 64) if small else (1 << 28, 8192)
    source, target = torch.empty(count, device=device).normal_(), torch.empty(count, device=device)
    q = torch.randint(-127, 128, (n, n), device=device, dtype=torch.int8)
    x = torch.randn(n, n, device=device).bfloat16()
    case = Case(
        "limits",
        {
            "copy": lambda i: target.copy_(source),
            "bf16": lambda i: x @ x.t(),
            "int8": lambda i: torch._int_mm(q, q.t()),
        },
        moved=8 * count,
    )
    timings = measure(case, device)
    operations = 2e-9 * n**3
    int8 = operations / timings["int8"].median if "int8" in timings else math.inf
    return Limits(8e-9 * count / timings["copy"].median, int8, operations / timings["bf16"].median)


def row(op: str, case: Case, timings: dict[str, Timing], limits: Limits) -> dict:
    """What is kept of a case."""
    own = next(iter(case.functions))
    mine = timings[own].median
    peers = {name: t.median / mine for name, t in timings.items() if name != own}
    return {
        "op": op,
        "case": case.words,
        "median_us": mine * 1e6,
        "p10_us": timings[own].p10 * 1e6,
        "p90_us": timings[own].p90 * 1e6,
        "gbps": case.moved / mine / 1e9,
        "gops": case.operations / mine / 1e9,
        "fraction_of_limit": limits.seconds(case) / mine,
        "times_as_fast_as": peers,
        "goals": {
            name: {"goal": goal, "met": peers[name] >= goal} for name, goal in case.goals.items() if name in peers
        },
        "timed": "graph" if case.capture else "eager, with the host's wait for the size",
    }


def line(result: dict) -> str:
    """One row as text."""
    by_bytes = result["gops"] < 1000 or result["gbps"] > result["gops"]
    speed = f"{result['gbps']:7.0f} GB/s " if by_bytes else f"{result['gops'] / 1000:7.1f} TOP/s"
    peers = []
    for name, ratio in result["times_as_fast_as"].items():
        goal = result["goals"].get(name)
        verdict = "" if goal is None else f" ({'meets' if goal['met'] else 'misses'} {goal['goal']:.2f})"
        peers.append(f"{ratio:.2f}× {name}{verdict}")
    fraction = f"{result['fraction_of_limit']:4.0%} of limit"
    return f"{result['case']:<36} {result['median_us']:10.1f} µs  {speed} {fraction}  {', '.join(peers)}"


def owned_ops() -> list[str]:
    """The ops that have a kernel for CUDA."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return sorted(name for name in REFERENCES if has(f"engine::{name}", "CUDA"))


def run(ops: list[str], device: torch.device, small: bool = False) -> dict:
    """Checks and times `ops`. Returns what was measured, and what went wrong."""
    began = time.monotonic()
    limits = measure_limits(device, small)
    print(
        f"copy {limits.copy_gbps:.0f} GB/s, int8 {limits.int8_gops / 1e3:.1f} TOP/s, bf16 {limits.bf16_gops / 1e3:.1f}"
    )
    report: dict = {"limits": dataclasses.asdict(limits), "checked": {}, "rows": [], "errors": {}}
    for op in ops:
        print(f"\n{op}", flush=True)
        if time.monotonic() - began > SECONDS:
            report["errors"][op] = "not begun: no time left"
            print("  not begun: no time left")
            continue
        try:
            report["checked"][op] = gpu_checks.check(op, device)
            print(f"  {report['checked'][op]} inputs checked against the reference in float64")
            for case in gpu_cases.cases(op, device, small):
                result = row(op, case, measure(case, device), limits)
                report["rows"].append(result)
                print(f"  {line(result)}", flush=True)
        except Exception as error:
            traceback.print_exc()
            report["errors"][op] = _first_line(error)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report["seconds"] = round(time.monotonic() - began, 1)
    return report


def describe(device: torch.device) -> dict[str, object]:
    """What the numbers hold for."""
    versions: dict[str, object] = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    versions["python"] = sys.version.split()[0]
    for package in ("triton", "torchao", "bitsandbytes"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if device.type == "cuda":
        versions["device"] = torch.cuda.get_device_name(device)
        versions["cuda"] = torch.version.cuda
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
        try:
            versions["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            versions["driver"] = None
    versions["backends"] = {s.name: s.detail for s in backends.status()}
    return versions


def save(report: dict, path: Path) -> None:
    """Writes `path` (.json) and the same as a table (.md)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"# {report['device']}, {report['date']}",
        "",
        "| op | case | µs | of limit | times as fast as |",
        "|" + "---|" * 5,
    ]
    for r in report["rows"]:
        peers = ", ".join(f"{ratio:.2f} {name}" for name, ratio in r["times_as_fast_as"].items())
        lines.append(f"| {r['op']} | {r['case']} | {r['median_us']:.1f} | {r['fraction_of_limit']:.0%} | {peers} |")
    lines += [f"\n{op}: {error}" for op, error in report["errors"].items()]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status: 1 if anything was wrong or missing."""
    parser = argparse.ArgumentParser(prog="bench-gpu", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", metavar="OP", help="these sections alone; the file of results is not written"
    )
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench-gpu: no GPU is visible to torch", file=sys.stderr)
        return 1
    device, owned = torch.device("cuda"), owned_ops()
    expected = sorted({*owned, *gpu_checks.CHECKS})
    unknown = set(given.only or ()) - set(expected)
    if unknown:
        print(f"bench-gpu: no such op: {', '.join(sorted(unknown))}; there are {', '.join(expected)}", file=sys.stderr)
        return 1
    ops = given.only or expected
    torch.manual_seed(0)
    with torch.inference_mode():
        report = {**describe(device), **run([op for op in ops if op in owned], device)}
    report["errors"].update({op: "no kernel for CUDA is loaded" for op in ops if op not in owned})
    if not given.only:
        path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', report['device'].lower()).strip('-')}.json"
        save(report, path)
        print(f"\n{path}")
    for op, error in report["errors"].items():
        print(f"{op}: {error}", file=sys.stderr)
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""The processes of `make bench-gpu`: one checks an op, one times several. Each writes a JSON object a line.

What goes wrong on a GPU may leave the process without one, and a compiler may hang. So nothing here decides what
happens next: `engine.bench.gpu` does, which reads the lines and has no work of its own on the card.
"""

import dataclasses
import json
import math
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable

import torch

from engine.bench import gpu_cases, gpu_checks
from engine.bench.common import Timing
from engine.bench.gpu_cases import Case
from engine.bench.peers import first_line, say_absent

ROUNDS = 15
CALLS_PER_ROUND = 20e-3  # seconds that the calls of one function and round should take, at most 50 of them
Emit = Callable[[dict], None]


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
    """Times a case's functions once a round, each round in an order of its own. Our own must run as the case says.

    A peer is captured where ours is, unless the case says that no graph can hold it; one that fails is left out. A
    capture that fails would leave PyTorch's allocator in the middle of it, so that none is tried on the chance.
    """
    calls: dict[str, Calls] = {}
    for i, (name, function) in enumerate(case.functions.items()):
        capture = case.capture and name not in case.eager
        if i == 0:
            calls[name] = Calls(function, device, capture)
            continue
        try:
            calls[name] = Calls(function, device, capture)
        except Exception as error:
            say_absent(name, first_line(error))
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle  # so that none always follows the same other
    for _ in range(ROUNDS if device.type == "cuda" else 2):
        shuffle(order)
        for name in order:
            times[name].append(calls[name]())
    return {name: _timing(seconds) for name, seconds in times.items()}


def _timing(seconds: list[float]) -> Timing:
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return Timing(tenths[0], statistics.median(seconds), tenths[-1])


def measure_limits(device: torch.device, small: bool) -> Limits:
    """A gibibyte read and written, and PyTorch's own products of 8192³; the 8-bit one that is faster.

    Not by `copy_`, which for contiguous tensors is the driver's copy: on an H200 two thirds as fast as a kernel's.
    """
    count, n = (1 << 12, 64) if small else (1 << 28, 8192)
    source, target = torch.empty(count, device=device).normal_(), torch.empty(count, device=device)
    q = torch.randint(-127, 128, (n, n), device=device, dtype=torch.int8)
    x, one = torch.randn(n, n, device=device).bfloat16(), torch.ones((), device=device)
    fp8 = x.to(torch.float8_e4m3fn)
    case = Case(
        "limits",
        {
            "copy": lambda i: torch.neg(source, out=target),
            "bf16": lambda i: x @ x.t(),
            "int8": lambda i: torch._int_mm(q, q.t()),
            "fp8": lambda i: torch._scaled_mm(fp8, fp8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
        },
        moved=8 * count,
    )
    timings = measure(case, device)
    operations = 2e-9 * n**3
    eight_bit = [timings[name].median for name in ("int8", "fp8") if name in timings]
    rate = operations / min(eight_bit) if eight_bit else math.inf
    return Limits(8e-9 * count / timings["copy"].median, rate, operations / timings["bf16"].median)


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
        "eager": sorted(case.eager & peers.keys()),
        "timed": "graph" if case.capture else "eager, with the host's wait for the size",
    }


def check(op: str, device: torch.device, seconds: float, emit: Emit, small: bool = False) -> None:
    """Checks one op, for at most `seconds`, and calls what is to be timed once, so that it is compiled by then."""
    began = time.monotonic()
    try:
        checked, of = gpu_checks.check(op, device, seconds)
        emit({"checked": checked, "of": of})
    except Exception as error:
        traceback.print_exc()
        emit({"error": first_line(error)})
        return
    for case in gpu_cases.cases(op, device, small):
        if time.monotonic() - began > seconds:
            break
        next(iter(case.functions.values()))(0)


def time_ops(ops: list[str], device: torch.device, emit: Emit, small: bool = False) -> None:
    """Times ops one after another; ends with the first in which something goes wrong."""
    limits = measure_limits(device, small)
    emit({"limits": dataclasses.asdict(limits)})
    for op in ops:
        emit({"begins": op})
        try:
            for case in gpu_cases.cases(op, device, small):
                emit({"row": row(op, case, measure(case, device), limits)})
        except Exception as error:
            traceback.print_exc()
            emit({"error": first_line(error)})
            return
        if device.type == "cuda":
            torch.cuda.empty_cache()
        emit({"ends": op})


def main(arguments: list[str]) -> int:
    """`check SECONDS OP` or `time OP...`."""
    lines = sys.stdout
    sys.stdout = sys.stderr  # of what others print

    def emit(message: dict) -> None:
        print(json.dumps(message), file=lines, flush=True)

    torch.manual_seed(0)
    with torch.inference_mode():
        if arguments[0] == "check":
            torch.set_num_threads(2)  # many run at once
            check(arguments[2], torch.device("cuda"), float(arguments[1]), emit)
        else:
            time_ops(arguments[1:], torch.device("cuda"), emit)
    return 0

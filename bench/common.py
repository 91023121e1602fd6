"""One timer and one printer for every benchmark: peers in shuffled order, buffers rotated, limits measured."""

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from engine.bench.limits import Limits, limits_of_rows


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call: the fastest tenth, the median, the slowest tenth."""

    p10: float
    median: float
    p90: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One shape of one op: every peer's timing, and what the machine's limits say it must cost at least.

    Attributes:
        case: the shape in words.
        timings: by name, our own among them.
        moved: bytes that have to be read and written.
        operations: multiplications and additions, 0 where only the bytes matter.
        arithmetic: whose rate bounds them: "int8", "fp32", or "bf16" (fp32's where bfloat16 has none).
        traffic: whose bandwidth bounds the bytes: "read", "copy" (reads and writes), or "cache" (weights that
            stay in it).
        sparsity: of the weight, where the op is measured over several.
        errors: by name, relative to the same product in float64; where peers compute with fewer bits than others.
    """

    case: str
    timings: dict[str, Timing]
    moved: int
    operations: int = 0
    arithmetic: str = "int8"
    traffic: str = "read"
    sparsity: float | None = None
    errors: dict[str, float] | None = None

    def floor(self, limits: Limits) -> float:
        """Seconds that this machine needs at least."""
        bandwidth = {"read": limits.read_gbps, "copy": limits.copy_gbps, "cache": limits.cache_gbps}[self.traffic]
        bf16 = limits.bf16_gops or limits.fp32_gops
        rate = {"int8": limits.int8_gops, "fp32": limits.fp32_gops, "bf16": bf16}[self.arithmetic]
        return 1e-9 * max(self.moved / bandwidth, self.operations / rate if rate else 0.0)


RESULTS: list[dict] = []  # every row printed in this process, for --json and --plot


def time_interleaved(functions: dict[str, Callable[[int], object]], repeats: int = 15) -> dict[str, Timing]:
    """Times every function once a round, so that noise falls on all of them alike, each round in an order of its own.

    In one order for all rounds each function would always follow the same other, with the caches, the allocator and
    the awake or sleeping threads as that one leaves them: the same code came out 1.2 times apart by its neighbour.
    Orders are drawn from a fixed seed, so that a run can be repeated. Each function is called with the round's number,
    by which it picks one of its rotated buffers.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function(0)
    order, shuffle = list(functions), random.Random(0).shuffle
    for i in range(max(2, repeats)):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            functions[name](i)
            times[name].append(time.perf_counter() - start)
    return {name: _timing(seconds) for name, seconds in times.items()}


def relative_errors(functions: dict[str, Callable[[int], torch.Tensor]], want: torch.Tensor) -> dict[str, float]:
    """The Frobenius norm of what each function is wrong by, in round 0, relative to that of `want` (float64)."""
    return {name: ((function(0).double() - want).norm() / want.norm()).item() for name, function in functions.items()}


def coarse(errors: dict[str, float] | None, name: str, own: str) -> str:
    """Says how wrong a peer is where that is half as large again as our own error, as it computes with fewer bits."""
    if not errors or errors.get(name, 0.0) < 1.5 * errors[own]:
        return ""
    return f"error {errors[name]:.1%}"


def _timing(seconds: list[float]) -> Timing:
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return Timing(tenths[0], statistics.median(seconds), tenths[-1])


def rotated(make: Callable[[], object], bytes_each: int, beyond: int = 256 << 20) -> list:
    """As many copies of `make()` as are needed to be larger than any cache together, at least one."""
    return [make() for _ in range(copies(bytes_each, beyond))]


def copies(bytes_each: int, beyond: int = 256 << 20) -> int:
    """How many buffers of `bytes_each` are larger than any cache together."""
    return -(-beyond // max(1, bytes_each)) if 0 < bytes_each < beyond else 1


def exceeds(fraction: float) -> bool:
    """Whether a fraction of the limit shows that the limit was measured too low: it is no fraction of anything then."""
    return round(fraction, 2) > 1


def print_rows(op: str, rows: Sequence[Row], own: str, note: str = "") -> None:
    """Prints a line a shape: our median and its spread, GB/s or GOP/s, the fraction of the machine's limit, and how
    many times as fast as each peer we are; then the geometric means over the shapes. To be called at once after the
    rows are measured, as the machine's bandwidth is measured once more here.
    """
    limits = limits_of_rows()
    print(f"\n{op}{f', {note}' if note else ''}  ({torch.get_num_threads()} threads; {limits})")
    ratios: dict[str, list[float]] = {}
    for row in rows:
        mine, others = row.timings[own], {name: t for name, t in row.timings.items() if name != own}
        fraction = row.floor(limits) / mine.median
        for name, timing in others.items():
            ratios.setdefault(name, []).append(timing.median / mine.median)
        speed = f"{row.moved / mine.median / 1e9:7.1f} GB/s"
        if row.operations / (limits.int8_gops or math.inf) > row.moved / limits.read_gbps:
            speed = f"{row.operations / mine.median / 1e9:7.1f} GOP/s"
        peers = "  ".join(
            f"{timing.median / mine.median:6.2f}x {name} {coarse(row.errors, name, own)}".rstrip()
            for name, timing in others.items()
        )
        spread = f"[{mine.p10 * 1e6:.0f}, {mine.p90 * 1e6:.0f}]"
        of_limit = "above the limit measured" if exceeds(fraction) else f"{fraction:4.0%} of limit"
        print(f"  {row.case:<32} {mine.median * 1e6:10.1f} µs {spread:<16} {speed} {of_limit}  {peers}")
        about = {
            "op": op,
            "note": note,
            "own": own,
            "fraction_of_limit": fraction,
            "limits": dataclasses.asdict(limits),
        }
        RESULTS.append({**about, **dataclasses.asdict(row)})
    if len(rows) > 1:
        means = "  ".join(f"{math.exp(statistics.fmean(map(math.log, r))):6.2f}x {n}" for n, r in ratios.items())
        print(f"  geometric mean over {len(rows)} shapes: {means}")

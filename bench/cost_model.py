"""What an all-reduce costs on machines that are not at hand: a model, fitted to measured points, and a table.

    python -m engine.bench.cost_model                        # measures here, fits, checks, prints the table
    python -m engine.bench.cost_model --save points.json     # keeps the points
    python -m engine.bench.cost_model --points points.json --gbps 25 --local 8

A few costs describe a machine: of a message, of a byte through shared memory, through a socket and through a codec. How
often each occurs follows from the algorithm, the size and the number of ranks. The costs are fitted to every other
measured size, and the sizes between, which the fit has not seen, say how far the model is to be trusted.
"""

import argparse
import dataclasses
import functools
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

SIZES = [1 << shift for shift in range(12, 25)]  # bytes of float32, 4 KiB to 16 MiB
WINDOW = 1 << 20  # bytes of a piece that is sent at a time, at most
# Bytes on the wire for a byte of float32. int8: a float32 scale for 256 elements. bitmap: 1/64 byte an element for the
# mask of groups, and room for 1.25 times the hundredth that is sent, of 3 bytes each.
WIRE_RATIO = {None: 1.0, "bf16": 0.5, "int8": (1 + 4 / 256) / 4, "bitmap": (1 / 64 + 3.75 * 0.01) / 4}
RANKS = (2, 8, 64, 512, 4096)  # of the table


@dataclasses.dataclass(frozen=True)
class Case:
    """One all-reduce of `size` bytes of float32 over `hosts` hosts with `local` ranks each.

    `way` is "memory" (one host), "gloo" (torch's own, flat) or "engine" (between hosts, with `codec`).
    """

    way: str
    size: int
    hosts: int
    local: int = 1
    codec: str | None = None

    @property
    def ranks(self) -> int:
        """Of all hosts together."""
        return self.hosts * self.local


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured case: seconds, the slowest rank's median; and how many cores the ranks of a host had."""

    case: Case
    seconds: float
    cores: int


Work = dict[str, float]  # how often each cost occurs, by its name


def memory_work(size: float, local: int, cores: int) -> Work:
    """Through shared memory among `local` ranks: each waits for each, and copies or adds 2 (p - 1) / p of the tensor.

    Ranks that share a core take turns.
    """
    crowd = max(1.0, local / cores)
    return {"memory.wait": crowd * (local - 1), "memory.byte": crowd * 2 * (local - 1) / local * size}


def ring_work(way: str, size: float, ranks: int, codec: str | None) -> Work:
    """Between `ranks` processes, without the wire: 2 (p - 1) messages and as many p-ths of the tensor, in and out."""
    messages = 2 * (ranks - 1) * max(1, math.ceil(size / ranks / WINDOW))
    moved = 2 * (ranks - 1) / ranks * size
    work = {f"{way}.message": messages, f"{way}.byte": moved * WIRE_RATIO[codec]}
    if codec is not None:
        work[f"{codec}.byte"] = moved
    return work


def work_of(case: Case, cores: int) -> Work:
    """All that the ranks' processors do, the slowest one's share of it.

    A hierarchical all-reduce adds up inside each host first, then every rank carries its share between the hosts, then
    they collect: twice through memory.
    """
    if case.way == "memory":
        return memory_work(case.size, case.local, cores)
    if case.way == "gloo" or case.local == 1:
        crowd = max(1.0, case.local / cores)
        return {name: crowd * n for name, n in ring_work(case.way, case.size, case.ranks, case.codec).items()}
    inside = {name: 2 * n for name, n in memory_work(case.size, case.local, cores).items()}
    return {**inside, **ring_work(case.way, case.size / case.local, case.hosts, case.codec)}


def wire_bytes(case: Case) -> float:
    """What each host's link carries each way: a flat ring in order of ranks crosses it once, whatever `local` is."""
    parts = case.hosts if case.way == "engine" else case.ranks
    return 2 * (parts - 1) / parts * case.size * WIRE_RATIO[case.codec] if case.hosts > 1 else 0.0


def seconds(case: Case, costs: Mapping[str, float], cores: int, wire_rate: float = math.inf) -> float:
    """The model: the wire runs beside the processors, messages and waits beside neither.

    `wire_rate` is in bytes a second; without one the processors carry the bytes themselves, as between two processes of
    a host.
    """
    latency = busy = 0.0
    for name, count in work_of(case, cores).items():
        if name.endswith(".byte"):
            busy += count * costs[name]
        else:
            latency += count * costs[name]
    return latency + max(busy, wire_bytes(case) / wire_rate)


def fit(points: Iterable[Point]) -> dict[str, float]:
    """The costs, none below 0, by which the sum of squared relative errors of the points is least."""
    points = list(points)
    works = [work_of(point.case, point.cores) for point in points]
    names = sorted({name for work in works for name in work})
    rows = np.array(
        [[work.get(name, 0.0) / p.seconds for name in names] for work, p in zip(works, points, strict=True)]
    )
    size = np.linalg.norm(rows, axis=0)  # costs of a byte and of a message differ by five powers of ten
    rows, left = rows / size, list(range(len(names)))
    while left:  # what comes out negative is nothing that these points show: without it, again
        found = np.linalg.lstsq(rows[:, left], np.ones(len(points)), rcond=None)[0]
        if (found >= 0).all():
            break
        left = [column for column, cost in zip(left, found, strict=True) if cost > 0]
    costs = dict.fromkeys(names, 0.0)
    return costs | {names[column]: cost / size[column] for column, cost in zip(left, found.tolist(), strict=True)}


def errors(points: Iterable[Point], costs: Mapping[str, float]) -> list[tuple[Point, float]]:
    """The model's relative error at each point."""
    return [(point, seconds(point.case, costs, point.cores) / point.seconds - 1) for point in points]


def split(points: Iterable[Point]) -> tuple[list[Point], list[Point]]:
    """Every other size to fit, the sizes between to check."""
    points = list(points)
    sizes = sorted({point.case.size for point in points})
    fitted = set(sizes[::2])
    return [p for p in points if p.case.size in fitted], [p for p in points if p.case.size not in fitted]


# Measuring


def measure(world_size: int) -> list[Point]:
    """Points of this machine, from processes of it: first as ranks of one host, then each as a host of its own."""
    points: list[Point] = []
    for shared in "10":
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--rank-of", str(world_size), folder]
            environment = {**os.environ, "ENGINE_SHARED_MEMORY": shared}
            ranks = [subprocess.Popen([*command, "--rank", str(i)], env=environment) for i in range(world_size)]
            try:
                codes = [process.wait(timeout=120) for process in ranks]
            finally:
                for process in ranks:
                    process.kill()
            if any(codes):
                raise RuntimeError(f"cost_model: the ranks ended with {codes}")
            points += load(Path(folder) / "points.json")
    return points


def measure_rank(rank: int, world_size: int, folder: Path) -> None:
    """One rank of `measure`; the first writes the points."""
    from engine.distributed import all_reduce

    torch.set_num_threads(1)
    logging.getLogger("engine.distributed").setLevel(logging.ERROR)  # that shared memory is off is what is asked for
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, store=store)
    if os.environ["ENGINE_SHARED_MEMORY"] == "1":
        ways: dict[tuple[str, str | None], Callable] = {("memory", None): all_reduce, ("gloo", None): dist.all_reduce}
    else:
        ways = {("engine", codec): functools.partial(all_reduce, codec=codec) for codec in WIRE_RATIO}
    points = []
    for size in SIZES:
        t = torch.empty(size // 4)
        times: dict[tuple, list[float]] = {way: [] for way in ways}
        for i in range(max(5, min(20, (16 << 20) // size))):
            for way, function in ways.items():
                t.normal_()
                function(t)  # not timed: the ranks come here at different moments
                start = time.perf_counter()
                function(t)
                function(t)
                if i:
                    times[way].append((time.perf_counter() - start) / 2)
        medians = torch.tensor([statistics.median(taken) for taken in times.values()], dtype=torch.float64)
        dist.all_reduce(medians, dist.ReduceOp.MAX)
        for (way, codec), median in zip(ways, medians.tolist(), strict=True):
            hosts, local = (1, world_size) if way == "memory" else (world_size, 1)
            # Every "host" here is a process with its share of this one's cores.
            cores = max(1, (os.cpu_count() or 1) * local // world_size)
            points.append(Point(Case(way, size, hosts, local, codec), median, cores))
    if rank == 0:
        save(points, folder / "points.json")
    dist.destroy_process_group()


def save(points: Iterable[Point], path: Path) -> None:
    path.write_text(json.dumps([dataclasses.asdict(point) for point in points], indent=1), encoding="utf-8")


def load(path: Path) -> list[Point]:
    found = json.loads(path.read_text(encoding="utf-8"))
    return [Point(Case(**point["case"]), point["seconds"], point["cores"]) for point in found]


# Printing


def print_check(points: list[Point], costs: Mapping[str, float], what: str) -> None:
    """The model's errors, by way and codec."""
    groups: dict[tuple, list[tuple[Point, float]]] = {}
    for point, error in errors(points, costs):
        groups.setdefault((point.case.way, point.case.codec, point.case.ranks), []).append((point, error))
    print(f"\n{what}: the model against measured points")
    print("  way     codec   ranks   points   median error   largest error, at bytes")
    for (way, codec, ranks), found in groups.items():
        worst, error = max(found, key=lambda pair: abs(pair[1]))
        typical = statistics.median(abs(error) for _, error in found)
        cells = f"  {way:<7} {codec or 'float32':<7} {ranks:>5} {len(found):>8} {typical:>13.0%} {error:>+15.0%}"
        print(f"{cells}, {worst.case.size}")


def print_costs(costs: Mapping[str, float]) -> None:
    print("\ncosts of this machine")
    for name, cost in costs.items():
        rate = f"{1e-9 / cost:10.2f} GB/s" if name.endswith(".byte") and cost else f"{cost * 1e6:10.2f} µs"
        print(f"  {name:<16} {rate}")


def print_table(costs: Mapping[str, float], size: int, local: int, cores: int, gbps: float) -> None:
    """Seconds by number of ranks: `local` a host where there are so many, links of `gbps` between the hosts."""
    codecs = [codec for codec in WIRE_RATIO if "engine.byte" in costs and (codec is None or f"{codec}.byte" in costs)]
    heads = ["memory", "gloo, flat", *(f"engine {codec or 'float32'}" for codec in codecs)]
    print(f"\n{size / 2**20:g} MiB of float32, {local} ranks a host with {cores} cores, {gbps:g} Gbit/s; milliseconds")
    print(f"  {'ranks':>6} {'hosts':>6}" + "".join(f"{head:>16}" for head in heads))
    for ranks in RANKS:
        each = min(ranks, local)
        hosts = ranks // each
        cases = [Case("memory", size, 1, ranks) if hosts == 1 else None, Case("gloo", size, hosts, each)]
        cases += [Case("engine", size, hosts, each, codec) if hosts > 1 else None for codec in codecs]
        cells = [seconds(case, costs, cores, gbps / 8 * 1e9) * 1e3 if case else None for case in cases]
        print(f"  {ranks:>6} {hosts:>6}" + "".join(f"{'' if c is None else f'{c:.2f}':>16}" for c in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=Path, help="measured points to use, instead of measuring")
    parser.add_argument("--save", type=Path, help="where to keep the points")
    parser.add_argument("--gbps", type=float, default=10.0, help="of the links between hosts, Gbit/s each way")
    parser.add_argument("--local", type=int, default=8, help="ranks a host")
    parser.add_argument("--cores", type=int, help="of a host; as many as ranks where it isn't given")
    parser.add_argument("--rank-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        measure_rank(arguments.rank, int(arguments.rank_of[0]), Path(arguments.rank_of[1]))
        return
    points = load(arguments.points) if arguments.points else measure(2)
    if arguments.save:
        save(points, arguments.save)
    fitted, held_out = split(points)
    costs = fit(fitted)
    print_costs(costs)
    print_check(fitted, costs, "sizes that were fitted")
    print_check(held_out, costs, "sizes that were held out")
    cores = arguments.cores or arguments.local
    for size in (1 << 16, 1 << 20, 64 << 20, 256 << 20):
        print_table(costs, size, arguments.local, cores, arguments.gbps)


if __name__ == "__main__":
    main()

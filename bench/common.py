"""One timer and one printer for every benchmark: peers interleaved in one loop, medians, buffers rotated."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def time_interleaved(functions: dict[str, Callable[[int], object]], repeats: int = 15) -> dict[str, float]:
    """Median seconds a call. Every function runs once a round, in turn, so that noise falls on all of them alike.

    Each is called with the round's number, by which it picks one of its rotated buffers.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function(0)
    for i in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function(i)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def rotated(make: Callable[[], object], bytes_each: int, beyond: int = 256 << 20) -> list:
    """As many copies of `make()` as are needed to be larger than any cache together, at least one."""
    return [make() for _ in range(max(1, -(-beyond // max(1, bytes_each))) if bytes_each < beyond else 1)]


def print_rows(title: str, rows: Sequence[tuple[str, dict[str, float], int]], own: str) -> None:
    """Prints a line a shape: own median, GB/s over `bytes`, and how many times faster than each peer `own` is."""
    print(f"\n{title}  ({torch.get_num_threads()} threads)")
    for shape, seconds, moved in rows:
        mine = seconds[own]
        peers = "  ".join(f"{s / mine:6.2f}x {name}" for name, s in seconds.items() if name != own)
        print(f"  {shape:<28} {mine * 1e6:10.1f} µs {moved / mine / 1e9:7.1f} GB/s  {peers}")

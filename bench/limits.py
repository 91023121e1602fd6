"""The machine's limits, measured in the same run as what is held against them.

Rates of arithmetic once, as the processor reaches them whoever else is there; bandwidths, which the machine's other
users take a share of, again before and after each op.
"""

import dataclasses
import functools
import importlib

import torch

from engine import backends


@dataclasses.dataclass(frozen=True)
class Limits:
    """What all threads in use reach together; a rate of 0 is one that can't be measured here.

    Attributes:
        read_gbps, copy_gbps: from memory, 256 MB a thread; a copy counts bytes read and bytes written.
        cache_gbps: reading 256 KB a thread, over and over.
        fp32_gops: fused multiply-adds in float32, 10^9 operations a second, by the instruction set in use.
        bf16_gops: products of bfloat16 added up in float32, the same way; 0 where no instruction does so.
        int8_gops: exact sums of int8 products, the same way.
        int8_by: the instructions that reached it.
    """

    read_gbps: float
    copy_gbps: float
    cache_gbps: float
    fp32_gops: float
    bf16_gops: float
    int8_gops: float
    int8_by: str

    def __str__(self) -> str:
        return (
            f"limits: {self.read_gbps:.0f} GB/s read, {self.copy_gbps:.0f} copied, {self.cache_gbps:.0f} from cache; "
            f"{self.fp32_gops:.0f} GFLOP/s fp32, {f'{self.bf16_gops:.0f} bf16, ' if self.bf16_gops else ''}"
            f"{self.int8_gops:.0f} GOP/s int8"
        )


def measure_limits(threads: int | None = None) -> Limits:
    """Measures once a process for each number of threads (torch's by default) and instruction set; takes 3 s."""
    return _measure(threads or torch.get_num_threads(), backends.cpu_variant())


_recent: dict[int, tuple[float, float, float]] = {}  # by threads, the bandwidths after the rows measured last


def limits_of_rows(threads: int | None = None) -> Limits:
    """The limits for the rows measured since the last call: bandwidths are the best of the start, then, and now.

    Takes 0.6 s, and what it measures now counts as measured before the rows to come.
    """
    threads = threads or torch.get_num_threads()
    start = measure_limits(threads)
    at_start = (start.read_gbps, start.copy_gbps, start.cache_gbps)
    before, _recent[threads] = _recent.get(threads, at_start), _bandwidths(threads, 128 << 20, 0.1)
    read, copy, cache = (max(rates) for rates in zip(at_start, before, _recent[threads], strict=True))
    return dataclasses.replace(start, read_gbps=read, copy_gbps=copy, cache_gbps=cache)


def _bandwidths(threads: int, size: int, seconds: float) -> tuple[float, float, float]:
    native = importlib.import_module("engine._native")
    return (
        native.read_gbps(size, threads, seconds),
        native.copy_gbps(size, threads, seconds),
        native.read_gbps(256 << 10, threads, 0.05),
    )


@functools.cache
def _measure(threads: int, variant: str) -> Limits:
    native = importlib.import_module("engine._native")
    rounds = []
    for _ in range(4):  # the best of some: a machine that others use too is slow for moments
        rates = (
            *_bandwidths(threads, 256 << 20, 0.2),
            native.fp32_gops(variant, threads, 0.05),
            native.bf16_gops(variant, threads, 0.05),
            *native.int8_gops(variant, threads, 0.05),
        )
        rounds.append(rates)
    return Limits(*(max(rates) for rates in zip(*rounds, strict=True)))

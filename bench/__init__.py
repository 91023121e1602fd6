"""Benchmarks, one module an op, installed as `engine.bench`; `engine bench` runs them."""

from pathlib import Path

OPS = tuple(sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")))

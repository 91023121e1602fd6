"""Runs benchmarks by op and writes what they measured."""

import dataclasses
import datetime
import importlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from engine import backends
from engine.bench import OPS, common
from engine.bench.limits import measure_limits


def run(ops: Sequence[str], json_path: Path | None = None, plot_path: Path | None = None) -> None:
    """Prints the benchmark of each of `ops` (all where none is named); saves the rows as JSON and as a picture (PNG).

    Raises:
        ValueError: no benchmark has that name, or a file's ending is another one. Raised before anything runs.
        ImportError: the native library, which measures the limits, isn't built.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"no benchmark for {op!r}: expected some of {', '.join(OPS)}")
    for path, ending in ((json_path, ".json"), (plot_path, ".png")):
        if path is not None and path.suffix != ending:
            raise ValueError(f"expected a name ending in {ending}, got {path.name!r}")
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"no such folder: {path.parent}")
    limits = measure_limits()
    print(f"{limits} (by {limits.int8_by or 'plain code'})")
    for op in ops or OPS:
        importlib.import_module(f"engine.bench.bench_{op}").main()
        if json_path is not None:  # after each, so that a run that is ended early leaves something
            results = {**describe_machine(), "limits": dataclasses.asdict(limits), "rows": common.RESULTS}
            json_path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if plot_path is not None:
        from engine.bench.plot import save_plot

        save_plot(common.RESULTS, dataclasses.asdict(limits), plot_path)


def describe_machine() -> dict[str, object]:
    """What the numbers hold for."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": importlib.import_module("engine._native").cpu_name(),
        "instruction_set": backends.cpu_variant(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }

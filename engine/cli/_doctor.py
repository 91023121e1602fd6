"""engine doctor: what is active on this machine, and why something is not."""

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from engine import backends
from engine.cli._output import output_console, plain_table


def doctor() -> None:
    """Show versions, the processor, and which backends serve and why others don't."""
    console = output_console()
    facts = plain_table("", "")
    facts.show_header = False
    name, features = _processor()
    facts.add_row("engine", f"{engine_version()} at {Path(backends.__file__).parent}")
    facts.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    facts.add_row("torch", torch.__version__)
    facts.add_row("processor", name)
    facts.add_row("features", features)
    facts.add_row("threads", str(torch.get_num_threads()))
    facts.add_row("in use", backends.cpu_variant())
    for module in ("triton", "transformers"):
        found = importlib.util.find_spec(module) is not None
        facts.add_row(module, importlib.metadata.version(module) if found else "not installed (optional)")
    facts.add_row("nvcc", shutil.which("nvcc") or "not on the path (needed only to build the CUDA kernels)")
    console.print(facts)
    console.print()
    table = plain_table("backend", "active", "detail", left=3)
    for status in backends.status():
        table.add_row(status.name, "yes" if status.active else "no", status.detail)
    console.print(table)


def _processor() -> tuple[str, str]:
    """Its name, and which of the instruction sets that kernels care about it has."""
    try:
        native: Any = importlib.import_module("engine._native")
    except ImportError:
        return platform.processor() or platform.machine(), "unknown: the native module is not built"
    features = native.cpu_features()
    have = [feature for feature, found in features.items() if found]
    lack = [feature for feature, found in features.items() if not found]
    return native.cpu_name() or platform.machine(), f"{' '.join(have) or 'none'} (without {' '.join(lack) or 'none'})"


def engine_version() -> str:
    try:
        return importlib.metadata.version("compression-engine")
    except importlib.metadata.PackageNotFoundError:  # a checkout that isn't installed
        return "unknown"

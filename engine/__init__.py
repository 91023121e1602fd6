"""Makes PyTorch models smaller and faster by kernels that read the compressed weights directly."""

from importlib.metadata import PackageNotFoundError, version

import torch

from engine import backends, formats, nn, ops
from engine.checkpoint import CheckpointError, load_, save
from engine.compress import (
    Calibration,
    Distillation,
    Prune,
    Quantize,
    Recipe,
    Report,
    Search,
    calibrate,
    compress_,
    decompress_,
    distill,
    prune_,
    quantize_,
    search,
)
from engine.ops._library import reference_mode

if torch.distributed.is_available():  # some builds of PyTorch come without
    from engine import distributed as distributed

try:
    __version__ = version("compression-engine")
except PackageNotFoundError:  # a checkout that isn't installed, as `make bench-gpu` runs it
    __version__ = "unknown"

__all__ = [
    "Calibration",
    "CheckpointError",
    "Distillation",
    "Prune",
    "Quantize",
    "Recipe",
    "Report",
    "Search",
    "backends",
    "calibrate",
    "compress_",
    "decompress_",
    "distill",
    "formats",
    "load_",
    "nn",
    "ops",
    "prune_",
    "quantize_",
    "reference_mode",
    "save",
    "search",
]

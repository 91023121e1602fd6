"""Makes PyTorch models smaller and faster by kernels that read the compressed weights directly."""

from engine import backends, ops  # ops first needs nothing; backends registers the native kernels for them
from engine.ops._library import reference_mode

__all__ = ["backends", "ops", "reference_mode"]

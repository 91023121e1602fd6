"""The ops: each a function here and the same under `torch.ops.engine`, with its reference beside it."""

from engine.ops.int8_quantize import int8_quantize

__all__ = ["int8_quantize"]

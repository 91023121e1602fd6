"""Drop-in modules over compressed weights."""

from engine.nn.compressed import CompressedEmbedding, CompressedLinear

__all__ = ["CompressedEmbedding", "CompressedLinear"]

"""Drop-in modules over compressed weights."""

from engine.nn.attention import MultiheadAttention, unfuse_attention_
from engine.nn.compressed import CompressedEmbedding, CompressedLinear
from engine.nn.conv2d import CompressedConv2d

__all__ = ["CompressedConv2d", "CompressedEmbedding", "CompressedLinear", "MultiheadAttention", "unfuse_attention_"]

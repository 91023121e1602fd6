"""The ops: each a function here and the same under `torch.ops.engine`, with its reference beside it."""

from engine.ops.bitmap_int8_linear import bitmap_int8_linear
from engine.ops.bitmap_linear import bitmap_linear
from engine.ops.bitmap_to_dense import bitmap_to_dense
from engine.ops.csr_linear import csr_linear
from engine.ops.int8_dequantize import int8_dequantize
from engine.ops.int8_embedding import int8_embedding
from engine.ops.int8_fake_quantize import int8_fake_quantize
from engine.ops.int8_linear import int8_linear
from engine.ops.int8_quantize import int8_quantize
from engine.ops.int8_weight_linear import int8_weight_linear
from engine.ops.magnitude_threshold import magnitude_threshold
from engine.ops.prune_quantize_to_bitmap import prune_quantize_to_bitmap
from engine.ops.prune_to_bitmap import prune_to_bitmap
from engine.ops.prune_to_csr import prune_to_csr
from engine.ops.ring_codec import ring_decode, ring_encode, ring_prune_encode
from engine.ops.threshold_prune import threshold_prune

__all__ = [
    "bitmap_int8_linear",
    "bitmap_linear",
    "bitmap_to_dense",
    "csr_linear",
    "int8_dequantize",
    "int8_embedding",
    "int8_fake_quantize",
    "int8_linear",
    "int8_quantize",
    "int8_weight_linear",
    "magnitude_threshold",
    "prune_quantize_to_bitmap",
    "prune_to_bitmap",
    "prune_to_csr",
    "ring_decode",
    "ring_encode",
    "ring_prune_encode",
    "threshold_prune",
]

"""The ops: each a function here and the same under `torch.ops.engine`, with its reference beside it."""

from engine.ops.bitmap_int8_linear import bitmap_int8_linear
from engine.ops.bitmap_linear import bitmap_linear
from engine.ops.bitmap_to_dense import bitmap_to_dense
from engine.ops.block_int8_linear import block_int8_linear
from engine.ops.block_linear import block_linear
from engine.ops.block_to_dense import block_to_dense
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
from engine.ops.prune_to_block import prune_to_block
from engine.ops.prune_to_csr import prune_to_csr
from engine.ops.prune_to_semi_structured import prune_to_semi_structured
from engine.ops.ring_codec import ring_decode, ring_encode, ring_prune_encode
from engine.ops.semi_structured_int8_linear import semi_structured_int8_linear
from engine.ops.semi_structured_linear import semi_structured_linear
from engine.ops.semi_structured_to_dense import semi_structured_to_dense
from engine.ops.threshold_prune import threshold_prune

__all__ = [
    "bitmap_int8_linear",
    "bitmap_linear",
    "bitmap_to_dense",
    "block_int8_linear",
    "block_linear",
    "block_to_dense",
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
    "prune_to_block",
    "prune_to_csr",
    "prune_to_semi_structured",
    "ring_decode",
    "ring_encode",
    "ring_prune_encode",
    "semi_structured_int8_linear",
    "semi_structured_linear",
    "semi_structured_to_dense",
    "threshold_prune",
]

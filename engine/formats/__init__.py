"""Compressed weights: each format holds the tensors that its kernel reads, and nothing else.

Every format has `from_dense(weight, ...)`, `to_dense()`, `linear(x, bias)`, `linear_of_patches(x, bias)`,
`shard(dim, begin, end)`, `nbytes`, `shape`, `sparsity`, `label`, `check()` and the class attribute `TENSORS` (the names
of its tensors, optional ones included). One with int8 values has `scale` and `input_scale`, and multiplies as
`engine.ops.int8_linear` does.
"""

from engine.formats.bitmap import Bitmap
from engine.formats.block import Block
from engine.formats.csr import Csr
from engine.formats.dense_int8 import DenseInt8
from engine.formats.semi_structured import SemiStructured

Format = Bitmap | Block | Csr | DenseInt8 | SemiStructured

__all__ = ["Bitmap", "Block", "Csr", "DenseInt8", "Format", "SemiStructured"]

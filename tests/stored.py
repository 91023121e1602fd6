"""Random weights in every form in which an op stores them: what tests of the linear ops share."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import engine
from engine.ops._bitmap import bitmap_mask, pack_mask
from engine.ops._semi_structured import collect


class Form(NamedTuple):
    """A form: how to store the weights that `keep` marks (as far as the form can), and the dense weight of it."""

    store: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    restore: Callable[..., Tensor]  # (*stored, n, k)
    values: int  # which of the stored tensors holds them


def _offsets(keep: Tensor) -> Tensor:
    return torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0))


def _store_bitmap(weight: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    return pack_mask(keep), _offsets(keep), weight[keep]


def _restore_bitmap(bitmask: Tensor, row_offsets: Tensor, values: Tensor, n: int, k: int) -> Tensor:
    return values.new_zeros(n, k).masked_scatter(bitmap_mask(bitmask, k), values)


def _store_csr(weight: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    return _offsets(keep).int(), keep.nonzero()[:, 1].int(), weight[keep]


def _restore_csr(crow_indices: Tensor, col_indices: Tensor, values: Tensor, n: int, k: int) -> Tensor:
    rows = torch.arange(n).repeat_interleave(crow_indices.diff())
    return values.new_zeros(n, k).index_put((rows, col_indices.long()), values, accumulate=True)


def _store_blocks(weight: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    high, wide = [(16, 16), (32, 32), (48, 80), (128, 64), (16, 256)][torch.randint(5, ())]
    return engine.ops.prune_to_block(weight, block_shape=(high, wide), keep=keep[::high, ::wide])


def _store_semi_structured(weight: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    _, metadata = engine.ops.prune_to_semi_structured(torch.randn(weight.shape))  # two of four, whatever `keep` says
    return collect(weight, metadata), metadata


FORMS = {
    "dense": Form(lambda weight, keep: (weight,), lambda weight, n, k: weight, 0),
    "bitmap": Form(_store_bitmap, _restore_bitmap, 2),
    "csr": Form(_store_csr, _restore_csr, 2),
    "block": Form(_store_blocks, engine.ops.block_to_dense, 2),
    "semi_structured": Form(
        _store_semi_structured,
        lambda values, metadata, n, k: engine.ops.semi_structured_to_dense(values, metadata, k),
        0,
    ),
}


def random_keep(n: int, k: int, density: float = 0.5) -> Tensor:
    """Rows of about the density, some of them empty, some full."""
    rows = torch.where(torch.rand(n, 1) < 0.2, torch.randint(0, 2, (n, 1)).float(), density)
    return torch.rand(n, k) < rows


def int8_values(*shape: int) -> Tensor:
    """Every int8 value, the extremes often: their products and sums are where arithmetic may saturate."""
    values = torch.randint(-128, 128, shape, dtype=torch.int8)
    extreme = torch.tensor([-128, 127], dtype=torch.int8)[torch.randint(0, 2, shape)]
    return torch.where(torch.rand(shape) < 0.2, extreme, values)


def activations(*shape: int) -> Tensor:
    """Gaussian rows, a third of them becoming -127 and 127 alone when they are quantised."""
    x = torch.randn(shape)
    return torch.where(torch.rand(*shape[:-1], 1) < 0.3, x.sign() * 3, x)


def assert_same(got: Tensor, want: Tensor) -> None:
    """To the bit, dtype and shape too; a NaN is as good as another."""
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def ops_called(function: Callable[[], object]) -> set[str]:
    """The names of the ops that `function` calls."""
    names = set()

    class Notice(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(str(func))
            return func(*args, **(kwargs or {}))

    with Notice():
        function()
    return names

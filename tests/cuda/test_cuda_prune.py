"""The CUDA kernels of the ops that pack a pruned weight, against their references."""

import pytest
import torch
from device import DEVICE, assert_same, on, on_device
from shapes import MATRICES

from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.prune_quantize_to_bitmap import prune_quantize_to_bitmap
from engine.ops.prune_to_bitmap import prune_to_bitmap
from engine.ops.prune_to_csr import prune_to_csr

pytestmark = on_device
OPS = (prune_to_bitmap, prune_quantize_to_bitmap, prune_to_csr)
BIG = {
    (2, 4104): "a row for all warps of a block, two steps and a bit",
    (3, 5001): "the same, not aligned",
    (4097, 1): "a row for a warp, more blocks than a look-back sees at once",
}


@pytest.fixture(params=OPS, ids=lambda op: op.__name__)
def packs(request):
    """Asserts that the op does what its reference does."""

    def check(weight, threshold):
        want = REFERENCES[request.param.__name__](weight, threshold)
        assert_same(request.param(*on(weight, threshold)), want)

    return check


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_shape_and_kind_of_threshold(packs, dtype):
    for rows, columns in [*MATRICES][: None if dtype == torch.float16 else -1]:
        packs(torch.randn(rows, columns).to(dtype), torch.tensor(0.7))
    weight = torch.randn(17, 200).to(dtype)
    for threshold in (torch.tensor([torch.nan]), torch.rand(17, 1), torch.rand(200), torch.rand(200, 17).t()):
        packs(weight, threshold)


@pytest.mark.parametrize("shape", BIG, ids=str)
def test_many_blocks_and_steps(packs, shape):
    packs(torch.randn(shape).bfloat16(), torch.tensor(0.7))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_tiles_and_rows_that_do_not_fit(packs, dtype):
    """Of 16-byte rows, which go by tiles of 8192 or 4096 weights."""
    for rows, columns in ((37, 1000), (3, 20000), (700, 16), (129, 264)):
        weight = torch.randn(rows, columns).to(dtype)
        weight[rows // 2] = 0
        weight[-1, -1] = torch.nan
        for threshold in (torch.tensor(0.7), torch.rand(rows, 1), torch.tensor(-1.0), torch.tensor(9.0)):
            packs(weight, threshold)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_thresholds_that_the_dtype_has_not(packs, dtype):
    weight = torch.tensor([1.0, 2.0**-14, 2.0**-24, 65504.0, 3.0e38, torch.inf, torch.nan, 0.0]).repeat(4, 2).to(dtype)
    limits, around = (1.0, 2.0**-14, 2.0**-24, 65504.0, 65520.0, 3.0e38), (1 - 2e-7, 1.0, 1 + 2e-7, 1.003)
    near = [limit * factor for limit in limits for factor in around]
    for threshold in (*near, 0.0, -0.0, 1e-45, 2.0**-25, 3.4e38):
        packs(weight, torch.tensor(threshold))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_special_values(packs, dtype):
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 0.5, -0.5, 1e-7, 1e-30])
    for threshold in (-1.0, 0.0, 0.5, torch.inf, torch.nan):
        packs(special.repeat(3, 7).to(dtype), torch.tensor(threshold))
        packs(special[4:].repeat(3, 7).to(dtype), torch.tensor(threshold))


def test_rows_off_the_alignment_and_strides(packs):
    for dtype in FLOAT_DTYPES:
        packs(torch.randn(65, 9).to(dtype).t(), torch.tensor(0.5))
        storage = torch.randn(8 * 64 + 1).to(dtype)
        shifted = storage.to(DEVICE)[1:].view(8, 64)  # contiguous, but not on 16 bytes
        assert shifted.is_contiguous()
        want = REFERENCES["prune_to_bitmap"](storage[1:].view(8, 64), torch.tensor(0.5))
        assert_same(prune_to_bitmap(shifted, 0.5), want)

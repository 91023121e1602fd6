"""transpose: what PyTorch's copy of the transposed view is, for every size of tile."""

import pytest
import torch

import engine
from engine.ops._check import FLOAT_DTYPES
from engine.ops._transpose import transpose

SHAPES = [
    (0, 3, 4),
    (2, 0, 4),
    (2, 3, 0),
    (1, 1, 1),
    (3, 1, 9),
    (2, 9, 1),
    (1, 8, 8),
    (2, 16, 64),
    (3, 63, 65),
    (1, 130, 77),
]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_transposed_view(variant, shape, dtype):
    x = torch.randn(shape).to(dtype)
    for given in (x, x[:, :, ::2], x.transpose(0, 1)):
        got = transpose(given)
        assert torch.equal(got, given.transpose(1, 2)) and got.is_contiguous()
        with engine.reference_mode():
            assert torch.equal(transpose(given), got)


def test_opcheck():
    for grad in (False, True):
        for shape in ((2, 3, 5), (2, 1, 5)):
            torch.library.opcheck(torch.ops.engine.transpose.default, (torch.randn(shape, requires_grad=grad),))


def test_gradient():
    x = torch.randn(2, 3, 5, requires_grad=True, dtype=torch.float32)
    grad = torch.randn(2, 5, 3)
    transpose(x).backward(grad)
    assert torch.equal(x.grad, grad.transpose(1, 2))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"transpose: x: expected shape \[B, R, C\]"):
        transpose(torch.randn(3, 4))
    with pytest.raises(TypeError, match="transpose: x: expected a float32"):
        transpose(torch.randn(1, 3, 4).double())

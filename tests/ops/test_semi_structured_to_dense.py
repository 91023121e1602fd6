"""semi_structured_to_dense: the way back, its gradient, and metadata that lies."""

import pytest
import torch
from shapes import MATRICES

from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES
from engine.ops.prune_to_semi_structured import prune_to_semi_structured
from engine.ops.semi_structured_to_dense import semi_structured_to_dense

reference = REFERENCES["semi_structured_to_dense"]


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.int8])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_native_is_reference_to_the_bit(variant, shape, dtype):
    values, metadata = prune_to_semi_structured(torch.randn(shape) * 40)
    values = values.to(dtype)
    want = reference(values, metadata, shape[1])
    assert torch.equal(semi_structured_to_dense(values, metadata, shape[1]), want)
    assert want.dtype == dtype and want.shape == shape


def test_gives_back_what_was_packed():
    weight = torch.randn(20, 36).reshape(20, 9, 4)
    keep = weight.abs() >= weight.abs().topk(2).values[..., 1:]
    dense = semi_structured_to_dense(*prune_to_semi_structured(weight.reshape(20, 36)), 36)
    assert torch.equal(dense, torch.where(keep, weight, 0.0).reshape(20, 36))


def test_gradient_opcheck_and_compile():
    values, metadata = prune_to_semi_structured(torch.randn(5, 14))
    values.requires_grad_()
    grad = torch.randn(5, 14)
    semi_structured_to_dense(values, metadata, 14).backward(grad)
    kept = semi_structured_to_dense(torch.ones_like(values).index_fill(1, torch.tensor([]).long(), 0), metadata, 14)
    assert torch.equal(semi_structured_to_dense(values.grad, metadata, 14), grad * kept)
    torch.library.opcheck(torch.ops.engine.semi_structured_to_dense.default, (values, metadata, 14))
    compiled = torch.compile(lambda v: semi_structured_to_dense(v, metadata, 14), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values), semi_structured_to_dense(values, metadata, 14))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [*MATRICES, (1500, 1030), (3, 0)], ids=str)
def test_gather_takes_what_stands_at_the_kept_places(variant, shape, dtype):
    values, metadata = prune_to_semi_structured(torch.randn(shape).to(dtype))
    dense = torch.randn(shape).to(dtype).requires_grad_()
    got = torch.ops.engine.semi_structured_gather(dense, metadata)
    assert got.shape == values.shape and got.dtype == dtype
    restored, kept = reference(got.detach(), metadata, shape[1]), reference(values, metadata, shape[1]) != 0
    assert torch.equal(restored, dense.where(kept, 0))
    got.backward(got.detach())
    assert torch.equal(dense.grad, restored)
    anywhere = torch.randint(0, 256, metadata.shape, dtype=torch.uint8)  # places that don't ascend, or lie beyond K
    arguments = dense.detach(), anywhere
    assert torch.equal(
        torch.ops.engine.semi_structured_gather(*arguments), REFERENCES["semi_structured_gather"](*arguments)
    )


def test_gather_opcheck_and_errors():
    metadata, gather = prune_to_semi_structured(torch.randn(5, 14))[1], torch.ops.engine.semi_structured_gather.default
    for grad in (False, True):
        torch.library.opcheck(gather, (torch.randn(5, 14, requires_grad=grad), metadata))
    for dense, error, message in (
        (torch.randn(5, 17), ValueError, r"metadata: expected shape"),
        (torch.randn(4, 14), ValueError, r"metadata: expected shape"),
        (torch.randn(14), ValueError, r"dense: expected shape \[N, K\]"),
        (torch.ones(5, 14, dtype=torch.int8), TypeError, "dense: expected a float32"),
    ):
        with pytest.raises(error, match=f"semi_structured_gather: {message}"):
            REFERENCES["semi_structured_gather"](dense, metadata)
        with pytest.raises(RuntimeError, match="semi_structured_gather"):
            gather(dense, metadata)


def test_what_lies_is_refused(variant):
    values, metadata = prune_to_semi_structured(torch.randn(5, 14))
    for index, byte, message in (((2, 0), 0x41, "two places that ascend"), ((3, 1), 0xE4, None)):
        damaged = metadata.clone()
        damaged[index] = byte
        if message is None:
            damaged[3, 1] = 0x04  # the third and last group of the second byte: both places 0
        with pytest.raises(ValueError, match="metadata: expected two places that ascend"):
            semi_structured_to_dense(values, damaged, 14)
    damaged = metadata.clone()
    damaged[1, 1] = metadata[1, 1] & 0x0F | 0xE0  # places 2 and 3 of the last group, beyond column 14
    with pytest.raises(ValueError, match="values: expected 0 at places beyond column 14"):
        semi_structured_to_dense(values.abs() + 1, damaged, 14)
    damaged = prune_to_semi_structured(torch.randn(5, 4))
    damaged[1][:] |= 0x80
    with pytest.raises(ValueError, match="0b0100 beyond the last group"):
        semi_structured_to_dense(*damaged, 4)


def test_errors():
    values, metadata = prune_to_semi_structured(torch.randn(5, 14))
    with pytest.raises(ValueError, match=r"values: expected shape \[N, 10\]"):
        semi_structured_to_dense(values, metadata, 17)
    with pytest.raises(TypeError, match="metadata: expected a uint8 tensor"):
        semi_structured_to_dense(values, metadata.int(), 14)
    with pytest.raises(ValueError, match="columns: expected at least 0"):
        semi_structured_to_dense(values, metadata, -1)

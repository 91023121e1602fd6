"""What all ops that prune by threshold into a form must do."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import MATRICES
from stored import assert_same

import engine
from engine.ops._bitmap import bitmap_mask
from engine.ops._check import FLOAT_DTYPES
from engine.ops._library import REFERENCES

OPS = ("prune_to_bitmap", "prune_to_csr", "prune_quantize_to_bitmap")


@pytest.fixture(params=OPS)
def name(request):
    return request.param


def op(name, weight, threshold):
    return getattr(engine.ops, name)(weight, threshold)


def assert_equals_reference(name, weight, threshold):
    want = REFERENCES[name](weight, torch.as_tensor(threshold, dtype=torch.float32))
    for got, other in zip(op(name, weight, threshold), want, strict=True):
        assert_same(got, other)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_native_is_reference_to_the_bit(variant, name, shape, dtype):
    weight = (torch.randn(shape) * torch.rand(shape[0], 1).exp()).to(dtype)
    for threshold in (0.0, 0.1, 0.67, 2.0, torch.inf):
        assert_equals_reference(name, weight, threshold)


def test_thresholds_broadcast(variant, name):
    weight = torch.randn(9, 150)
    for shape in ((), (1,), (150,), (1, 1), (1, 150), (9, 1), (9, 150)):
        assert_equals_reference(name, weight, torch.rand(shape) * 2)
    assert_equals_reference(name, weight, torch.rand(150, 9).T)
    assert_equals_reference(name, weight, torch.rand(9, 1).bfloat16())  # compared in float32


@given(
    st.sampled_from(OPS),
    hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(0, 140)), elements=st.floats(width=32)),
    st.floats(width=32),
)
def test_any_values(name, weight, threshold):
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            assert_equals_reference(name, torch.from_numpy(weight), threshold)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_ties_signs_and_what_is_no_number(variant, name, dtype):
    weight = torch.tensor([[0.5, -0.5, 0.75, -0.75, 0.0, -0.0, torch.nan, torch.inf, -torch.inf, 2.0**-24]]).to(dtype)

    def kept(threshold):
        packed = op(name, weight, threshold)
        if name == "prune_to_csr":
            return packed[1].tolist()
        return bitmap_mask(packed[0], 10)[0].nonzero().flatten().tolist()

    assert kept(0.5) == [2, 3, 6, 7, 8]
    assert kept(0.0) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert kept(-1.0) == list(range(10))
    assert kept(torch.inf) == [6]
    assert kept(torch.nan) == list(range(10))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("columns", [8, 333, 1024])
def test_threads_agree_and_clobber_nothing(variant, name, columns, dtype):
    weight = torch.randn(1500, columns).to(dtype)
    weight[::3] *= 0.01  # rows with nothing, next to full ones
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_equals_reference(name, weight, 0.4)
    finally:
        torch.set_num_threads(before)


def test_strides(variant, name):
    assert_equals_reference(name, torch.randn(70, 20).T, 0.4)
    assert_equals_reference(name, torch.randn(1, 8).expand(5, 8), -1.0)


def test_opcheck(name):
    for threshold in (torch.tensor(0.5), torch.rand(3, 1), torch.rand(21)):
        torch.library.opcheck(getattr(torch.ops.engine, name).default, (torch.randn(3, 21), threshold))


def test_compiles(name):
    torch._dynamo.reset()  # the ops share the lambda below
    weight, function = torch.randn(5, 65), getattr(engine.ops, name)
    compiled = torch.compile(lambda weight: function(weight, 0.5), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(weight), function(weight, 0.5), strict=True):
        assert_same(got, want)


def test_gradient_is_refused(name):
    packed = op(name, torch.randn(3, 5, requires_grad=True), 0.1)
    with pytest.raises(RuntimeError, match=f"{name} has no gradient"):
        packed[-1].sum().backward()


def test_errors(name):
    weight, kernel = torch.randn(3, 4), getattr(torch.ops.engine, name)
    with pytest.raises(TypeError, match=rf"{name}: weight: expected a float32.*got torch.float64"):
        op(name, weight.double(), 0.1)
    with pytest.raises(ValueError, match=rf"{name}: weight: expected shape \[N, K\], got \[3\]"):
        op(name, weight[:, 0], 0.1)
    for other in (None, [1.0], 1.0):
        for threshold in (0.1, torch.tensor(0.1)):
            with pytest.raises(TypeError, match=rf"{name}: weight: expected a float32.*got {type(other).__name__}"):
                getattr(engine.ops, name)(other, threshold)
    for shape in ((3,), (2, 1), (1, 3, 4), (4, 3)):
        with pytest.raises(ValueError, match=rf"{name}: threshold: .*got"):
            op(name, weight, torch.rand(shape))
        with pytest.raises((RuntimeError, ValueError), match=f"{name}: threshold"):
            kernel(weight, torch.rand(shape))
    with pytest.raises((RuntimeError, TypeError), match=f"{name}: threshold"):
        kernel(weight, torch.rand(4, dtype=torch.float64))

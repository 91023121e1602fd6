"""magnitude_threshold: exactly the k-th smallest magnitude, whatever the values, on every scope; edges and errors."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import MATRICES

import engine
from engine.ops._check import FLOAT_DTYPES
from engine.ops.magnitude_threshold import magnitude_threshold

SPARSITIES = (0.0, 0.01, 0.5, 0.77, 0.999)


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def truth(weight, sparsity, scope="tensor"):
    """By NumPy, which sorts NaN to the end."""
    magnitudes = np.abs(weight.float().numpy())
    if scope == "tensor":
        magnitudes = magnitudes.reshape(-1)
    k = round(sparsity * magnitudes.shape[-1])
    threshold = np.zeros(magnitudes.shape[:-1], np.float32) if k == 0 else np.sort(magnitudes, axis=-1)[..., k - 1]
    return torch.tensor(threshold) if scope == "tensor" else torch.tensor(threshold)[:, None]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference(dtype):
    weight = torch.randn(30, 41).to(dtype)
    with engine.reference_mode():
        for sparsity in SPARSITIES:
            for scope in ("tensor", "row"):
                assert_same(magnitude_threshold(weight, sparsity, scope), truth(weight, sparsity, scope))
            assert_same(
                magnitude_threshold([weight, weight[0]], sparsity), truth(torch.cat([weight, weight[:1]]), sparsity)
            )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_native(variant, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    for sparsity in SPARSITIES:
        for scope in ("tensor", "row"):
            assert_same(magnitude_threshold(weight, sparsity, scope), truth(weight, sparsity, scope))


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(0, 70)), elements=st.floats(width=32)),
    st.floats(0, 1, exclude_max=True),
)
def test_any_values(weight, sparsity):
    weight = torch.from_numpy(weight)
    for variant in engine.backends.cpu_variants():
        with engine.backends.force_cpu_variant(variant):
            for scope in ("tensor", "row"):
                assert_same(magnitude_threshold(weight, sparsity, scope), truth(weight, sparsity, scope))


def hard_weights(n):
    """By what makes each hard for a selection by counting or by sampling."""
    ramp = torch.arange(n, dtype=torch.int32)
    return {
        "all equal": torch.full((n,), -0.37),
        "two values": torch.where(torch.rand(n) < 0.6, 0.1, -3.0),
        "half zeros, of both signs": torch.randn(n) * (torch.rand(n) < 0.5),
        "neighbouring bit patterns": (ramp % 1000 + 0x3F800000).view(torch.float32),
        "sorted": torch.linspace(-1, 1, n),
        "every exponent": torch.randint(0, 2**31 - 1, (n,), dtype=torch.int32).view(torch.float32),
        "subnormal": (ramp % 70000).view(torch.float32),
        "not numbers": torch.where(torch.rand(n) < 0.5, torch.nan, torch.inf),
        "one large": torch.cat([torch.randn(n - 1) * 1e-3, torch.tensor([1e30])]),
        "a cheap sample lies": torch.cat([torch.zeros(n // 2), torch.randn(n - n // 2)]),
    }


@pytest.mark.parametrize("name", hard_weights(8))
def test_hard_distributions(variant, name):
    weight = hard_weights(300_000)[name]
    for sparsity in (1 / 300_000, 0.3, 0.5, 0.6, 0.9999):
        assert_same(magnitude_threshold(weight, sparsity), truth(weight, sparsity))
        matrix = weight[:60_000].reshape(20, 3000)
        assert_same(magnitude_threshold(matrix, sparsity, "row"), truth(matrix, sparsity, "row"))


def test_round_is_half_to_even(variant):
    weight = torch.arange(1.0, 11.0)
    for sparsity, want in ((0.05, 0), (0.15, 2), (0.25, 2), (0.35, 4), (0.049, 0), (0.051, 1), (0.97, 10)):
        assert magnitude_threshold(weight, sparsity).item() == want == round(sparsity * 10)


def test_prunes_at_least_k(variant):
    weight = torch.randn(50, 400).bfloat16()  # many ties
    for sparsity in (0.3, 0.5, 0.9):
        threshold = magnitude_threshold(weight, sparsity)
        below, upto = ((weight.abs() < threshold).sum(), (weight.abs() <= threshold).sum())
        assert below < round(sparsity * weight.numel()) <= upto
        rows = magnitude_threshold(weight, sparsity, "row")
        assert ((weight.abs() <= rows).sum(1) >= round(sparsity * 400)).all()


def test_more_than_fp32_counts_exactly(variant):
    n = 2**24 + 3
    weight = torch.ones(n, dtype=torch.bfloat16)
    weight[:5] = 2.0
    for k, want in ((n - 5, 1.0), (n - 4, 2.0)):
        assert round(k / n * n) == k
        assert magnitude_threshold(weight, k / n).item() == want


@pytest.mark.slow
def test_more_elements_than_int32_counts():
    n = 2**31 + 40
    weight = torch.ones(n, dtype=torch.bfloat16)
    weight[:3] = 0.5
    assert magnitude_threshold(weight, 3 / n).item() == 0.5
    assert magnitude_threshold(weight, 4 / n).item() == 1.0


def test_several_tensors_are_as_one(variant):
    weights = [
        torch.randn(30, 40),
        torch.randn(7),
        torch.randn(0, 3),
        torch.randn(5, 6, 2).half(),
        torch.randn(9).bfloat16(),
    ]
    together = torch.cat([weight.float().reshape(-1) for weight in weights])
    for sparsity in SPARSITIES:
        assert_same(magnitude_threshold(weights, sparsity), truth(together, sparsity))
        assert_same(magnitude_threshold(tuple(weights), sparsity), truth(together, sparsity))
    assert_same(magnitude_threshold([torch.randn(0)], 0.5), torch.tensor(0.0))


def test_strides_and_shapes(variant):
    weight = torch.randn(70, 20, 3).transpose(0, 2)
    assert_same(magnitude_threshold(weight, 0.4), truth(weight, 0.4))
    assert_same(magnitude_threshold(weight[0], 0.4, "row"), truth(weight[0], 0.4, "row"))
    assert magnitude_threshold(torch.tensor(-3.0), 0.6).item() == 3.0


def test_threads_agree(variant):
    weight = torch.randn(300, 5000)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for scope in ("tensor", "row"):
                assert_same(magnitude_threshold(weight, 0.6, scope), truth(weight, 0.6, scope))
    finally:
        torch.set_num_threads(before)


def test_opcheck():
    for scope in ("tensor", "row"):
        torch.library.opcheck(torch.ops.engine.magnitude_threshold.default, (torch.randn(3, 21), 0.5, scope))
    torch.library.opcheck(torch.ops.engine.magnitude_threshold_of_list.default, ([torch.randn(3), torch.randn(4)], 0.5))


def test_compiles():
    weight = torch.randn(5, 65)
    compiled = torch.compile(
        lambda weight: (magnitude_threshold(weight, 0.5), magnitude_threshold([weight, weight], 0.5)),
        fullgraph=True,
        backend="aot_eager",
    )
    for got, want in zip(compiled(weight), (truth(weight, 0.5), truth(torch.cat([weight, weight]), 0.5)), strict=True):
        assert_same(got, want)


def test_gradient_is_refused():
    with pytest.raises(RuntimeError, match="magnitude_threshold has no gradient"):
        magnitude_threshold(torch.randn(3, 5, requires_grad=True), 0.5).backward()


def test_errors():
    weight = torch.randn(3, 4)
    for sparsity in (1.0, -0.1, torch.nan, 2):
        with pytest.raises(ValueError, match=r"magnitude_threshold: sparsity: expected a number in \[0, 1\)"):
            magnitude_threshold(weight, sparsity)
        with pytest.raises(ValueError, match=r"magnitude_threshold: sparsity"):
            magnitude_threshold([weight], sparsity)
        with pytest.raises(RuntimeError, match="sparsity"):
            torch.ops.engine.magnitude_threshold(weight, sparsity)
    with pytest.raises(ValueError, match=r"magnitude_threshold: scope: expected .*got 'column'"):
        magnitude_threshold(weight, 0.5, "column")
    for shape in ((), (3,), (2, 3, 4)):
        with pytest.raises(ValueError, match=r"magnitude_threshold: weight: expected shape \[N, K\]"):
            magnitude_threshold(torch.randn(shape), 0.5, "row")
        with pytest.raises(RuntimeError, match="weight"):
            torch.ops.engine.magnitude_threshold(torch.randn(shape), 0.5, "row")
    with pytest.raises(ValueError, match="magnitude_threshold: weight: expected one tensor"):
        magnitude_threshold([weight, weight], 0.5, "row")
    with pytest.raises(TypeError, match=r"magnitude_threshold: weight: expected a float32.*got torch.int64"):
        magnitude_threshold(torch.arange(3), 0.5)
    for other in (None, 0.5):
        with pytest.raises(TypeError, match=rf"magnitude_threshold: weight: .*got {type(other).__name__}"):
            magnitude_threshold(other, 0.5)
    with pytest.raises(RuntimeError, match=r"magnitude_threshold: weights: expected a tensor on cpu.*got one on meta"):
        magnitude_threshold([weight, weight.to("meta")], 0.5)
    with pytest.raises(TypeError, match=r"magnitude_threshold: weight\[1\]: expected a float32.*got torch.float64"):
        magnitude_threshold([weight, weight.double()], 0.5)

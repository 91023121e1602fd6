"""TrainableLinear: whether it multiplies by all weights or by the kept ones alone, it is the same layer."""

import copy

import pytest
import torch

import engine
from engine.compress import trainable
from engine.compress.trainable import TrainableLinear
from engine.formats import Bitmap
from engine.nn import CompressedLinear


@pytest.fixture(params=[False, True], ids=["all", "kept"])
def by_kept(request, monkeypatch):
    """Whatever the processor, both ways."""
    monkeypatch.setattr(trainable, "training_pays", lambda rows, kept, places: request.param)
    return request.param


def layer(sparsity=0.7, values=torch.int8, **how):
    weight = torch.randn(48, 128)
    threshold = engine.ops.magnitude_threshold(weight, sparsity)
    compressed = CompressedLinear(
        Bitmap.from_dense(weight, threshold, values, **how), torch.nn.Parameter(torch.randn(48))
    )
    return TrainableLinear(compressed, weight)


def assert_as_its_weight_says(trained, x):
    """Output and gradient are those of the dense weight under the mask."""
    trained.zero_grad()
    y = trained(x)
    y.square().sum().backward()
    weight = trained.weight.detach().clone().requires_grad_()
    rounded = engine.ops.int8_fake_quantize(weight * trained.mask)
    want = torch.nn.functional.linear(engine.ops.int8_fake_quantize(x), rounded, trained.bias)
    want.square().sum().backward()
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(trained.weight.grad, weight.grad, rtol=1e-4, atol=1e-3)
    assert not trained.weight.grad[~trained.mask].any()


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_gradual_pruning_of_a_coarse_grid(scope):
    """Of a ternary weight all zeros go, and of the others as many as are to."""
    grid = torch.randint(-1, 2, (48, 128)).float()
    trained = layer()
    trained.begin_pruning(grid, engine.Prune(sparsity=0.5, scope=scope))
    kept = torch.ones_like(grid, dtype=torch.bool)
    for share in (0.3, 0.8, 1.0):
        trained.prune_on(share)
        assert not (trained.mask & ~kept).any() and not (trained.mask & (grid == 0)).any()
        kept = trained.mask.clone()
    assert trained.sparsity == pytest.approx(0.5, abs=0.01)


def test_output_and_gradient(by_kept):
    trained, x = layer(), torch.randn(70, 128)
    assert_as_its_weight_says(trained, x)
    assert (trained._kept is not None) == by_kept


def test_another_mask_is_taken_up(by_kept):
    x, other = torch.randn(70, 128), layer(0.6)
    trained = layer()
    assert_as_its_weight_says(trained, x)
    trained.load_state_dict(other.state_dict(), assign=True)
    assert_as_its_weight_says(trained, x)
    trained = layer(0.3)
    trained.begin_pruning(trained.weight, engine.Prune(sparsity=0.8))
    for share in (0.6, 0.7):
        trained.prune_on(share)
    assert_as_its_weight_says(trained, x)
    copied = copy.deepcopy(trained)
    copied.load_state_dict(layer(0.4).state_dict())
    assert_as_its_weight_says(copied, x)
    trained.prune_on(1.0)
    assert_as_its_weight_says(trained, x)


def test_training_after_inference(by_kept):
    trained, x = layer(), torch.randn(70, 128)
    with torch.inference_mode():
        trained(x)
        made_here = layer()
        assert made_here(x).shape == (70, 48)
    assert_as_its_weight_says(trained, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_the_output(by_kept, dtype):
    trained = layer(input_scale=torch.rand(128) + 0.1)
    assert trained(torch.randn(70, 128).to(dtype)).dtype == dtype
    double = layer(values=torch.float32).double()
    assert double(torch.randn(70, 128).double()).dtype == torch.float64


def test_inside_a_compiled_graph(by_kept):
    trained, x = layer(), torch.randn(70, 128)
    torch.testing.assert_close(torch.compile(trained, fullgraph=True, backend="aot_eager")(x), trained(x))

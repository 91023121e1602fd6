"""decompress_: the dense model that a compressed one stands for."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from models import ConvNet, Mlp, TinyLm, assert_unchanged, state_of
from torch import nn

import engine
from engine.formats import Bitmap, Block, Csr, DenseInt8, SemiStructured
from engine.nn import CompressedLinear

FORMATS = [
    (DenseInt8, {}),
    (DenseInt8, {"activation": "static", "input_scale": torch.linspace(0.02, 0.05, 33)}),
    (Bitmap, {"threshold": 0.1}),
    (Bitmap, {"threshold": 0.1, "values": torch.int8}),
    (Csr, {"threshold": 0.1}),
    (SemiStructured, {}),
    (Block, {"threshold": 0.1}),
]


@pytest.mark.parametrize(("format_type", "how"), FORMATS)
def test_every_format(format_type, how):
    layer = CompressedLinear.from_dense(nn.Linear(33, 20), format_type, **how).eval()
    bias, weight = layer.bias, layer.weight
    layer.note = "mine"
    model = nn.ModuleDict({"a": layer, "b": layer})
    assert engine.decompress_(model) is model
    dense = model["a"]
    assert type(dense) is nn.Linear and model["b"] is dense and not dense.training and dense.bias is bias
    x = torch.randn(3, 33)
    assert torch.equal(dense(x), F.linear(x, weight, bias)) and dense.weight.requires_grad


@pytest.mark.parametrize("kind", [Mlp, TinyLm, ConvNet])
def test_whole_models(kind):
    model = kind()
    names = {name: type(module) for name, module in model.named_modules()}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tied = len(list(model.parameters()))
    engine.compress_(model, engine.Recipe(engine.Prune(sparsity=0.5), engine.Quantize(), guard="none"))
    weights = {name: module.weight for name, module in model.named_modules() if hasattr(module, "format")}
    engine.decompress_(model)
    assert {name: type(module) for name, module in model.named_modules()} == names
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert len(list(model.parameters())) == tied
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in weights.items())
    engine.compress_(model, engine.Recipe(quantize=engine.Quantize(), guard="none"))  # it is a model like any other


def test_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(8, 4))
    engine.quantize_(model)
    x, weight, bias = torch.randn(2, 4), model[0].weight, model[0].bias
    engine.decompress_(model)
    assert type(model[0]) is conv1d
    assert torch.equal(model[0].weight, weight) and model[0].bias is bias and model[0](x).shape == (2, 8)


def test_refusals():
    with pytest.raises(ValueError, match="no compressed layer"):
        engine.decompress_(Mlp())
    layer = CompressedLinear.from_dense(nn.Linear(8, 8), DenseInt8)
    with pytest.raises(ValueError, match="the model is itself a CompressedLinear"):
        engine.decompress_(layer)
    model = nn.Sequential(copy.deepcopy(layer), layer)
    layer.register_forward_hook(lambda *_: None)
    before = state_of(model)
    with pytest.raises(ValueError, match="1: has hooks"):
        engine.decompress_(model)
    assert_unchanged(model, before)
    pruned = nn.Sequential(CompressedLinear.from_dense(nn.Linear(8, 8), Bitmap, threshold=0.1))
    pruned[0].values.register_hook(lambda grad: grad)
    with pytest.raises(ValueError, match="0: has hooks"):
        engine.decompress_(pruned)


EXPORT = """
import copy, numpy, onnxruntime, sys, torch
import engine

model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).eval()
engine.compress_(model, engine.Recipe(engine.Prune(sparsity=0.5), engine.Quantize(), guard="none"))
dense, x = engine.decompress_(copy.deepcopy(model)), torch.randn(3, 16)
torch.onnx.export(dense, (x,), sys.argv[1], dynamo=True, verbose=False)
session = onnxruntime.InferenceSession(sys.argv[1])
(y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
assert numpy.allclose(y, dense(x).detach().numpy(), rtol=1e-5, atol=1e-5)
assert (model(x) - dense(x)).norm() < 0.03 * dense(x).norm()
"""


def test_onnx(tmp_path):
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    path = str(tmp_path / "model.onnx")
    done = subprocess.run([sys.executable, "-c", EXPORT, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

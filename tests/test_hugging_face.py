"""What Hugging Face's models ask of compressed layers: Conv1D, and weights that are only asked for their dtype."""

import copy
import pickle
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import engine
from engine import Prune, Quantize, Recipe, cli
from engine.checkpoint import CheckpointFile
from engine.formats import Bitmap, DenseInt8
from engine.nn import CompressedLinear

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
RECIPE = Recipe(prune=Prune(sparsity=0.5), quantize=Quantize(), guard="none")


class Gpt(nn.Module):
    """The names and shapes of GPT-2: square and other Conv1D weights, an embedding tied to the output layer."""

    def __init__(self, conv1d: type = Conv1D) -> None:
        super().__init__()
        self.wte = nn.Embedding(100, 64)
        self.h = nn.ModuleList()
        for _ in range(2):
            attention = nn.ModuleDict({"c_attn": conv1d(192, 64), "c_proj": conv1d(64, 64)})
            self.h.append(nn.ModuleDict({"attn": attention, "mlp": nn.ModuleDict({"c_fc": conv1d(96, 64)})}))
            self.h[-1]["mlp"]["c_proj"] = conv1d(64, 96)
        self.lm_head = nn.Linear(64, 100, bias=False)
        self.lm_head.weight = self.wte.weight
        for bias in (p for n, p in self.named_parameters() if n.endswith("bias")):
            nn.init.normal_(bias, std=0.02)

    def forward(self, tokens):
        x = self.wte(tokens)
        for block in self.h:
            x = x + block["attn"]["c_proj"](block["attn"]["c_attn"](x)[..., 64:128])
            x = x + block["mlp"]["c_proj"](torch.relu(block["mlp"]["c_fc"](x)))
        return self.lm_head(x)


TOKENS = torch.arange(12).reshape(2, 6) * 7


def as_linears(model: Gpt) -> Gpt:
    """The same model of nn.Linear."""
    twin = Gpt(lambda n, k: nn.Linear(k, n))
    state = model.state_dict()
    conv1d = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Conv1D)}
    twin.load_state_dict({n: t.t() if n in conv1d else t for n, t in state.items()})
    return twin


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        Recipe(prune=Prune(sparsity=0.5, importance="obs"), quantize=Quantize("static", smooth=0.5), guard="none"),
        Recipe(prune=Prune(threshold=0.01, pattern="block"), guard="none"),
    ],
    ids=("bitmap int8", "obs, smooth", "block"),
)
def test_conv1d_is_the_linear_layer_that_it_is(recipe, tmp_path):
    model = Gpt().eval()
    twin, fresh = as_linears(model).eval(), Gpt().eval()
    seen = [engine.calibrate(m, [TOKENS], second_moment=True, progress=False) for m in (model, twin)]
    report = engine.compress_(model, recipe, calibration=seen[0])
    expected = engine.compress_(twin, recipe, calibration=seen[1])
    assert [layer.name for layer in report.layers] == [layer.name for layer in expected.layers]
    assert torch.equal(model(TOKENS), twin(TOKENS))
    fc = model.h[0]["mlp"]["c_fc"]
    assert type(fc) is CompressedLinear and fc.weight.shape == (64, 96) and fc.in_features == 64
    assert torch.equal(fc.weight.t(), twin.h[0]["mlp"]["c_fc"].weight)
    path = tmp_path / "small.safetensors"
    engine.save(model, path, recipe)
    assert torch.equal(engine.load_(fresh, path)(TOKENS), model(TOKENS))
    assert torch.equal(engine.load_(copy.deepcopy(model), path)(TOKENS), model(TOKENS))
    with pytest.raises(engine.CheckpointError, match=r"c_attn.weight: has shape \[64, 192\], the model \[192, 64\]"):
        engine.load_(twin if type(twin.h[0]["attn"]["c_attn"]) is nn.Linear else as_linears(Gpt()), path)
    with pytest.raises(engine.CheckpointError, match=r"c_attn.weight: is the weight of a Conv1D, the model has no"):
        engine.load_(twin, path)


def test_conv1d_by_names_and_biases(tmp_path):
    model, fresh = Gpt().eval(), Gpt().eval()
    path, small = tmp_path / "model.safetensors", tmp_path / "small.safetensors"
    save_file({n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}, path)
    options = ["compress", str(path), "-o", str(small), "--sparsity", "0.5", "--int8", "--guard", "none"]
    result = CliRunner().invoke(cli.app, options)
    assert result.exit_code == 0, result.stderr
    assert {n for n, w in CheckpointFile(small).weights.items() if w.transposed} == {
        f"h.{i}.{n}.weight" for i in (0, 1) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    engine.compress_(model, RECIPE)
    assert torch.equal(engine.load_(fresh, small)(TOKENS), model(TOKENS))
    # A square Linear among Linears is none; nor is a layer with a bias an embedding, whatever its name.
    names = (("a", nn.Linear(64, 32)), ("c_proj", nn.Linear(64, 64)), ("embed_project", nn.Linear(32, 64)))
    linears = {f"{name}.{k}": t for name, layer in names for k, t in layer.state_dict().items()}
    save_file(linears, path)
    assert CliRunner().invoke(cli.app, [*options, "--force"]).exit_code == 0
    found = CheckpointFile(small).weights.values()
    assert len(found) == 3 and not any(w.transposed or w.format is not Bitmap for w in found)


def test_conv1d_is_pruned_and_trained(tmp_path):
    model = Gpt()
    before = model.h[0]["mlp"]["c_fc"].weight.detach().clone()
    assert engine.prune_(copy.deepcopy(model), sparsity=0.5)["h.0.mlp.c_fc"] == pytest.approx(0.5)
    engine.prune_(model, sparsity=0.25, scope="row")
    zeros = model.h[0]["mlp"]["c_fc"].weight == 0
    assert (zeros.sum(0) == 16).all() and torch.equal(model.h[0]["mlp"]["c_fc"].weight[~zeros], before[~zeros])
    engine.distill(model, copy.deepcopy(model), [TOKENS], steps=1, recipe=RECIPE, progress=False)
    assert model.h[0]["mlp"]["c_fc"].transposed and model.h[0]["mlp"]["c_fc"].weight.shape == (64, 96)


def test_a_class_that_only_has_the_name_is_left_alone():
    class Other(nn.Module):
        def forward(self, x):
            return x

    Other.__name__ = "Conv1D"
    model = nn.Sequential(nn.Linear(64, 64), Other())
    report = engine.compress_(model, Recipe(quantize=Quantize(), guard="none"))
    assert report.left_alone == {"1": "its class is not Hugging Face's Conv1D, which may compute something else"}


def test_a_smoothed_weight_that_is_tied_is_looked_up_as_it_was():
    model = Gpt().eval()
    rows = model.wte(TOKENS)
    seen = engine.calibrate(model, [TOKENS], targets=("Linear", "Embedding"), progress=False)
    engine.compress_(model, Recipe(quantize=Quantize("static", smooth=0.5), guard="none"), calibration=seen)
    assert model.wte.input_scale.dim() == 1 and model.wte.values is model.lm_head.values
    assert (model.wte(TOKENS) - rows).norm() < 0.02 * rows.norm()
    assert torch.equal(model.wte(TOKENS), model.wte.weight[TOKENS])


@pytest.mark.parametrize(
    "how", [(DenseInt8, {}), (Bitmap, {"threshold": 0.02}), (Bitmap, {"threshold": 0.02, "values": torch.int8})]
)
def test_asking_a_weight_for_its_dtype_makes_no_weight(how, monkeypatch):
    layer = CompressedLinear.from_dense(nn.Linear(32, 16), how[0], **how[1]).to(torch.bfloat16)
    made = []
    to_dense = how[0].to_dense
    monkeypatch.setattr(how[0], "to_dense", lambda self, *args: made.append(1) or to_dense(self, *args))
    with torch.no_grad():
        weight = layer.weight
        assert isinstance(weight, torch.Tensor) and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
        assert weight.shape == (16, 32) and weight.size(1) == 32 and weight.ndim == 2 and not made
        assert torch.equal(weight, to_dense(layer.format, torch.bfloat16)) and len(made) == 1
        assert type(weight) is torch.Tensor and weight.sum() == weight.clone().sum() and len(made) == 1
        weight[0] = 0
        assert not weight[0].any() and layer.weight[0].any()
        assert isinstance(nn.Parameter(layer.weight), nn.Parameter)


def below_torch_function(weight):
    with torch._C.DisableTorchFunctionSubclass():
        return torch.mul(weight, 1)


def referred_to(weight):
    reference = weakref.ref(weight)
    weight.mul_(2)
    assert weight.dtype == torch.float32 and reference() is weight
    return weight / 2


@pytest.mark.parametrize(
    "use",
    [
        *(torch.clone, copy.deepcopy, nn.Parameter, below_torch_function, referred_to, lambda w: w.data),
        *(lambda w: torch.from_numpy(w.numpy()), lambda w: pickle.loads(pickle.dumps(w)), torch.from_dlpack),
        *(torch.vmap(lambda row: row * 1), lambda w: torch.empty(16, 32).copy_(w), lambda w: torch.stack([*w])),
    ],
)
def test_a_weight_is_an_ordinary_tensor_to_all_that_use_it(use):
    layer = CompressedLinear.from_dense(nn.Linear(32, 16), DenseInt8)
    for mode in (torch.enable_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(use(layer.weight), layer.format.to_dense())


def test_a_weight_read_before_a_change_is_not_the_one_after():
    layer, other = (CompressedLinear.from_dense(nn.Linear(8, 4), DenseInt8) for _ in range(2))
    early, moved = layer.weight, layer.weight
    before = layer.weight.clone()
    layer.half().float()
    assert torch.equal(moved, before)
    layer.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="has been written to since"):
        early.sum()
    assert torch.equal(layer.weight, other.weight)


def test_a_weight_stays_differentiable():
    layer = CompressedLinear.from_dense(nn.Linear(8, 4), Bitmap, threshold=0.1)
    layer.weight.sum().backward()
    assert torch.equal(layer.values.grad, torch.ones_like(layer.values))


def test_gpt2_as_its_own_file_is_named(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=8)
    make = transformers.GPT2LMHeadModel
    model, path, small = make(config).eval(), tmp_path / "gpt2.safetensors", tmp_path / "small.safetensors"
    state = {n.removeprefix("transformer."): t.clone() for n, t in model.transformer.state_dict().items()}
    save_file(state | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}, path)  # a mask, of which the model knows no more
    assert CliRunner().invoke(cli.app, ["compress", str(path), "-o", str(small), "--int8"]).exit_code == 0
    engine.compress_(model, Recipe(quantize=Quantize(), guard="size"))
    for whole, name in ((make(config), "transformer."), (transformers.GPT2Model(config), "")):
        loaded = engine.load_(whole, small).state_dict()
        assert torch.equal(loaded[f"{name}h.0.attn.c_proj.values"], model.transformer.h[0].attn.c_proj.values)


def test_names_that_transformers_changes_as_it_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    make = transformers.ViTForImageClassification
    config = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
    model, fresh, x = make(config).eval(), make(config).eval(), torch.randn(1, 3, 16, 16)
    model.save_pretrained(tmp_path / "whole")
    assert any("attention.query" in name for name in CheckpointFile(tmp_path / "whole" / "model.safetensors").plain)
    small = tmp_path / "small"
    result = CliRunner().invoke(cli.app, ["compress", str(tmp_path / "whole"), "-o", str(small), "--int8"])
    assert result.exit_code == 0, result.stderr
    engine.compress_(model, Recipe(quantize=Quantize(), guard="size"))
    engine.load_(fresh, small / "model.safetensors")
    assert torch.equal(fresh(x).logits, model(x).logits)

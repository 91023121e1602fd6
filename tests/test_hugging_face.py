"""What Hugging Face's models ask of compressed layers: Conv1D, and the names of their files."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import engine
from engine import CheckpointError, Prune, Quantize, Recipe, cli
from engine._task import load_task
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


def test_conv1d_calls_its_input_x():
    class Calling(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = Conv1D(64, 32)

        def forward(self, x):
            return self.c(x=x)

    recipe, x = Recipe(quantize=Quantize(), guard="none"), torch.randn(3, 32)
    model, student = Calling(), Calling()
    y = model(x)
    engine.compress_(model, recipe, x)
    assert (model(x) - y).norm() < 0.02 * y.norm() and torch.equal(model(x), model.c(x))
    engine.distill(student, None, [x], steps=1, recipe=recipe, loss=lambda y, x: y.sum(), progress=False)
    with pytest.raises(TypeError, match="CompressedLinear: input: is missing"):
        CompressedLinear.from_dense(nn.Linear(4, 4), DenseInt8)(x=x)


def test_a_layer_and_an_embedding_are_not_taken_for_one_another(tmp_path):
    layer = nn.Sequential(Conv1D(10, 4))
    layer[0].bias = None
    engine.compress_(layer, Recipe(quantize=Quantize(), guard="none"))
    engine.save(layer, tmp_path / "conv1d.safetensors")
    assert CheckpointFile(tmp_path / "conv1d.safetensors").weights["0.weight"].transposed
    with pytest.raises(CheckpointError, match="is the weight of a Conv1D, the model has no Conv1D there"):
        engine.load_(nn.Sequential(nn.Embedding(4, 10)), tmp_path / "conv1d.safetensors")


def test_a_weight_stays_differentiable():
    layer = CompressedLinear.from_dense(nn.Linear(8, 4), Bitmap, threshold=0.1)
    layer.weight.sum().backward()
    assert torch.equal(layer.values.grad, torch.ones_like(layer.values))


def test_a_name_that_two_tensors_would_get_is_nobodys(tmp_path):
    fc = {"fc.weight": torch.ones(4, 4), "fc.bias": torch.ones(4)}
    model = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    before = copy.deepcopy(model.state_dict())
    for present in (fc, {"fc.weight": fc["fc.weight"]}):
        save_file(
            present | {f"teacher.{name}": 9 * tensor for name, tensor in fc.items()}, tmp_path / "two.safetensors"
        )
        with pytest.raises(CheckpointError, match=r"unexpected: teacher\.fc\.bias"):
            engine.load_(model, tmp_path / "two.safetensors")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_tied_to_no_layers_weight_stays_dense(tmp_path):
    def make():
        model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Module(), "c": nn.Linear(64, 64)})
        model["b"].projection = model["a"].weight
        return model

    model, path, small = make(), tmp_path / "model.safetensors", tmp_path / "small.safetensors"
    engine.save(model, path)
    result = CliRunner().invoke(cli.app, ["compress", str(path), "-o", str(small), "--int8"])
    assert result.exit_code == 0, result.stderr
    loaded = engine.load_(make(), small)
    assert type(loaded["c"]) is CompressedLinear and torch.equal(loaded["b"].projection, model["a"].weight)
    assert loaded["a"].weight is loaded["b"].projection


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


def test_a_folder_is_trained_with_its_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(vocab_size=len(words), num_labels=3, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    texts = tmp_path / "texts.txt"
    texts.write_text("a\nb\na b\nb a\n")
    task = load_task(str(tmp_path / "model"), texts, 1, 8, 1)
    assert type(task.model) is transformers.BertForSequenceClassification
    assert task.model(**task.example_inputs).logits.shape == (1, 3)
    small = tmp_path / "small"
    words = ["distill", str(tmp_path / "model"), "-o", str(small), "--texts", str(texts), "--int8", "--steps", "1"]
    words += ["--batch", "1", "--measured", "1"]
    assert (
        "into the model itself" in CliRunner().invoke(cli.app, [*words[:3], str(tmp_path / "model"), *words[4:]]).stderr
    )
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.stderr
    assert transformers.AutoConfig.from_pretrained(small).num_labels == 3  # the model can be built from what is there
    with pytest.raises(CheckpointError, match="compressed already"):
        load_task(str(small), texts, 1, 8, 1)
    texts.write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match=r"texts\.txt: expected text in UTF-8"):
        load_task(str(tmp_path / "model"), texts, 1, 8, 1)
    transformers.T5Config(vocab_size=8, d_model=8, num_layers=1).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"needs inputs for both: use file\.py:function"):
        load_task(str(tmp_path / "t5"), texts, 1, 8, 1)

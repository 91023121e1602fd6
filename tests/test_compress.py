"""compress_, prune_, quantize_: what they do, what they leave alone, and that a failure changes nothing."""

import copy
import json
import struct
import types

import numpy as np
import pytest
import torch
from models import ConvNet, Mlp, TinyLm, assert_unchanged, state_of
from torch import nn

import engine
from engine import Prune, Quantize, Recipe
from engine.compress import measure
from engine.compress.candidates import cuts_of
from engine.compress.report import Layer, Report, _short_names
from engine.compress.targets import find_targets
from engine.nn import CompressedConv2d, CompressedEmbedding, CompressedLinear
from engine.nn.conv2d import as_matrix

X = torch.randn(4, 256)

BOTH = {"prune": Prune(sparsity=0.5), "quantize": Quantize(), "guard": "none"}


def test_bitmap_and_int8():
    model, x = Mlp(), torch.randn(4, 256)
    before = model(x)
    report = engine.compress_(model, Recipe(**BOTH), x)
    assert [type(m) for m in (model.first, model.second, model.head)] == [CompressedLinear] * 3
    assert model.first.format.label == "bitmap int8"
    assert model.first.format.sparsity == pytest.approx(0.5, abs=1e-3)
    assert report.bytes_after < 0.2 * report.bytes_before
    dense = copy.deepcopy(model)  # what the compressed layers stand for, in plain PyTorch
    for name, module in model.named_children():
        twin = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        twin.load_state_dict({"weight": module.weight, **({"bias": module.bias} if module.bias is not None else {})})
        setattr(dense, name, twin)
    assert (model(x) - dense(x)).norm() / dense(x).norm() < 0.03 < (model(x) - before).norm() / before.norm()
    for layer in report.layers:
        assert layer.seconds_before > 0 and layer.seconds_after > 0 and 0 < layer.error < 0.5
    assert report.seconds_before > 0 and report.seconds_after > 0


def test_recipes_give_their_formats():
    x = torch.randn(4, 256)
    for recipe, label, quantize_input in [
        (Recipe(quantize=Quantize(), guard="none"), "int8", True),
        (Recipe(quantize=Quantize("none"), guard="none"), "int8", False),
        (Recipe(quantize=Quantize("static"), guard="none"), "int8", True),
        (Recipe(prune=Prune(threshold=0.02), guard="none"), "bitmap float32", None),
        (Recipe(prune=Prune(sparsity=0.7), quantize=Quantize("static"), guard="none"), "bitmap int8", None),
    ]:
        model = Mlp()
        engine.compress_(model, recipe, x)
        format = model.first.format
        assert format.label == label and getattr(format, "quantize_input", None) == quantize_input
        static = recipe.quantize is not None and recipe.quantize.activation == "static"
        assert (getattr(format, "input_scale", None) is not None) == static
        if static:
            assert format.input_scale.item() == pytest.approx(x.abs().max().item() / 127)


@pytest.mark.parametrize("scope", ["row", "layer", "model"])
def test_sparsity_by_scope(scope):
    model = Mlp()
    with torch.no_grad():
        model.first.weight.mul_(10)
    weights = {n: m.weight.detach().clone() for n, m in model.named_children()}
    engine.compress_(model, Recipe(prune=Prune(sparsity=0.6, scope=scope), guard="none"))
    kept = {name: module.weight != 0 for name, module in model.named_children()}
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, torch.where(kept[name], weight, 0.0))
    total = sum(k.sum().item() for k in kept.values()) / sum(k.numel() for k in kept.values())
    assert total == pytest.approx(0.4, abs=2e-3)
    if scope == "row":
        assert all(((k.sum(1) - 0.4 * k.shape[1]).abs() <= 1).all() for k in kept.values())
    if scope == "model":
        assert kept["first"].float().mean() > 0.7 > 0.3 > kept["second"].float().mean()


def test_targets_and_ignore():
    for how, compressed in [
        ({"targets": ("Linear",)}, {"first", "second", "head"}),
        ({"targets": ("first",)}, {"first"}),
        ({"targets": ("re:.*e",)}, {"second", "head"}),
        ({"ignore": ("head",)}, {"first", "second"}),
        ({"ignore": ("re:f", "second")}, {"head"}),
    ]:
        model = Mlp()
        report = engine.compress_(model, Recipe(**BOTH, **how))
        assert {n for n, m in model.named_children() if isinstance(m, CompressedLinear)} == compressed
        assert {layer.name for layer in report.layers} == compressed
    assert "ignored by 're:f'" in str(report)


def test_a_block_stands_for_its_layers():
    model = TinyLm()
    engine.compress_(model, Recipe(**BOTH, targets=("block",)))
    assert isinstance(model.block[0], CompressedLinear) and isinstance(model.block[2], CompressedLinear)
    assert isinstance(model.lm_head, nn.Linear)


def test_tied_weights_stay_tied():
    model, tokens = TinyLm(), torch.randint(0, 100, (2, 7))
    report = engine.compress_(model, Recipe(**BOTH), tokens)
    assert isinstance(model.embed, CompressedEmbedding) and isinstance(model.lm_head, CompressedLinear)
    assert model.embed.values is model.lm_head.values and model.embed.scale is model.lm_head.scale
    tied = next(layer for layer in report.layers if layer.name == "embed")
    assert tied.names == ("embed", "lm_head") and tied.format == "int8"
    assert report.bytes_after == sum(p.numel() * p.element_size() for p in model.parameters())
    model.to(torch.bfloat16)
    assert model.embed.values is model.lm_head.values
    assert model(tokens).dtype == torch.bfloat16


def test_half_a_tie_is_left_alone():
    model = TinyLm()
    report = engine.compress_(model, Recipe(**BOTH, ignore=("lm_head",)))
    assert "shared with lm_head.weight" in report.left_alone["embed"]
    assert model.embed.weight is model.lm_head.weight


def test_pruning_alone_leaves_embeddings_and_their_ties():
    model = TinyLm()
    report = engine.compress_(model, Recipe(prune=Prune(sparsity=0.5), guard="none"))
    assert "never pruned" in report.left_alone["embed"] and "never pruned" in report.left_alone["lm_head"]
    assert isinstance(model.block[0], CompressedLinear)


def test_one_module_under_two_names_stays_one():
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = engine.compress_(model, Recipe(**BOTH), torch.randn(3, 64))
    assert model[0] is model[2] and isinstance(model[0], CompressedLinear)
    assert report.layers[0].names == ("0", "2")


def test_size_guard():
    model = nn.Sequential(nn.Linear(512, 64), nn.Linear(64, 2))
    report = engine.compress_(model, Recipe(prune=Prune(threshold=0.0), guard="size"))
    assert not report.layers and all("not smaller" in reason for reason in report.left_alone.values())
    assert type(model[0]) is nn.Linear


def fake_times(monkeypatch, dense, compressed, model_times=(1.0, 0.5)):
    """The guard decides by numbers; here they are given."""
    monkeypatch.setattr(measure, "time_layers", lambda m, i, c: ({n: (dense[n], compressed[n]) for n in c}, (1.0, 1.0)))
    monkeypatch.setattr(measure, "time_model", lambda m, i, c: model_times)


def test_speed_guard_keeps_what_wins(monkeypatch):
    fake_times(monkeypatch, {"first": 0.2, "second": 0.2, "head": 0.1}, {"first": 0.1, "second": 0.3, "head": 0.1005})
    model = Mlp()
    report = engine.compress_(model, Recipe(**{**BOTH, "guard": "speed"}), torch.randn(4, 256))
    assert isinstance(model.first, CompressedLinear) and isinstance(model.head, CompressedLinear)
    assert type(model.second) is nn.Linear
    reasons = ["not faster: 200000 → 300000 µs as bitmap int8", "not faster: 200000 → 300000 µs as int8"]
    assert report.left_alone == {"second": "; ".join(reasons)}
    assert "left alone (1):" in str(report)


def test_speed_guard_quantises_without_pruning_where_pruning_does_not_win(monkeypatch):
    def time_layers(model, inputs, candidates):
        assert inputs is x
        slow = {"bitmap int8": ("first", "second"), "int8": ("second",)}
        times = {n: (0.2, 0.3 if n in slow[c.format.label] else 0.1) for n, c in candidates.items()}
        in_place.append({n for n, m in model.named_modules() if isinstance(m, CompressedLinear)})
        return times, (1.0, 1.0)

    monkeypatch.setattr(measure, "time_layers", time_layers)
    monkeypatch.setattr(measure, "time_model", lambda m, i, c: (1.0, 0.5))
    model, x, in_place = Mlp(), torch.randn(4, 256), []
    weight = model.first.weight.detach().clone()
    report = engine.compress_(model, Recipe(**{**BOTH, "guard": "speed"}), x)
    assert in_place == [set(), {"head"}]  # the second time the layer that won already is in place
    assert [(layer.name, layer.format) for layer in report.layers] == [("first", "int8"), ("head", "bitmap int8")]
    q, scale = engine.ops.int8_quantize(weight)
    assert torch.equal(model.first.format.values, q) and torch.equal(model.first.format.scale, scale)
    note = "not pruned: not faster: 200000 → 300000 µs as bitmap int8"
    assert report.layers[0].note == note and f"first: {note}" in str(report) and not report.layers[1].note
    assert set(report.left_alone) == {"second"} and report.left_alone["second"].endswith("as int8")
    assert type(model.second) is nn.Linear and model.first.in_features == 256


def test_speed_guard_gives_up_where_the_model_is_not_faster(monkeypatch):
    fake_times(
        monkeypatch,
        dict.fromkeys(("first", "second", "head"), 0.2),
        dict.fromkeys(("first", "second", "head"), 0.1),
        (1.0, 1.1),
    )
    model = Mlp()
    before = state_of(model)
    report = engine.compress_(model, Recipe(**{**BOTH, "guard": "speed"}), torch.randn(4, 256))
    assert not report.layers and len(report.left_alone) == 3 and report.bytes_after == report.bytes_before
    assert_unchanged(model, before)


def test_speed_guard_really_measures(monkeypatch):
    model, x = Mlp(), torch.randn(4, 256)
    measured: dict[str, list] = {"second": [], "head": []}

    def time_layers(*arguments, time_layers=measure.time_layers):
        layers, whole = time_layers(*arguments)
        for name, times in layers.items():
            measured[name].append(times)
        return layers, whole

    monkeypatch.setattr(measure, "time_layers", time_layers)
    model.first.register_forward_hook(lambda *_: None)  # a hooked layer is left alone
    report = engine.compress_(model, Recipe(**{**BOTH, "guard": "speed"}), x)
    assert report.left_alone["first"] == "it has hooks (_forward_hooks), which a replacement would lose"
    assert measured["second"] and all(dense > 0 and small > 0 for times in measured.values() for dense, small in times)
    for layer in report.layers:
        assert (layer.seconds_before, layer.seconds_after) in measured[layer.name]
    for name in {"second", "head"} - {layer.name for layer in report.layers}:
        assert "faster" in report.left_alone[name]


def test_sides_take_turns_and_keep_their_times(monkeypatch):
    clock, calls = [0.0], []

    class Named(nn.Module):
        def __init__(self, name, seconds):
            super().__init__()
            self.name, self.seconds = name, seconds

        def forward(self, x):
            calls.append(self.name)
            clock[0] += self.seconds
            return x

    monkeypatch.setattr(measure, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    model, x = nn.Sequential(Named("a", 1.0)), torch.zeros(1)
    b, c = {"0": Named("b", 2.0)}, {"0": Named("c", 3.0)}
    layers, whole = measure.time_layers(model, x, b)
    assert layers == {"0": (1.0, 2.0)} and whole == (1.0, 2.0)
    assert "".join(calls[:10]) == "abbabaabab" and len(calls) % 4 == 2  # the round of warming up, then as many of each
    firsts = calls[2::2]
    assert firsts.count("a") == firsts.count("b") >= measure.LEAST_ROUNDS // 2
    calls.clear()
    assert measure.time_variants(model, x, [{}, b, c]) == [1.0, 2.0, 3.0]
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds[:7] == ["abc", "cba", "bca", "acb", "cab", "bac", "abc"]


def test_layers_that_the_inputs_never_reach():
    model = Mlp()
    model.spare = nn.Linear(256, 256)
    report = engine.compress_(model, Recipe(**{**BOTH, "guard": "speed"}), torch.randn(4, 256))
    assert "never reach" in report.left_alone["spare"]
    model = Mlp()
    model.spare = nn.Linear(256, 256)
    report = engine.compress_(model, Recipe(quantize=Quantize("static"), guard="none"), torch.randn(4, 256))
    assert "calibrated on never reach it" in report.left_alone["spare"]


def with_nan(model):
    with torch.no_grad():
        model.second.weight[3, 4] = torch.nan


@pytest.mark.parametrize(
    ("recipe", "inputs", "spoil", "message"),
    [
        (Recipe(**{**BOTH, "guard": "speed"}), None, None, "give example_inputs="),
        (Recipe(quantize=Quantize("static"), guard="none"), None, None, "calibrated on example inputs"),
        (Recipe(**BOTH, targets=("Linear", "Conv9d")), None, None, "'Conv9d' matches no module"),
        (Recipe(**BOTH, targets=("Embedding",)), None, None, "'Embedding' matches no module"),
        (Recipe(**BOTH, targets=("re:.*nowhere",)), None, None, "matches no module"),
        (Recipe(**BOTH, targets=("ReLU",)), None, lambda m: setattr(m, "act", nn.ReLU()), "which can't be compressed"),
        (Recipe(**BOTH, targets=("re:(",)), None, None, "is no regular expression"),
        (Recipe(**BOTH), None, with_nan, "second: its weight holds a NaN"),
        (Recipe(**BOTH), torch.randn(4, 99), None, "shape|size"),
    ],
)
def test_errors_change_nothing(recipe, inputs, spoil, message):
    model = Mlp().train()
    if spoil:
        spoil(model)
    before = {k: v for k, v in state_of(model).items() if k != "tensors"}
    with pytest.raises((ValueError, RuntimeError), match=message):
        engine.compress_(model, recipe, inputs)
    assert {k: v for k, v in state_of(model).items() if k != "tensors"} == before


def test_compressed_twice_is_an_error():
    model = Mlp()
    engine.compress_(model, Recipe(**BOTH))
    before = state_of(model)
    for again in (lambda: engine.compress_(model, Recipe(**BOTH)), lambda: engine.prune_(model, sparsity=0.5)):
        with pytest.raises(ValueError, match="compressed already: first is one of 3"):
            again()
    assert_unchanged(model, before)


@pytest.mark.parametrize("at", [1, 2, 5, 20, 40])
def test_an_interrupt_anywhere_changes_nothing(monkeypatch, at):
    """Ctrl-C at the n-th forward pass, which is in every stage for some n."""
    model, x = Mlp().train(), torch.randn(4, 256)
    before, calls = state_of(model), [0]
    run = measure._call

    def interrupted(*args):
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(measure, "_call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.compress_(model, Recipe(prune=Prune(sparsity=0.5), quantize=Quantize("static"), guard="none"), x)
    assert_unchanged(model, before)


def test_an_interrupt_while_replacing_changes_nothing():
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32), nn.Linear(16, 16))
    before, switch = state_of(model), model[0].activation_relu_or_gelu

    class Interrupting(dict):
        def items(self):
            yield from super().items()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure.replace_(model, Interrupting({"0.linear1": nn.Linear(16, 32), "1": nn.Linear(16, 16)}))
    assert_unchanged(model, before)
    assert model[0].activation_relu_or_gelu == switch


def test_a_layer_by_itself_is_refused():
    with pytest.raises(ValueError, match=r"itself a Linear.*CompressedLinear\.from_dense"):
        engine.compress_(nn.Linear(64, 64), Recipe(**BOTH))


def test_transformer_encoder_layer_uses_the_compressed_layers():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    x = torch.randn(2, 9, 64)
    with torch.inference_mode():
        dense = layer(x)
        engine.compress_(layer, Recipe(**BOTH), x)
        calls = []
        layer.linear1.forward = lambda x, f=layer.linear1.forward: calls.append(1) or f(x)
        assert (layer(x) - dense).norm() / dense.norm() < 0.3
    assert calls


def test_inputs_of_every_kind():
    for inputs in (torch.randn(4, 256), (torch.randn(4, 256),), {"x": torch.randn(4, 256)}):
        assert engine.compress_(Mlp(), Recipe(**BOTH), inputs).seconds_after > 0


def test_half_precision_models():
    for dtype in (torch.float16, torch.bfloat16):
        model, x = Mlp().to(dtype), torch.randn(4, 256, dtype=dtype)
        report = engine.compress_(model, Recipe(**BOTH), x)
        assert model(x).dtype == dtype and all(layer.error < 0.5 for layer in report.layers)
    model = Mlp().double()
    report = engine.compress_(model, Recipe(**BOTH))
    assert set(report.left_alone.values()) == {"its weight is float64"}


def test_prune_sets_zeros():
    model = Mlp()
    shares = engine.prune_(model, sparsity=0.75)
    assert shares.keys() == {"first", "second", "head"}
    for name, share in shares.items():
        assert share == pytest.approx(0.75, abs=1e-3)
        assert (model.get_submodule(name).weight == 0).float().mean().item() == pytest.approx(share)
    model = Mlp()
    before = model.first.weight.detach().clone()
    engine.prune_(model, threshold=0.03)
    assert torch.equal(model.first.weight, torch.where(before.abs() > 0.03, before, 0.0))
    with pytest.raises(ValueError, match="either a Prune or"):
        engine.prune_(model, Prune(sparsity=0.5), sparsity=0.5)
    with pytest.raises(ValueError, match="match no Linear"):
        engine.prune_(TinyLm(tied=False), sparsity=0.5, targets=("embed",))


def test_prune_then_compress_keeps_the_pattern():
    model = Mlp()
    engine.prune_(model, sparsity=0.6)
    zero = model.first.weight == 0
    engine.compress_(model, Recipe(prune=Prune(threshold=0.0), guard="none"))
    assert torch.equal(model.first.weight == 0, zero)


def test_quantize():
    model = TinyLm(tied=False)
    report = engine.quantize_(model)
    assert {layer.format for layer in report.layers} == {"int8"} and len(report.layers) == 4
    assert isinstance(model.embed, CompressedEmbedding)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prune(), "exactly one of"),
        (lambda: Prune(sparsity=0.5, threshold=0.1), "exactly one of"),
        (lambda: Prune(sparsity=1.0), r"in \[0, 1\), got 1.0"),
        (lambda: Prune(sparsity=-0.1), r"in \[0, 1\)"),
        (lambda: Prune(sparsity=float("nan")), r"in \[0, 1\)"),
        (lambda: Prune(threshold=-1.0), "at least 0"),
        (lambda: Prune(sparsity=0.5, scope="galaxy"), "scope: expected one of row, layer, model"),
        (lambda: Prune(sparsity=0.5, pattern="3:7"), "pattern: expected one of"),
        (lambda: Quantize("loud"), "activation: expected one of"),
        (lambda: Recipe(), "nothing to do"),
        (lambda: Recipe(quantize=Quantize(), guard="dog"), "guard: expected one of"),
        (lambda: Recipe(prune=Prune(sparsity=0.5), quantize=Quantize("none")), "need int8 activations"),
        (lambda: Recipe(quantize=Quantize(), targets="Linear"), "tuple of strings"),
        (lambda: Recipe.from_dict({"quantize": {"activation": "dynamic"}, "speed": 3}), "keys among"),
    ],
)
def test_bad_recipes(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_recipe_round_trip():
    recipe = Recipe(prune=Prune(sparsity=0.5, scope="row"), quantize=Quantize("static"), ignore=("re:.*head",))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_report_files(tmp_path):
    report = engine.compress_(Mlp(), Recipe(**BOTH, ignore=("head",)), torch.randn(4, 256))
    for suffix in (".json", ".png", ".html"):
        report.save(tmp_path / f"report{suffix}")
    values = json.loads((tmp_path / "report.json").read_text())
    assert [layer["name"] for layer in values["layers"]] == ["first", "second"] and "head" in values["left_alone"]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page and "ignored by" in page and "http" not in page
    with pytest.raises(ValueError, match=r"\.json, \.png or \.html"):
        report.save(tmp_path / "report.pdf")


def test_what_no_target_means_is_told(tmp_path):
    attention = nn.MultiheadAttention(64, 2)  # two matrices that no Linear holds
    model = nn.ModuleDict({"a": attention, "b": nn.Linear(64, 64), "c": nn.Linear(64, 64)})
    report = engine.compress_(model, Recipe(quantize=Quantize(), ignore=("c",), guard="none"))
    assert report.others == {"a.in_proj_weight": 4 * 3 * 64 * 64, "a.out_proj.weight": 4 * 64 * 64}
    assert "meant by no target: 65.5 kB in a.in_proj_weight, a.out_proj.weight" in str(report)
    report.save(tmp_path / "report.html")
    assert "meant by no target: 65.5 kB" in (tmp_path / "report.html").read_text()


def test_a_report_of_nothing_and_of_long_names(tmp_path):
    report = engine.compress_(Mlp(4, 4), Recipe(prune=Prune(threshold=0.0), guard="size"))
    report.save(tmp_path / "empty.html")
    page = (tmp_path / "empty.html").read_text()
    assert "No layer was compressed" in page and "<img" not in page
    names = _short_names([f"model.language_model.decoder.layers.{i}.attention.projection" for i in (1, 11)])
    assert names == ["…1.attention.projection", "…11.attention.projection"]
    assert _short_names(["x" * 100])[0] == "…" + "x" * 63 and _short_names([]) == []


def test_prints_nothing(capfd):
    engine.compress_(Mlp(), Recipe(**BOTH), torch.randn(4, 256))
    assert capfd.readouterr() == ("", "")


def test_own_class_of_the_same_name_is_left_alone():
    own = type("Linear", (nn.Linear,), {})(64, 64)
    model = nn.Sequential(nn.Linear(64, 64), own)
    report = engine.compress_(model, Recipe(quantize=Quantize(), guard="none"))
    assert isinstance(model[0], CompressedLinear) and model[1] is own
    assert "a subclass of Linear" in report.left_alone["1"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_static_calibration_refuses_what_is_not_finite(bad):
    model, x = Mlp(), torch.randn(4, 256)
    x[1, 2] = bad
    before = state_of(model)
    with pytest.raises(ValueError, match="first: its input holds a NaN or an infinity"):
        engine.compress_(model, Recipe(quantize=Quantize("static"), guard="none"), x)
    assert_unchanged(model, before)


def test_backward_hooks_are_kept():
    model = Mlp()
    model.first.register_full_backward_hook(lambda *_: None)
    model.second.weight.register_hook(lambda gradient: gradient)
    report = engine.compress_(model, Recipe(quantize=Quantize(), guard="none"))
    assert set(report.left_alone) == {"first", "second"}


def test_what_a_model_caches_while_measured_can_be_trained_on():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.cache = None

        def forward(self, x):
            if self.cache is None:
                self.cache = torch.ones(64) * 2
            return self.linear(x * self.cache)

    model, x = Caching(), torch.randn(4, 64)
    engine.compress_(model, Recipe(quantize=Quantize(), guard="none"), x)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None


def test_ignore_that_matches_nothing_is_said(caplog):
    engine.compress_(Mlp(), Recipe(quantize=Quantize(), guard="none", ignore=("haed", "head")))
    assert [record.message for record in caplog.records] == [
        "engine.compress_: ignore='haed' matches nothing in the model"
    ]


def test_prune_leaves_what_is_tied_to_an_embedding():
    embed, head, up = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False), nn.Linear(16, 8)
    model = nn.ModuleDict({"embed": embed, "head": head, "up": up})
    model["head"].weight = model["embed"].weight
    before = model["embed"].weight.clone()
    pruned = engine.prune_(model, sparsity=0.5, targets=("Linear", "Embedding"))
    assert set(pruned) == {"up"} and torch.equal(model["embed"].weight, before)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: engine.compress_("model", Recipe(quantize=Quantize(), guard="none")), TypeError, "torch.nn.Module"),
        (lambda: Prune(sparsity="0.5"), TypeError, "sparsity: expected a number, got str"),
        (lambda: Recipe(quantize=Quantize(), targets=None), TypeError, "targets: expected a tuple of strings"),
        (lambda: Recipe(quantize=Quantize(), targets=()), ValueError, "targets: expected at least one"),
        (
            lambda: engine.quantize_(nn.Sequential(nn.Linear(4, 4, device="meta"))),
            ValueError,
            "0: is on the meta device",
        ),
    ],
)
def test_clear_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_numbers_of_other_kinds_and_lazy_layers():
    assert type(Prune(threshold=np.float32(0.5)).threshold) is float
    report = engine.quantize_(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), targets=("Linear",))
    assert [layer.name for layer in report.layers] == ["0"]


def test_report_of_what_is_slower_not_finite_or_large(tmp_path):
    layers = [
        Layer(f"l{i}", (f"l{i}",), (4, 4), "int8", 0.0, 64, 32, 0.0, 0.0, torch.nan if i else 0.5) for i in range(90)
    ]
    report = Report({}, layers, {}, 1000, 500, 1.0, 2.0)
    assert "2.00x slower" in str(report) and "0 → 0" not in str(report)
    report.save(tmp_path / "report.JSON")
    saved = json.loads((tmp_path / "report.JSON").read_text(), parse_constant=pytest.fail)
    assert saved["layers"][0]["error"] == 0.5 and saved["layers"][1]["error"] is None
    report.save(tmp_path / "report.png")
    width, height = struct.unpack(">II", (tmp_path / "report.png").read_bytes()[16:24])
    assert 500 < height < 2500 and width > 500


CONVOLUTIONS = ("stem", "wide", "point")


@pytest.mark.parametrize(
    ("recipe", "label", "error"),
    [
        (Recipe(quantize=Quantize(), guard="none"), "int8", 0.05),
        (Recipe(quantize=Quantize("none"), guard="none"), "int8", 0.05),
        (Recipe(quantize=Quantize("static", smooth=0.5, weight_clip="least_squares"), guard="none"), "int8", 0.1),
        (Recipe(Prune(sparsity=0.6, scope="model"), guard="none"), "bitmap float32", 1),
        (Recipe(Prune(sparsity=0.6, scope="row"), Quantize("static"), guard="none"), "bitmap int8", 1),
        (Recipe(Prune(sparsity=0.6, importance="obs"), Quantize(), guard="none"), "bitmap int8", 1),
        (Recipe(Prune(sparsity=0.5, pattern="2:4", importance="wanda"), Quantize(), guard="none"), "2:4 int8", 1),
        (Recipe(Prune(sparsity=0.3, pattern="block"), Quantize(), guard="none"), "block 32x32 int8", 1),
    ],
)
def test_convolutions(recipe, label, error):
    torch.manual_seed(0)
    model, x = ConvNet().eval(), torch.randn(2, 3, 15, 15)
    before, weights = model(x), {name: model.get_submodule(name).weight for name in CONVOLUTIONS}
    report = engine.compress_(model, recipe, x)
    rows = {layer.name: layer for layer in report.layers}
    assert set(rows) == {*CONVOLUTIONS, "head"} and rows["wide"].shape == (64, 32, 3, 3)
    for name in CONVOLUTIONS:
        module = model.get_submodule(name)
        assert type(module) is CompressedConv2d and module.format.label == label and rows[name].error < 0.8
        assert module.weight.shape == weights[name].shape and module.kernel_size == weights[name].shape[2:]
    assert report.left_alone == dict.fromkeys(("grouped", "depthwise"), "it has groups")
    assert (model(x) - before).norm() < error * before.norm()


def test_convolutions_by_targets():
    model = ConvNet()
    weight = model.wide.weight.detach().clone()
    shares = engine.prune_(model, sparsity=0.75, scope="row")
    assert set(shares) == {*CONVOLUTIONS, "head"} and shares["wide"] == pytest.approx(0.75)
    kept = as_matrix(model.wide.weight) != 0
    assert (kept.sum(1) == 72).all() and torch.equal(model.wide.weight, torch.where(model.wide.weight != 0, weight, 0))
    engine.quantize_(model, targets=("Linear",), guard="none")
    assert type(model.stem) is nn.Conv2d and type(model.head) is CompressedLinear
    with pytest.raises(ValueError, match=r"itself a Conv2d.*CompressedConv2d\.from_dense"):
        engine.compress_(nn.Conv2d(3, 4, 1), Recipe(**BOTH))


def test_a_weight_that_is_not_of_its_kernel_stays():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), torch.randn(2, 3, 9, 9)
    model[0].weight = nn.Parameter(torch.randn(4, 3, 3, 1))  # PyTorch doesn't mind
    before = model(x)
    report = engine.compress_(model, Recipe(quantize=Quantize(), guard="none"), x)
    assert report.left_alone == {"0": "its weight [4, 3, 3, 1] is not of kernels (1, 1)"}
    assert (model(x) - before).norm() < 0.05 * before.norm()


def test_geometry_set_as_single_numbers():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 9, 9)
    model[0].padding, model[0].stride, model[0].dilation = 2, 3, 2
    before = model(x)
    engine.compress_(model, Recipe(quantize=Quantize("static"), guard="none"), x)
    assert (model(x) - before).norm() < 0.05 * before.norm()


def test_calibration_sees_patches():
    model, x = ConvNet(), torch.randn(3, 3, 15, 15)
    seen = engine.calibrate(model, [x, x[:1]], second_moment=True, progress=False)
    assert set(seen.layers) == {*CONVOLUTIONS, "head"}
    cut = nn.functional.unfold(torch.cat([x, x[:1]]), 3, padding=1).unflatten(1, (3, 9)).permute(0, 3, 2, 1)
    cut, stem = cut.reshape(-1, 27), seen.layers["stem"]
    assert stem.rows == len(cut) and torch.equal(stem.channel_amax, cut.abs().amax(0))
    torch.testing.assert_close(stem.second_moment, cut.t() @ cut / len(cut))


def test_what_others_put_on_a_layer_is_not_lost():
    def model():
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    patched, buffered, adapted, hooked, lazy = model(), model(), model(), model(), model()
    forward = patched[0].forward
    patched[0].forward = lambda x: forward(x) + 5
    buffered[0].register_buffer("seen", torch.zeros(1))
    adapted[0].lora = nn.Linear(8, 2)
    hooked[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    lazy[0] = nn.LazyLinear(8)
    for spoiled, reason in (
        (patched, "forward or parts of its own"),
        (buffered, "forward or parts of its own"),
        (adapted, "forward or parts of its own"),
        (hooked, "hooks"),
        (lazy, "lazy"),
    ):
        report = engine.compress_(spoiled, Recipe(quantize=Quantize(), guard="none"))
        assert isinstance(spoiled[1], CompressedLinear) and not isinstance(spoiled[0], CompressedLinear)
        assert reason in report.left_alone["0"]


def test_inputs_that_were_all_zero_give_no_static_scale():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    recipe = Recipe(quantize=Quantize(activation="static"), guard="none")
    report = engine.compress_(model, recipe, torch.zeros(2, 8))
    assert "all zero" in report.left_alone["0"] and isinstance(model[1], CompressedLinear)


@pytest.mark.parametrize("scope", ["layer", "row", "model"])
@pytest.mark.parametrize("values", [(-1.0, 1.0), (-2.0, -1.0, 1.0, 1.0, 2.0), (-1.0, 0.0, 1.0)])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_sparsity_of_weights_on_a_coarse_grid(scope, values, sparsity):
    """Of equals as many go as are to, from all rows and columns alike."""
    model = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 100))
    grid = torch.tensor(values)
    for layer in model:
        layer.weight.data = grid[torch.randint(len(values), layer.weight.shape)]
    before = copy.deepcopy(model)
    report = engine.compress_(model, Recipe(prune=Prune(sparsity=sparsity, scope=scope), guard="none"))
    for row, small, dense in zip(report.layers, model, before, strict=True):
        assert row.sparsity == pytest.approx(sparsity, abs=0.01)
        kept = small.weight != 0
        assert torch.equal(small.weight, torch.where(kept, dense.weight, 0.0))
        for dim in (0, 1):
            by_chance = (sparsity * (1 - sparsity) / kept.shape[dim]) ** 0.5
            assert ((kept.float().mean(dim) - 1 + sparsity).abs() < 6 * by_chance).all()
    pruned = engine.prune_(before, Prune(sparsity=sparsity, scope=scope))
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(before, model, strict=True))
    assert list(pruned.values()) == pytest.approx([row.sparsity for row in report.layers])


@pytest.mark.parametrize("scope", ["layer", "row", "model"])
@pytest.mark.parametrize("values", [(-1.0, 1.0), (-1.0, 0.0, 1.0), (0.5,)])
@pytest.mark.parametrize("sparsity", [0.989, 0.991, 0.995, 0.999])
def test_few_of_many_equals_stay(scope, values, sparsity):
    model = nn.Sequential(nn.Linear(1000, 20), nn.Linear(1000, 40))
    for layer in model:
        layer.weight.data = torch.tensor(values)[torch.randint(len(values), layer.weight.shape)]
    engine.compress_(model, Recipe(prune=Prune(sparsity=sparsity, scope=scope), guard="none"))
    kept = torch.cat([(layer.weight != 0).sum(1) for layer in model])
    want = round(1000 * (1 - sparsity))
    assert kept.sum() == 60 * want and (kept - want).abs().max() <= 3


def test_cuts_are_small():
    """Where scores tie a threshold is as large as the weight: not one for each layer at once."""
    model = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 100))
    for layer in model:
        layer.weight.data.sign_()
    targets = find_targets(model, ("Linear",), (), "compress_")[0]
    for scope in ("layer", "row", "model"):
        cuts = cuts_of(targets, Prune(sparsity=0.5, scope=scope))
        assert set(cuts) == {"0", "1"} and all(stays is not None for _, stays in cuts.values())
        assert all(part.numel() <= 100 for cut in cuts.values() for part in cut)


def test_zeros_go_beyond_the_sparsity():
    """Nothing is lost by that."""
    model = nn.Sequential(nn.Linear(100, 50))
    model[0].weight.data[:, :70] = 0
    report = engine.compress_(model, Recipe(prune=Prune(sparsity=0.5), guard="none"))
    assert report.layers[0].sparsity == pytest.approx(0.7)


def test_what_was_given_to_a_layer_stays():
    class Gained(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
            self.first.gain, self.first._is_ours = 2.0, True
            self.first.my_hooks = torch.ones(3)
            self.second.values = "of another meaning"
            self.third.doubled = types.MethodType(lambda layer, x: 2 * layer(x), self.third)

        def forward(self, x):
            return self.third.doubled(self.second(self.first(x))) * self.first.gain

    model = Gained()
    report = engine.compress_(model, Recipe(quantize=Quantize(), guard="none"))
    assert isinstance(model.first, CompressedLinear) and model.first.gain == 2.0 and model.first._is_ours
    assert torch.equal(model.first.my_hooks, torch.ones(3))
    assert "'values'" in report.left_alone["second"] and "methods" in report.left_alone["third"]
    assert model(torch.randn(2, 64)).shape == (2, 64)
    assert copy.deepcopy(model).first.gain == 2.0
    student = Gained()
    student.first.mask = student.first.format_type = "of another meaning"
    batch = torch.randn(8, 64)
    recipe = Recipe(Prune(sparsity=0.5), guard="none", targets=("first",))
    engine.distill(student, Gained(), [batch], steps=1, recipe=recipe, progress=False)
    assert isinstance(student.first, CompressedLinear) and student.first.gain == 2.0
    assert student.first.mask == student.first.format_type == "of another meaning"


@pytest.mark.parametrize("hook", ["register_state_dict_pre_hook", "register_load_state_dict_post_hook"])
def test_hooks_of_state_dicts_are_hooks(hook):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    getattr(model[0], hook)(lambda *arguments: None)
    report = engine.compress_(model, Recipe(quantize=Quantize(), guard="none"))
    assert f"hooks ({hook.removeprefix('register')}s)" in report.left_alone["0"]
    assert isinstance(model[1], CompressedLinear)


@pytest.mark.parametrize("copied", [False, True])
def test_hooks_left_by_norms_that_were_removed_do_not_count(copied):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    for layer in model[1:]:
        nn.utils.spectral_norm(layer)
    nn.utils.remove_spectral_norm(model[1])
    assert model[0]._load_state_dict_pre_hooks and model[1]._load_state_dict_pre_hooks
    if copied:
        del model[2]  # PyTorch copies no weight that is computed
        model = copy.deepcopy(model)
    engine.compress_(model, Recipe(quantize=Quantize(), guard="none"))
    assert [type(layer) for layer in model[:2]] == [CompressedLinear] * 2
    assert copied or type(model[2]) is nn.Linear


def test_no_recipes_leave_every_layer_alone():
    model = Mlp()
    before = state_of(model)
    report = engine.compress_(model, {}, torch.randn(3, 256))
    assert_unchanged(model, before)
    assert report.left_alone == dict.fromkeys(("first", "second", "head"), "the recipes name no layer")
    assert not report.layers and report.bytes_after == report.bytes_before and "left alone (3)" in str(report)


def test_what_is_of_the_wrong_kind():
    model, recipe = Mlp(), Recipe(quantize=Quantize(), guard="none")
    for call, message in (
        (lambda: engine.prune_(model, 0.5), "prune_: prune: expected engine.Prune, got float"),
        (lambda: engine.prune_(model, recipe), "prune_: prune: expected engine.Prune, got Recipe"),
        (lambda: engine.prune_(model, sparsity=0.5, calibration=5), "prune_: calibration: expected what engine.calib"),
        (lambda: engine.compress_(model, recipe, calibration=5), "compress_: calibration: expected what engine.calib"),
        (lambda: engine.search(model, [X], X, loss_budget=1, calibration=5), "search: calibration: expected what"),
        (lambda: engine.search(model, [X], X, loss_budget=1, candidates=[recipe]), "candidates: expected a mapping"),
        (lambda: Recipe.from_dict({"quantize": {}, "ignore": "lm_head"}), "ignore: expected a tuple of strings"),
        (lambda: Recipe.from_dict({"quantize": {}, "targets": 5}), "targets: expected a tuple of strings"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    for values in (None, [], {"prune": 5}):
        with pytest.raises(ValueError, match="expected a dict with keys among"):
            Recipe.from_dict(values)


def test_a_weight_that_the_model_reads_itself_is_left_alone(monkeypatch):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.inner = nn.Embedding(100, 16), nn.Linear(16, 16)

        def forward(self, indices):
            return self.inner(self.embedding(indices)) @ self.embedding.weight.t()

    model, indices = Tied().eval(), torch.randint(100, (2, 3))
    times = {2: (1.0, 2.0), 1: (1.0, 0.5)}  # by how many layers are replaced
    monkeypatch.setattr(measure, "time_model", lambda model, inputs, chosen: times[len(chosen)])
    layers = {"embedding": (1.0, 0.5), "inner": (1.0, 0.5)}
    monkeypatch.setattr(measure, "time_layers", lambda model, inputs, timed: (layers, (2.0, 1.0)))
    report = engine.compress_(model, Recipe(quantize=Quantize(), guard="speed"), indices)
    assert isinstance(model.inner, CompressedLinear) and isinstance(model.embedding, nn.Embedding)
    assert "reads its weight itself" in report.left_alone["embedding"] and report.seconds_after == 0.5


def test_a_weight_that_the_model_reads_itself_is_noted():
    class Looking(Mlp):
        def forward(self, x):
            return super().forward(x.to(self.first.weight.dtype))

    report = engine.compress_(Looking(), Recipe(**BOTH), X)
    assert [bool(layer.note) for layer in report.layers] == [True, False, False]
    assert "first: the model reads its weight itself, which is made anew at each pass" in str(report)


def test_a_cache_among_the_inputs_stays_as_it_was():
    class Remembering(Mlp):
        def forward(self, x, cache, more, read):
            lengths.append((len(cache["rows"]), len(more.rows), read() is self))
            cache["rows"].append(x)
            more.rows.append(x.clone())
            return super().forward(x)

        def me(self):
            return self

    lengths, model = [], Remembering()
    inputs = {"x": X, "cache": {"rows": []}, "more": types.SimpleNamespace(rows=[X]), "read": model.me}
    engine.compress_(copy.deepcopy(model), Recipe(**BOTH), inputs | {"read": lambda: None})
    engine.calibrate(model, [inputs], progress=False)
    engine.search(model, [inputs], inputs, size_budget=1e9, candidates={"int8": Recipe(quantize=Quantize())})
    student = copy.deepcopy(model)
    inputs["read"] = lambda: None
    engine.distill(student, model, [inputs], steps=2, recipe=Recipe(**BOTH), progress=False)
    assert {length[:2] for length in lengths} == {(0, 1)} and (0, 1, True) in lengths
    assert not inputs["cache"]["rows"] and len(inputs["more"].rows) == 1


def test_a_chart_of_nothing_says_so(monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **how: drawn.append(figure))
    Report({}, [], {}, 1000, 1000)._chart()
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["no layer was compressed"]
    assert not drawn[0].axes[0].axison


def test_an_interrupt_at_the_very_end_changes_nothing():
    class Interrupting(Mlp):
        def named_buffers(self, *args, **kwargs):
            if isinstance(self.first, CompressedLinear):
                raise KeyboardInterrupt
            return super().named_buffers(*args, **kwargs)

    model = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        engine.compress_(model, Recipe(**BOTH))
    assert isinstance(model.first, nn.Linear)


def test_a_threshold_beyond_float32_drops_all():
    assert set(engine.prune_(Mlp(), threshold=1e300).values()) == {1.0}


@pytest.mark.parametrize("scale", [1e20, 1.0, 1e-24])
def test_blocks_of_any_magnitude(scale):
    model = nn.Sequential(nn.Linear(128, 128))
    model[0].weight.data *= scale
    report = engine.compress_(model, Recipe(prune=Prune(sparsity=0.5, pattern="block"), guard="none"))
    assert report.layers[0].sparsity == 0.5


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.999])
@pytest.mark.parametrize(
    ("importance", "scope"),
    [("magnitude", "row"), ("magnitude", "layer"), ("magnitude", "model"), ("wanda", "row"), ("wanda", "layer")],
)
def test_blocks_at_an_end_count_by_their_weights(importance, scope, sparsity):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(147, 70), nn.ReLU(), nn.Linear(70, 333)), torch.randn(50, 147)
    with torch.no_grad():
        model[0].weight[:64] *= 0.1  # all but the blocks of six rows
    prune = Prune(sparsity=sparsity, pattern="block", scope=scope, importance=importance)
    report = engine.compress_(model, Recipe(prune, guard="none"), x)
    gone = {layer.name: (model.get_submodule(layer.name).weight == 0).sum().item() for layer in report.layers}
    for layer in report.layers:
        count = layer.shape[0] * layer.shape[1]
        assert layer.sparsity == pytest.approx(gone[layer.name] / count)
        rows = -(-layer.shape[0] // 32) if scope == "row" else 1
        # As near as whole blocks come: half of one away, in each row of them where these are apart.
        assert scope == "model" or abs(gone[layer.name] - sparsity * count) <= rows * 512
    assert scope != "model" or abs(sum(gone.values()) - sparsity * (147 * 70 + 70 * 333)) <= 512


@pytest.fixture
def alone():
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_wrapped_for_training_is_refused(alone, tmp_path):
    """DistributedDataParallel would not average the gradients of what is replaced."""
    recipe, path = Recipe(Prune(sparsity=0.5), guard="none"), tmp_path / "small.safetensors"
    small = Mlp()
    engine.compress_(small, recipe)
    engine.save(small, path)
    wrapped = nn.parallel.DistributedDataParallel(Mlp())
    around = nn.Sequential(wrapped)
    before = state_of(wrapped)
    for call, message in (
        (lambda: engine.compress_(wrapped, recipe), "engine.compress_: the model is a DistributedDataParallel"),
        (lambda: engine.quantize_(around), "0 is a DistributedDataParallel, .*: wrap the model afterwards"),
        (lambda: engine.load_(wrapped, path), "engine.load_: the model is a Dist"),
        (lambda: engine.distill(around, None, [X], steps=1, recipe=recipe, loss=len), "engine.distill: 0 is a Dist"),
        (lambda: engine.nn.unfuse_attention_(around), "engine.nn.unfuse_attention_: 0 is a Dist"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert_unchanged(wrapped, before)
    engine.save(Mlp(), path)
    engine.load_(wrapped, path)  # replaces nothing
    assert set(engine.prune_(wrapped, sparsity=0.5).values()) == {0.5}


def test_a_compiled_or_scripted_model_is_refused():
    model = nn.Sequential(nn.Linear(64, 64))
    recipe = Recipe(quantize=Quantize(), guard="none")
    for done, word in ((torch.compile(model), "compiled"), (torch.jit.trace(model, torch.randn(1, 64)), "scripted")):
        with pytest.raises(ValueError, match=f"the model is {word}: do that after it is compressed"):
            engine.compress_(done, recipe)
    model.compile()
    with pytest.raises(ValueError, match="the model is compiled"):
        engine.compress_(model, recipe)


def test_layers_made_in_inference_mode_can_be_trained_around():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval(), torch.randn(2, 64)
    with torch.inference_mode():
        engine.compress_(
            model, Recipe(quantize=Quantize(), targets=("0",), guard="none"), example_inputs=torch.ones(2, 64)
        )
    model.load_state_dict(model.state_dict())
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None


def test_a_parametrized_layer_is_left_alone_with_a_hint():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 64))
    report = engine.compress_(model, Recipe(quantize=Quantize(), guard="none"))
    assert "remove_parametrizations" in report.left_alone["0"] and [row.name for row in report.layers] == ["1"]


@pytest.mark.parametrize("activation", ["dynamic", "static"])
def test_nested_inputs(activation):
    parts = [torch.randn(3, 16), torch.randn(5, 16)]
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    flat, recipe = copy.deepcopy(model), engine.Recipe(quantize=engine.Quantize(activation), guard="none")
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    report, same = engine.compress_(model, recipe, x), engine.compress_(flat, recipe, torch.cat(parts))
    assert [row.error for row in report.layers] == [row.error for row in same.layers]
    assert torch.equal(model(x).values(), flat(torch.cat(parts)))

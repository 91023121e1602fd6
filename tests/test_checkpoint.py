import json
import os
import re
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz_checkpoint import fuzz
from models import ConvNet, Mlp, TinyLm, assert_unchanged, state_of
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from engine import checkpoint
from engine._checkpoint_file import CheckpointFile, weight_parts
from engine._compress_file import compress_file
from engine._safetensors import Entry, TensorWriter
from engine._source import Source
from engine.checkpoint import CheckpointError, load_, read_weight, save
from engine.compress import Prune, Quantize, Recipe, compress_
from engine.formats import Bitmap, Block, Csr, DenseInt8, SemiStructured
from engine.nn import CompressedConv2d, CompressedEmbedding, CompressedLinear

X = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(100).reshape(4, 25)
RECIPES = {
    "int8": Recipe(quantize=Quantize(), guard="none"),
    "int8 static": Recipe(quantize=Quantize("static"), guard="none"),
    "int8 weights": Recipe(quantize=Quantize("none"), guard="none"),
    "bitmap": Recipe(prune=Prune(sparsity=0.5), guard="none"),
    "bitmap int8": Recipe(prune=Prune(threshold=0.02), quantize=Quantize(), guard="none"),
    "bitmap int8 static": Recipe(prune=Prune(sparsity=0.7), quantize=Quantize("static"), guard="none"),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def rewrite(path: Path, change) -> None:
    """Lets `change(header, data)` edit a file's header; `data` is a bytearray."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    change(header, data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def small_file(path: Path, recipe: str = "bitmap int8") -> None:
    model = Mlp()
    compress_(model, RECIPES[recipe])
    save(model, path, RECIPES[recipe])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_model_computes_the_same_bits(recipe, dtype, path, monkeypatch):
    monkeypatch.setattr("engine.compress.measure.LEAST_ROUNDS", 1)  # times are not looked at here
    monkeypatch.setattr("engine.compress.measure.MOST_ROUNDS", 1)
    model = Mlp().to(dtype).eval()
    compress_(model, RECIPES[recipe], X.to(dtype) if "static" in recipe else None)
    save(model, path, RECIPES[recipe])
    fresh = load_(Mlp().to(dtype).eval(), path)
    assert torch.equal(fresh(X.to(dtype)), model(X.to(dtype)))
    assert isinstance(fresh.first, CompressedLinear)
    assert fresh.first.weight.dtype == dtype and torch.equal(fresh.first.weight, model.first.weight)
    assert fresh.first.training is False
    assert CheckpointFile(path).recipe == RECIPES[recipe].to_dict()
    again = load_(fresh, path)  # compressed in the same places
    assert again is fresh and torch.equal(again(X.to(dtype)), model(X.to(dtype)))


def test_csr(path):
    model = Mlp()
    model.first = CompressedLinear.from_dense(model.first, Csr, threshold=0.05)
    save(model, path)
    fresh = load_(Mlp(), path)
    assert fresh.first._format_type is Csr and fresh.first.values.requires_grad
    assert torch.equal(fresh(X), model(X))


def test_names_on_disk(path):
    model = Mlp()
    model.first = CompressedLinear.from_dense(model.first, Bitmap, threshold=0.02, values=torch.int8, input_scale=0.5)
    model.second = CompressedLinear.from_dense(model.second, DenseInt8)
    save(model, path)
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        assert file.get_tensor("first.input_scale").shape == (1,)
        assert file.get_tensor("first.weight.shape").tolist() == [512, 256]
        assert file.metadata()["format"] == "pt" and file.metadata()["engine_format_version"] == "1"
        assert json.loads(file.metadata()["engine_weights"]) == {
            "first.weight": {"format": "Bitmap", "dtype": "float32"},
            "second.weight": {"format": "DenseInt8", "dtype": "float32", "quantize_input": True},
        }
    bitmap = {f"first.weight.{part}" for part in ("shape", "compressed", "bitmask", "row_offsets", "scale")}
    assert names == bitmap | {
        *("first.input_scale", "first.bias", "second.weight", "second.weight_scale", "second.bias", "head.weight")
    }


@pytest.mark.parametrize("tied", [True, False])
def test_ties(tied, path):
    model = TinyLm(tied=tied)
    compress_(model, RECIPES["int8"])
    save(model, path)
    fresh = load_(TinyLm(tied=tied), path)
    assert (fresh.lm_head.values is fresh.embed.values) is tied
    assert isinstance(fresh.embed, CompressedEmbedding) and fresh.embed.padding_idx == 0
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    assert CheckpointFile(path).aliases == ({"lm_head.weight": "embed.weight"} if tied else {})
    untied = load_(TinyLm(tied=False), path)  # a tie in the file is restored in a model without it
    assert (untied.lm_head.values is untied.embed.values) is tied
    assert torch.equal(untied(TOKENS), model(TOKENS))


def test_plain_ties_are_stored_once_and_restored(path):
    model = TinyLm()
    save(model, path)
    size = path.stat().st_size
    for tied in (True, False):
        fresh = load_(TinyLm(tied=tied), path)
        assert fresh.lm_head.weight is fresh.embed.weight
        assert torch.equal(fresh(TOKENS), model(TOKENS))
    save(TinyLm(tied=False), path)
    assert path.stat().st_size > size + 100 * 64 * 4 - 200
    tied_model = TinyLm()
    before = state_of(tied_model)
    with pytest.raises(CheckpointError, match=r"differs from embed\.weight"):
        load_(tied_model, path)
    assert_unchanged(tied_model, before)


def test_a_tie_that_only_the_model_knows(path):
    """As transformers saves tied models: one of the names is not in the file."""
    model = TinyLm()
    format = DenseInt8.from_dense(model.embed.weight)
    tensors = {
        n: t.detach().clone() for n, t in model.state_dict().items() if n not in ("embed.weight", "lm_head.weight")
    }
    weights = {"embed.weight": {"format": "DenseInt8", "dtype": "float32", "quantize_input": True}}
    metadata = {"engine_format_version": "1", "engine_weights": json.dumps(weights)}
    save_file({**tensors, **weight_parts("embed.weight", format)}, path, metadata)
    fresh = load_(TinyLm(), path)
    assert fresh.lm_head.values is fresh.embed.values and isinstance(fresh.lm_head, CompressedLinear)


def test_a_module_under_two_names(path):
    def build():
        linear = nn.Linear(16, 16)
        return nn.Sequential(linear, nn.ReLU(), linear)

    model = build()
    compress_(model, RECIPES["bitmap"])
    save(model, path)
    fresh = load_(build(), path)
    assert fresh[0] is fresh[2]
    x = torch.randn(3, 16)
    assert torch.equal(fresh(x), model(x))


def test_a_plain_file(path):
    model = Mlp()
    save_file(model.state_dict(), path)
    fresh = Mlp()
    parameter = fresh.first.weight
    parameter.requires_grad_(False)
    load_(fresh, path)
    assert fresh.first.weight is parameter and not parameter.requires_grad
    assert torch.equal(fresh(X), model(X))


def test_buffers_dtypes_and_odd_tensors(path):
    class Odd(nn.Module):
        def __init__(self, fill):
            super().__init__()
            self.scalar = nn.Parameter(torch.tensor(float(fill)))
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("empty", torch.empty(0, 4))
            self.register_buffer("flags", torch.tensor([bool(fill), True]))
            self.register_buffer("strided", torch.full((4, 6), fill, dtype=torch.int16).t())
            self.register_buffer("wide", torch.full((3,), fill, dtype=torch.float64))

    model = Odd(1)
    save(model, path)
    fresh = load_(Odd(0), path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


@pytest.mark.parametrize("prefix_in", ["file", "model"])
def test_one_common_prefix(prefix_in, path):
    model = Mlp()
    compress_(model, RECIPES["int8"])
    wrapped = nn.ModuleDict({"bert": model})
    save(wrapped if prefix_in == "file" else model, path)
    fresh = Mlp()
    load_(fresh if prefix_in == "file" else nn.ModuleDict({"bert": fresh}), path)
    assert torch.equal(fresh(X), model(X))


def test_a_buffer_that_this_version_of_the_model_does_not_save(path):
    model = Mlp()
    save_file({**model.state_dict(), "position_ids": torch.arange(3)}, path)
    fresh = Mlp()
    fresh.register_buffer("position_ids", torch.arange(3), persistent=False)
    assert torch.equal(load_(fresh, path)(X), model(X))


def test_transformer_layer_calls_its_compressed_linears(path):
    def build():
        torch.manual_seed(0)
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()

    model, x = build(), torch.randn(2, 3, 16)
    pad = torch.tensor([[False, False, True], [False, False, False]])  # makes the encoder take a path of its own
    with torch.inference_mode():
        dense = model(x), model(x, src_key_padding_mask=pad)
    recipe = Recipe(quantize=Quantize(), targets=("re:.*linear",), guard="none")
    compress_(model, recipe, {"src": x, "src_key_padding_mask": pad})
    save(model, path)
    loaded = load_(build(), path)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x)) and not torch.equal(model(x), dense[0])
        got = model(x, src_key_padding_mask=pad)
        assert torch.equal(loaded(x, src_key_padding_mask=pad), got)
        assert (got - dense[1])[~pad].abs().max() < 0.1


def wrong_models():
    bigger = Mlp(width=260)
    extra = Mlp()
    extra.more = nn.Linear(2, 2)
    fewer = Mlp()
    del fewer.head
    hooked = Mlp()
    hooked.first.register_forward_hook(lambda *_: None)
    expanded = Mlp()
    expanded.first.bias.data = torch.zeros(1).expand(512)
    return {
        "shape": (bigger, r"first\.weight: has shape \[512, 256\], the model \[520, 260\]"),
        "missing": (extra, r"missing: more\.bias, more\.weight"),
        "unexpected": (fewer, r"unexpected: head\.weight"),
        "dtype": (
            Mlp().bfloat16(),
            r"is torch.float32, the model's is torch.bfloat16: load into model.to\(torch.float32\)",
        ),
        "hooks": (hooked, "first.weight: the model's layer has hooks"),
        "expanded": (expanded, "first.bias: the model's tensor is expanded"),
    }


@pytest.mark.parametrize("case", ["shape", "missing", "unexpected", "dtype", "hooks", "expanded"])
def test_a_file_for_another_model_is_refused(case, path):
    small_file(path)
    model, message = wrong_models()[case]
    before = state_of(model)
    with pytest.raises(CheckpointError, match=message):
        load_(model, path)
    assert_unchanged(model, before)


def test_one_layer_alone_is_refused(path):
    save(CompressedLinear.from_dense(nn.Linear(8, 8), DenseInt8), path)
    with pytest.raises(CheckpointError, match="put it in a module"):
        load_(nn.Linear(8, 8), path)
    load_(nn.Sequential(nn.Linear(8, 8)), path)


def test_what_cannot_be_replaced_gets_the_dense_weight(path):
    """As in a file that was compressed by the names of its tensors, without the model's code."""
    linear = nn.Linear(8, 16, bias=False)
    layers = {
        "embed": CompressedLinear.from_dense(linear, Bitmap, threshold=0.1),
        "own": CompressedLinear.from_dense(nn.Linear(8, 16, bias=False), DenseInt8),
        "plain": CompressedLinear.from_dense(nn.Linear(8, 16, bias=False), DenseInt8),
    }
    save(nn.ModuleDict(layers), path)
    own = type("MyLinear", (nn.Linear,), {})(8, 16, bias=False)
    fresh = nn.ModuleDict({"embed": nn.Embedding(16, 8), "own": own, "plain": nn.Linear(8, 16, bias=False)})
    load_(fresh, path)
    assert type(fresh["embed"]) is nn.Embedding and torch.equal(fresh["embed"].weight, layers["embed"].weight)
    assert fresh["own"] is own and torch.equal(own.weight, layers["own"].weight)
    assert isinstance(fresh["plain"], CompressedLinear)
    with pytest.raises(CheckpointError, match=r"embed.weight: has shape \[16, 8\], the model \[8, 16\]"):
        load_(nn.ModuleDict({**fresh, "embed": nn.Embedding(8, 16), "plain": nn.Linear(8, 16, bias=False)}), path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("reads", [0, 1])
def test_an_interrupt_while_the_model_changes_undoes_all(error, reads, path, monkeypatch):
    small_file(path, "bitmap")
    model = Mlp()
    before = state_of(model)
    read_into, count = CheckpointFile.read_into, 0

    def failing(self, name, tensor):
        nonlocal count
        count += 1
        read_into(self, name, tensor)
        if count > reads:
            raise error

    monkeypatch.setattr(CheckpointFile, "read_into", failing)
    with pytest.raises(error):
        load_(model, path)
    assert_unchanged(model, before)


def test_an_interrupt_while_modules_are_replaced_undoes_all(path, monkeypatch):
    small_file(path, "bitmap")
    model = Mlp()
    before = state_of(model)
    set_item, count = checkpoint.set_item, 0

    def failing(*args):
        nonlocal count
        count += 1
        set_item(*args)
        if count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "set_item", failing)
    with pytest.raises(KeyboardInterrupt):
        load_(model, path)
    assert_unchanged(model, before)


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_(Mlp(), tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_(Mlp(), tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="too short"):
        load_(Mlp(), tmp_path / "empty")
    (tmp_path / "text").write_text("hello, I am no model at all")
    with pytest.raises(CheckpointError, match="text: "):
        load_(Mlp(), tmp_path / "text")


def test_a_folder(tmp_path):
    model = Mlp()
    compress_(model, Recipe(quantize=Quantize(), guard="none"))
    save(model, tmp_path / "model.safetensors")
    x = torch.randn(3, 256)
    assert torch.equal(load_(Mlp(), tmp_path)(x), model(x))
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="but shards"):
        load_(Mlp(), tmp_path)


def test_what_was_given_to_a_layer_stays(path):
    model = Mlp()
    compress_(model, Recipe(quantize=Quantize(), guard="none"))
    save(model, path)
    fresh = Mlp()
    fresh.first.gain = 2.0
    assert load_(load_(fresh, path), path).first.gain == 2.0
    fresh = Mlp()
    fresh.first.values = 2.0
    with pytest.raises(CheckpointError, match=r"first\.weight: the model's layer has an attribute 'values'"):
        load_(fresh, path)


def edit_metadata(key, value):
    def change(header, data):
        header["__metadata__"][key] = value if isinstance(value, str) else json.dumps(value)

    return change


WEIGHT = {"format": "Bitmap", "dtype": "float32"}
DAMAGE = {
    "version": (edit_metadata("engine_format_version", "2"), "format version '2', this engine reads 1"),
    "no json": (edit_metadata("engine_weights", "{"), "metadata engine_weights: "),
    "deep json": (edit_metadata("engine_weights", "[" * 100_000), "metadata engine_weights: "),
    "list": (edit_metadata("engine_weights", []), "metadata engine_weights: expected a JSON object"),
    "recipe": (edit_metadata("engine_recipe", "[1]"), "metadata engine_recipe: expected a JSON object"),
    "format": (
        edit_metadata("engine_weights", {"first.weight": {**WEIGHT, "format": "Zip"}}),
        "first.weight: unknown format",
    ),
    "format type": (edit_metadata("engine_weights", {"first.weight": {**WEIGHT, "format": []}}), "unknown format"),
    "dtype": (edit_metadata("engine_weights", {"first.weight": {**WEIGHT, "dtype": "int3"}}), "unknown dtype"),
    "no object": (edit_metadata("engine_weights", {"first.weight": 3}), "first.weight: expected an object"),
    "name": (edit_metadata("engine_weights", {"first.bias": WEIGHT}), "ends in 'weight'"),
    "no such": (
        edit_metadata("engine_weights", {"other.weight": WEIGHT}),
        "other.weight: other.weight.shape is missing",
    ),
    "transposed": (
        edit_metadata("engine_weights", {"first.weight": {**WEIGHT, "transposed": 1}}),
        "transposed: expect",
    ),
    "transposed kernel": (
        edit_metadata("engine_weights", {"first.weight": {**WEIGHT, "transposed": True, "kernel_size": [3, 3]}}),
        "transposed: expected true or false, and true for no convolution",
    ),
    "not int8": (
        edit_metadata("engine_weights", {"head.weight": {"format": "DenseInt8", "dtype": "float32"}}),
        "head.weight: quantize_input",
    ),
    "alias": (
        edit_metadata("engine_aliases", {"a.weight": "b.weight"}),
        "a.weight: an alias of 'b.weight', which is not",
    ),
    "alias of itself": (edit_metadata("engine_aliases", {"first.weight": "first.weight"}), "but stored as well"),
    "alias type": (edit_metadata("engine_aliases", {"a.weight": ["first.weight"]}), "a.weight: an alias of"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_metadata(case, path):
    small_file(path)
    change, message = DAMAGE[case]
    rewrite(path, change)
    model = Mlp()
    before = state_of(model)
    with pytest.raises(CheckpointError, match=message):
        load_(model, path)
    assert_unchanged(model, before)


def edit_tensor(format, part, index, value):
    """Writes one element of a tensor of the weight named first.weight."""

    def change(path):
        model = Mlp()
        how = {"threshold": 0.03} if format not in (DenseInt8, SemiStructured) else {}
        if part.endswith("scale"):
            how = how | {"values": torch.int8} if format is Bitmap else how
        model.first = CompressedLinear.from_dense(model.first, format, **how)
        save(model, path)
        file = CheckpointFile(path)
        tensors = {name: file.read(name) for name in file.entries}
        tensors[f"first.weight{part}"].view(-1)[index] = value
        save_file(tensors, path, file.metadata)

    return change


LARGE, LARGE_32 = 2**63 - 1, 2**31 - 1
HOSTILE = {
    "negative rows": (edit_tensor(Bitmap, ".shape", 0, -1), "shape: negative"),
    "other rows": (edit_tensor(Bitmap, ".shape", 0, LARGE), "shape: "),
    "other columns": (edit_tensor(Bitmap, ".shape", 1, LARGE), "bitmask: "),
    "columns in the padding": (edit_tensor(Bitmap, ".shape", 1, 255), "bitmask: "),
    "large offset": (edit_tensor(Bitmap, ".row_offsets", 7, LARGE), "row_offsets: "),
    "negative offset": (edit_tensor(Bitmap, ".row_offsets", 7, -1), "row_offsets: "),
    "last offset": (edit_tensor(Bitmap, ".row_offsets", -1, 0), "row_offsets: "),
    "first offset": (edit_tensor(Bitmap, ".row_offsets", 0, 1), "row_offsets: "),
    "bits": (edit_tensor(Bitmap, ".bitmask", 9, 255), "bitmask: "),
    "scale nan": (edit_tensor(Bitmap, ".scale", 3, torch.nan), "scale: "),
    "scale zero": (edit_tensor(DenseInt8, "_scale", 3, 0), "scale: "),
    "scale infinite": (edit_tensor(DenseInt8, "_scale", 3, torch.inf), "scale: "),
    "crow": (edit_tensor(Csr, ".crow_indices", 5, LARGE_32), "crow_indices: "),
    # Differences of neighbours overflow and look positive: 2^31 - 1, then -2.
    "crow that wraps": (edit_tensor(Csr, ".crow_indices", slice(5, 7), torch.tensor([LARGE_32, -2])), "crow_indices: "),
    "col": (edit_tensor(Csr, ".col_indices", 5, 256), "col_indices: "),
    "col negative": (edit_tensor(Csr, ".col_indices", 5, -1), "col_indices: "),
    "2:4 rows": (edit_tensor(SemiStructured, ".shape", 0, LARGE), "shape: "),
    "2:4 negative columns": (edit_tensor(SemiStructured, ".shape", 1, -1), "shape: negative"),
    "2:4 columns": (edit_tensor(SemiStructured, ".shape", 1, LARGE), "values: "),
    "2:4 places": (edit_tensor(SemiStructured, ".metadata", 7, 0), "metadata: "),
    "block rows": (edit_tensor(Block, ".shape", 0, LARGE), "crow_indices: "),
    "block columns": (edit_tensor(Block, ".shape", 1, 32), "col_indices: "),
    "block negative rows": (edit_tensor(Block, ".shape", 0, -1), "shape: negative"),
    "block crow": (edit_tensor(Block, ".crow_indices", 2, LARGE_32), "crow_indices: "),
    "block col": (edit_tensor(Block, ".col_indices", 5, -1), "col_indices: "),
    "csr columns": (edit_tensor(Csr, ".shape", 1, 2**20), "has shape"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tensors(case, path):
    change, message = HOSTILE[case]
    change(path)
    with pytest.raises(CheckpointError, match=f"first.weight: .*{message}|first.weight: {message}"):
        load_(Mlp(), path)


def test_every_truncation_is_refused(path):
    save(nn.Sequential(CompressedLinear.from_dense(nn.Linear(9, 5), Bitmap, threshold=0.1)), path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load_(nn.Sequential(nn.Linear(9, 5)), path)
    path.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError):
        load_(nn.Sequential(nn.Linear(9, 5)), path)


def test_fuzzed_files():
    counts = fuzz(count=2000, seed=1)
    assert counts["refused"] > 500 and counts["loaded"] > 50


def test_the_file_may_change_after_loading(path):
    small_file(path)
    model = load_(Mlp(), path)
    before = model(X)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    path.unlink()
    assert torch.equal(model(X), before)


def test_an_error_leaves_the_old_file_and_no_other(path):
    path.write_text("old")

    class Failing(dict):
        pass

    entries = {"a": Entry(torch.float32, (3,))}
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), TensorWriter(path, entries, {}) as writer:
            writer.write("a", torch.zeros(3))
            raise error
    with pytest.raises(ValueError, match="a: announced, but never written"), TensorWriter(path, entries, {}):
        pass
    with pytest.raises(ValueError, match="a: announced as float32"), TensorWriter(path, entries, {}) as writer:
        writer.write("a", torch.zeros(4))
    assert path.read_text() == "old" and os.listdir(path.parent) == [path.name]


def test_a_full_disk_is_an_oserror(path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        save(Mlp(), path)
    assert os.listdir(path.parent) == []


def test_mode_follows_umask(path):
    before = os.umask(0o027)
    try:
        save(nn.Linear(2, 2), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_tensors_are_aligned_whatever_their_order(path):
    tensors = {
        f"{i}{dtype}": torch.ones(i, dtype=dtype)
        for i in (3, 1, 7)
        for dtype in (torch.int8, torch.float32, torch.int64)
    }
    with TensorWriter(path, {name: Entry.of(t) for name, t in tensors.items()}, {"é": "ü"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"é": "ü"}
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0
        with safe_open(path, "pt") as file:
            assert torch.equal(file.get_tensor(name), tensor)


def test_what_cannot_be_saved(path):
    model = nn.Linear(2, 2)
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    with pytest.raises(CheckpointError, match="sparse: "):
        save(model, path)
    with pytest.raises(CheckpointError, match="weight: "):
        save(nn.Linear(2, 2, device="meta"), path)
    with pytest.raises(FileNotFoundError):
        save(nn.Linear(2, 2), path.parent / "none" / "x.safetensors")
    with pytest.raises(IsADirectoryError):
        save(nn.Linear(2, 2), path.parent)
    assert os.listdir(path.parent) == []


def test_read_weight(path):
    model = Mlp()
    format = Bitmap.from_dense(model.first.weight, 0.03)
    model.first = CompressedLinear(format, model.first.bias)
    save(model, path)
    again = read_weight(CheckpointFile(path), "first.weight")
    assert torch.equal(again.to_dense(), format.to_dense()) and again.shape == (512, 256)


MEMORY = """
import resource, sys, torch
from torch import nn
from engine.checkpoint import load_, save
from engine.formats import DenseInt8
from engine.nn import CompressedLinear

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

path, verb = sys.argv[1:]
def linear():
    return nn.Linear(4096, 4096, bias=False)
model = nn.Sequential(*(linear() for _ in range(12)))
if verb == "save":
    before = peak()
    save(model, path)
else:
    load_(nn.Sequential(nn.Linear(2, 2, bias=False)), path + ".small")  # what is loaded once
    before = peak()
    load_(model, path)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory(path):
    layer, count = 4096 * 4096 * 4, 12
    save(nn.Sequential(nn.Linear(2, 2, bias=False)), f"{path}.small")
    env = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"}

    def run(verb):
        command = [sys.executable, "-c", MEMORY, str(path), verb]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)

    assert run("save") < 1.5 * layer
    assert run("load") < (count + 1.5) * layer


IMAGES = torch.randn(2, 3, 15, 15, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("recipe", ["int8", "int8 static", "bitmap", "bitmap int8"])
def test_convolutions(recipe, path):
    model = ConvNet().eval()
    compress_(model, RECIPES[recipe], IMAGES if "static" in recipe else None)
    save(model, path)
    for fresh in (load_(ConvNet().eval(), path), load_(load_(ConvNet().eval(), path), path)):
        assert torch.equal(fresh(IMAGES), model(IMAGES)) and repr(fresh) == repr(model)
    weights = json.loads(CheckpointFile(path).metadata["engine_weights"])
    assert weights["wide.weight"]["kernel_size"] == [3, 3] and "kernel_size" not in weights["head.weight"]


def test_a_convolution_that_does_not_fit(path):
    model = ConvNet()
    compress_(model, RECIPES["bitmap"])
    save(model, path)

    class Other(ConvNet):
        def __init__(self):
            super().__init__()
            self.wide = nn.Conv2d(32, 64, (9, 1))

    with pytest.raises(CheckpointError, match=r"wide.weight: has shape \[64, 32, 3, 3\], the model \[64, 32, 9, 1\]"):
        load_(Other(), path)
    for size in ([3], [3, 0], [3, -3], "x", [3, 3.0], [3, 5], [2**62, 2**62]):

        def change(header, data, size=size):
            weights = json.loads(header["__metadata__"]["engine_weights"])
            weights["wide.weight"]["kernel_size"] = size
            header["__metadata__"]["engine_weights"] = json.dumps(weights)

        rewrite(path, change)
        with pytest.raises(CheckpointError, match=r"wide\.weight: "):
            load_(ConvNet(), path)
    rewrite(path, lambda header, data: change(header, data, None))  # a matrix where the model has a convolution
    with pytest.raises(CheckpointError, match=r"wide.weight: has shape \[64, 288\]"):
        load_(ConvNet(), path)


def test_one_matrix_under_two_kernels(path):
    """Each is written with its own kernel's size."""
    first = CompressedConv2d.from_dense(nn.Conv2d(8, 16, 3), DenseInt8)
    other = CompressedConv2d(first.format, (9, 1), dtype=torch.float32)
    save(nn.Sequential(first, other, CompressedLinear(first.format)), path)
    fresh = load_(
        nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, (9, 1), bias=False), nn.Linear(72, 16, False)), path
    )
    assert torch.equal(fresh[0].weight, first.weight) and torch.equal(fresh[1].weight, other.weight)
    assert type(fresh[2]) is CompressedLinear


def test_convolutions_by_name_alone(path, tmp_path):
    """A file that was compressed without the model: what has groups or is transposed is loaded dense."""
    model = ConvNet().eval()
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    recipe = Recipe(prune=Prune(sparsity=0.5), quantize=Quantize(), guard="none")
    done = compress_file(Source(tmp_path / "plain.safetensors"), path, recipe)
    assert "may be depthwise" in done.left_alone["depthwise.weight"]
    shapes = {outcome.name: outcome.shape for outcome in done.compressed}
    assert shapes["wide.weight"] == (64, 32, 3, 3) and {"grouped.weight", "up.weight"} <= shapes.keys()
    fresh = load_(ConvNet().eval(), path)
    assert [type(m) for m in (fresh.wide, fresh.grouped, fresh.up)] == [CompressedConv2d, nn.Conv2d, nn.ConvTranspose2d]
    for name in ("grouped", "up"):
        got, dense = fresh.get_submodule(name).weight, model.get_submodule(name).weight
        kept = got != 0
        assert kept.float().mean().item() == pytest.approx(0.5, abs=0.02)
        torch.testing.assert_close(got[kept], dense[kept], rtol=0, atol=dense.abs().max().item() / 250)
    compress_(model, Recipe(prune=Prune(sparsity=0.5), quantize=Quantize(), guard="none"))
    for name in ("stem", "wide", "point"):
        assert torch.equal(fresh.get_submodule(name).weight, model.get_submodule(name).weight)


def test_names_of_every_length(tmp_path):
    longest = tmp_path / ("é" * 120 + "x" * 15)  # 255 bytes, and the temporary file's name is longer than the file's
    save(Mlp(), longest)
    load_(Mlp(), longest)
    for path in (tmp_path / "no folder" / "x", longest / "x", tmp_path / ("x" * 256)):
        with pytest.raises(OSError, match=re.escape(path.name)) as caught:
            save(Mlp(), path)
        assert ".tmp" not in str(caught.value)
    assert os.listdir(tmp_path) == [longest.name]


class Head(nn.Module):
    """A model around another, whose output layer is tied to the other's embedding, or is its own."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.base = nn.ModuleDict({"embed": nn.Embedding(40, 32), "up": nn.Linear(32, 32)})
        self.head = nn.Linear(32, 40, bias=False)
        if tied:
            self.head.weight = self.base["embed"].weight


def test_with_and_without_a_head(path):
    recipe = Recipe(quantize=Quantize(), guard="none")
    whole, other = Head(), Head()
    compress_(whole, recipe)
    save(whole, path)
    base = load_(Head().base, path)
    assert torch.equal(base["up"].values, whole.base["up"].values) and type(base["embed"]) is CompressedEmbedding
    save(whole.base, path)
    load_(other, path)
    assert torch.equal(other.head.weight, whole.head.weight) and other.head.values is other.base["embed"].values
    with pytest.raises(CheckpointError, match=r"missing: base.embed.weight, base.up.bias, base.up.weight, head.weight"):
        load_(Head(tied=False), path)
    untied = Head(tied=False)
    compress_(untied, recipe)
    save(untied, path)
    with pytest.raises(CheckpointError, match=r"unexpected: base.embed.weight"):
        load_(Head().base, path)


def test_what_is_saved_over(tmp_path):
    """A link's target takes the place, permissions stay, and what is no file is refused."""
    model = Mlp()
    real, link, fifo = tmp_path / "real.safetensors", tmp_path / "latest.safetensors", tmp_path / "fifo.safetensors"
    save(model, real)
    real.chmod(0o600)
    link.symlink_to(real.name)
    before = real.stat().st_ino
    save(model, link)
    assert link.is_symlink() and real.stat().st_ino != before and real.stat().st_mode & 0o777 == 0o600
    os.mkfifo(fifo)
    with pytest.raises(CheckpointError, match="not a file"):
        save(model, fifo)
    assert fifo.is_fifo()


def test_single_elements_and_lazy_views(path):
    """A single element may have any stride; a conjugate is another tensor than the one whose memory it shares."""
    model = nn.Linear(2, 2)
    complex_ones = torch.randn(3, dtype=torch.complex64)
    buffers = {"one": torch.arange(10.0)[3::2][:1], "plain": complex_ones, "conjugate": complex_ones.conj()}
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer)
    model = nn.Sequential(model)
    save(model, path)
    fresh = nn.Sequential(nn.Linear(2, 2))
    for name, buffer in buffers.items():
        fresh[0].register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    load_(fresh, path)
    for name, buffer in buffers.items():
        assert torch.equal(fresh[0].get_buffer(name), buffer), name


def test_what_load_would_refuse_is_not_saved(tmp_path):
    weight = torch.randn(8, 8)
    weight[3, 3] = torch.nan
    model = nn.Sequential(CompressedLinear(DenseInt8.from_dense(weight)))
    with pytest.raises(CheckpointError, match=r"0\.weight: .*scale: expected finite numbers above 0"):
        save(model, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"0\.weight: only dense tensors with data .* on the meta device"):
        save(model.to("meta"), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_extra_state_that_is_no_tensor_is_named(tmp_path):
    class Counts(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

    with pytest.raises(CheckpointError, match=r"0\._extra_state: only dense .*, got dict from its module's get_extra"):
        save(nn.Sequential(Counts(2, 2)), tmp_path / "model.safetensors")

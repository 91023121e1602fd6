"""search: the knapsack against all allocations, budgets kept by measured models, kill and resume, recipes by layer."""

import copy
import importlib
import itertools
import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Mlp, TinyLm, assert_unchanged, state_of
from torch import nn

import engine
from engine import Prune, Quantize, Recipe
from engine.compress import allocate, measure
from engine.compress.allocate import Frontier

search_module = importlib.import_module("engine.compress.search")  # whose name is the function's in the package

NONE = {"guard": "none"}
CANDIDATES = {
    "int8": Recipe(None, Quantize(), **NONE),
    "half": Recipe(Prune(sparsity=0.5), Quantize(), **NONE),
    "most": Recipe(Prune(sparsity=0.9), Quantize(), **NONE),
}


@pytest.fixture(autouse=True)
def _briefly(monkeypatch):
    monkeypatch.setattr(measure, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(measure, "MOST_ROUNDS", 2)
    monkeypatch.setattr(search_module, "FRONTIER_POINTS", 3)
    monkeypatch.setattr(search_module, "TIGHTENINGS", 3)


tables = st.integers(1, 5).flatmap(
    lambda layers: st.lists(
        st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 5)), min_size=1, max_size=4), min_size=layers, max_size=layers
    )
)


@settings(max_examples=60, deadline=None)
@given(tables, st.floats(0, 10))
def test_the_frontier_is_that_of_all_allocations(table, budget):
    costs, losses = [[c for c, _ in layer] for layer in table], [[x for _, x in layer] for layer in table]
    frontier = Frontier(costs, losses)
    every = [
        (sum(c[i] for c, i in zip(costs, way, strict=True)), sum(x[i] for x, i in zip(losses, way, strict=True)))
        for way in itertools.product(*(range(len(layer)) for layer in table))
    ]
    fit = [cost for cost, loss in every if loss <= budget]
    got = frontier.cheapest(budget)
    assert (got is None) == (not fit)
    if got is not None:
        assert got.cost == pytest.approx(min(fit), abs=1e-9) and got.loss <= budget
        assert sum(c[i] for c, i in zip(costs, got.options, strict=True)) == pytest.approx(got.cost, abs=1e-9)
        assert sum(x[i] for x, i in zip(losses, got.options, strict=True)) == pytest.approx(got.loss, abs=1e-9)
    for i in range(len(frontier)):  # no other is as good in both
        mine = frontier[i]
        assert not any(c < mine.cost - 1e-9 and x < mine.loss - 1e-9 for c, x in every)
    least = frontier.best(max(c for c, _ in every))
    assert least is not None and least.loss == pytest.approx(min(x for _, x in every), abs=1e-9)


def test_a_frontier_of_many_states_stays_close(monkeypatch):
    draw = random.Random(0)
    costs = [[draw.random() for _ in range(4)] for _ in range(12)]
    losses = [[1 - cost for cost in layer] for layer in costs]  # none dominates another
    exact = Frontier(costs, losses)
    monkeypatch.setattr(allocate, "MOST_STATES", 300)
    thinned = Frontier(costs, losses)
    assert len(thinned) <= 301 and len(exact) > 10_000
    for budget in (2.0, 4.0, 6.0):
        assert thinned.cheapest(budget).cost <= exact.cheapest(budget).cost + 0.5


def small_search(model, x, **how):
    return engine.search(model, x.split(8), x[:8], candidates=CANDIDATES, progress=False, **how)


def test_what_is_chosen_keeps_to_its_budget_and_is_what_compress_makes():
    model, x = Mlp(), torch.randn(24, 256)
    before = state_of(model)
    found = small_search(model, x, loss_budget=0.05)
    assert_unchanged(model, before)
    assert found.chosen.loss <= 0.05 and found.chosen.seconds <= found.best_uniform.seconds
    assert {point.name for point in found.measured if point.uniform} == {"dense", *CANDIDATES}
    small = copy.deepcopy(model)
    if found.recipes:  # on an overloaded machine nothing may measure faster than dense
        engine.compress_(small, found.recipes)
    with torch.no_grad():
        losses = [((small(b) - model(b)).square().sum() / model(b).square().sum()).item() for b in x.split(8)]
    assert sum(losses) / 3 == pytest.approx(found.chosen.loss, rel=1e-4, abs=1e-9)
    assert sum(t.numel() * t.element_size() for t in small.parameters()) == found.chosen.bytes
    assert "chosen" in str(found)
    assert found.expected[-1] == (0.0, found.measured[0].seconds)  # all dense


def test_bytes_and_seconds_are_budgets_too():
    model, x = Mlp(), torch.randn(24, 256)
    total = sum(t.numel() * t.element_size() for t in model.parameters())
    small = small_search(model, x, size_budget=0.2 * total)
    assert small.chosen.bytes <= 0.2 * total
    assert small.chosen.loss <= min(p.loss for p in small.measured if p.uniform and p.bytes <= 0.2 * total)
    patient = small_search(model, x, time_budget=1e3)
    assert patient.chosen.name == "dense" and patient.recipes == {}
    with pytest.raises(ValueError, match="nothing keeps to 1 bytes: the least is"):
        small_search(model, x, size_budget=1)


def test_tied_weights_have_one_recipe():
    model = TinyLm()
    ids = torch.randint(0, 100, (2, 7))
    found = engine.search(model, [ids], ids, loss_budget=10.0, candidates=CANDIDATES, progress=False)
    row = next(row for row in found.layers if "embed" in row["names"])
    assert "lm_head" in row["names"]
    assert all(option["sparsity"] == 0 for option in row["options"].values())  # an embedding is never pruned
    assert found.recipes.get("embed") == found.recipes.get("lm_head")


def test_it_is_kept_in_a_file(tmp_path):
    model, x = Mlp(), torch.randn(24, 256)
    path, notes = tmp_path / "found.json", tmp_path / "notes"
    found = small_search(model, x, loss_budget=0.05, checkpoint=notes)
    lines = notes.read_text().splitlines()
    found.save(path)
    again = engine.Search.load(path)
    assert again.to_dict() == json.loads(json.dumps(found.to_dict()))
    assert again.recipes == found.recipes

    def never(*_):
        raise AssertionError("measured again")

    notes.write_text("\n".join(lines) + '\n{"key": "loss of half in fi')  # cut off
    resumed = small_search(model, x, loss_budget=0.05, checkpoint=notes, loss=never)
    assert resumed.to_dict() == found.to_dict()
    assert notes.read_text().splitlines() == lines
    with pytest.raises(ValueError, match="by a run on something else"):
        small_search(Mlp(), torch.randn(16, 256), loss_budget=0.05, checkpoint=notes)
    notes.write_text("no JSON\n")
    with pytest.raises(ValueError, match="can't be read as what an earlier run left"):
        small_search(model, x, loss_budget=0.05, checkpoint=notes)


KILLED = """
import sys, torch, engine
from engine import Prune, Quantize, Recipe
from engine.compress import measure
measure.LEAST_ROUNDS = measure.MOST_ROUNDS = 2
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(12)))
x = torch.randn(64, 64)
candidates = {f"{s}": Recipe(Prune(sparsity=s / 10), Quantize(), guard="none") for s in range(1, 9)}
found = engine.search(model, [x], x, loss_budget=0.1, candidates=candidates, checkpoint=sys.argv[1], progress=False)
found.save(sys.argv[2])
"""


def test_a_killed_search_goes_on(tmp_path):
    notes, out = tmp_path / "notes", tmp_path / "found.json"
    command = [sys.executable, "-c", KILLED, str(notes), str(out)]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not notes.exists() or notes.read_bytes().count(b"\n") < 12):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = notes.read_bytes()
    assert not out.exists() and before.count(b"\n") >= 12
    subprocess.run(command, check=True, timeout=100)
    whole = before[: before.rfind(b"\n") + 1]
    assert notes.read_bytes().startswith(whole)  # nothing of it was measured again
    keys = [json.loads(line)["key"] for line in notes.read_text().splitlines()[1:]]
    assert len(keys) == len(set(keys)) and engine.Search.load(out).chosen.loss <= 0.1


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_pictures(tmp_path, suffix):
    x = torch.randn(24, 256)
    small_search(Mlp(), x, loss_budget=0.05).save(tmp_path / f"found{suffix}")
    written = (tmp_path / f"found{suffix}").read_bytes()
    assert written.startswith(b"\x89PNG" if suffix == ".png" else b"<!doctype html>") and len(written) > 10_000
    assert b'src="http' not in written


def test_refuses():
    model, x = Mlp(), torch.randn(8, 256)
    for how in ({}, {"loss_budget": 1.0, "size_budget": 5}, {"loss_budget": -1.0}):
        with pytest.raises(ValueError, match="exactly one of"):
            small_search(model, x, **how)
    with pytest.raises(ValueError, match="candidates"):
        engine.search(model, [x], x, loss_budget=1, candidates={"dense": Recipe(None, Quantize())})
    with pytest.raises(ValueError, match="batches: expected at least one"):
        engine.search(model, [], x, loss_budget=1, candidates=CANDIDATES)


class Odd(torch.nn.Module):
    """A layer whose output is spoiled as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.how, self.linear = how, torch.nn.Linear(64, 64)

    def forward(self, x):
        y = self.linear(x)
        if self.how == "draws":
            y = y + torch.randn_like(y)
        elif self.how == "changes its input":
            x.add_(1)
        else:
            y = y * torch.nan
        return y


@pytest.mark.parametrize(
    "how, message", [("draws", "run twice"), ("changes its input", "run twice"), ("nan", "no number")]
)
def test_a_model_that_does_not_repeat_is_refused(how, message):
    x = torch.randn(8, 64)
    with pytest.raises(ValueError, match=message):
        engine.search(Odd(how).eval(), [x.clone()], x, loss_budget=0.1, progress=False)


def test_recipes_by_layer():
    model, x = Mlp(), torch.randn(24, 256)
    recipes = {"first": CANDIDATES["half"], "second": Recipe(None, Quantize("static"), **NONE)}
    report = engine.compress_(model, recipes, x)
    assert model.first.format.label == "bitmap int8" and model.second.input_scale is not None
    assert type(model.head) is nn.Linear and [row.name for row in report.layers] == ["first", "second"]
    assert Recipe.from_dict(report.recipe["first"]) == recipes["first"]


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"third": CANDIDATES["int8"]}, "matches no module"),
        ({"Linear": CANDIDATES["int8"]}, "'Linear' names no layer"),
        ({"embed": CANDIDATES["int8"], "lm_head": CANDIDATES["half"]}, "share a weight"),
    ],
)
def test_recipes_by_layer_refuse(recipes, message):
    model = TinyLm()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        engine.compress_(model, recipes)
    assert_unchanged(model, before)


def test_a_guard_of_speed_by_layer():
    """Each recipe has its own guard, and what one leaves alone doesn't disturb another's."""
    model, x = Mlp(), torch.randn(4, 256)
    recipes = {name: Recipe(Prune(sparsity=s), Quantize()) for name, s in (("first", 0.5), ("second", 0.8))}
    report = engine.compress_(model, recipes, x)
    assert {row.name for row in report.layers} | set(report.left_alone) == {"first", "second"}


def test_blocks_and_layers_inside():
    model = TinyLm(tied=False)
    inner = next(name for name, module in model.named_modules() if type(module) is nn.Linear and "." in name)
    block = inner.partition(".")[0]
    engine.compress_(model, {block: CANDIDATES["int8"], inner: CANDIDATES["half"]})
    assert model.get_submodule(inner).format.sparsity == pytest.approx(0.5, abs=0.01)
    others = [m for n, m in model.named_modules() if n.startswith(block) and hasattr(m, "format") and n != inner]
    assert others and all(m.format.sparsity == 0 for m in others)

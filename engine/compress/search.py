"""search: a recipe for each layer, by what each loses and what each gains on this machine."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from engine._journal import Journal
from engine.compress.allocate import Frontier
from engine.compress.calibrate import Calibration, calibrate, check_batches, check_calibration, progressing
from engine.compress.candidates import make_candidates, needs_inputs
from engine.compress.fingerprint import fingerprint
from engine.compress.recipe import DEFAULT_TARGETS, Prune, Quantize, Recipe
from engine.compress.report import machine
from engine.compress.search_bench import DENSE, Bench, Loss, relative_squared_error
from engine.compress.search_result import Point, Search, best_within
from engine.compress.targets import Target, find_targets
from engine.compress.trial import model_bytes

BUDGETS = ("loss", "seconds", "bytes")
TIGHTENINGS = 6  # allocations that are measured before the best one that was within the budget is taken
FRONTIER_POINTS = 5  # allocations along the predicted frontier that are measured besides
FORMAT = 2

CANDIDATES = {
    "int8": Recipe(None, Quantize(), guard="none"),
    "int8 static": Recipe(None, Quantize("static", smooth="least_squares"), guard="none"),
    "50 % + int8": Recipe(Prune(sparsity=0.5, importance="obs"), Quantize(), guard="none"),
    "70 % + int8": Recipe(Prune(sparsity=0.7, importance="obs"), Quantize(), guard="none"),
    "85 % + int8": Recipe(Prune(sparsity=0.85, importance="obs"), Quantize(), guard="none"),
}


def search(
    model: nn.Module,
    batches: Iterable[Any],
    example_inputs: Any,
    *,
    loss_budget: float | None = None,
    time_budget: float | None = None,
    size_budget: float | None = None,
    candidates: Mapping[str, Recipe] | None = None,
    loss: Loss = relative_squared_error,
    calibration: Calibration | None = None,
    targets: tuple[str, ...] = DEFAULT_TARGETS,
    ignore: tuple[str, ...] = (),
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
) -> Search:
    """Finds a recipe for each layer of `model`, which stays as it is. Apply it by `compress_(model, result.recipes)`.

    Each layer is compressed alone by each candidate, and the model's loss on `batches` measured; every candidate is
    timed in each layer inside the model, at the example inputs' shapes. The allocation is the exact solution of the
    knapsack, losses and times taken as sums over the layers. As they are not quite that, whatever is chosen is measured
    as a whole, and the budget tightened until it holds. Of all that was measured, the uniform recipes among it, the
    best is returned.

    Args:
        model: any module, not yet compressed.
        batches: what losses are measured on, each many times, and, without `calibration`, calibrated on. They and the
            dense model's outputs on them are held in memory.
        example_inputs: of the shape that the model is to be fast for.
        loss_budget: the largest loss; the fastest within it is sought. Exactly one budget is given.
        time_budget: the most seconds a forward pass; the least loss within them is sought.
        size_budget: the most bytes of parameters and buffers; alike.
        candidates: recipes by a name of your choice; their guard, targets and ignore are not read.
        loss: `(output, the dense model's output, batch)` to a number; by default the relative squared error.
        calibration: of :func:`engine.calibrate`, best of other batches than these.
        targets: as in Recipe.
        ignore: as in Recipe.
        checkpoint: a file to which each measurement is appended as it is made. A search that was ended goes on from
            there when called again, for another budget too. For another loss or calibration take another file.
        progress: show a bar on standard error, if that is a terminal.

    Raises:
        ValueError: not one budget, one that nothing meets, a checkpoint of another search, a model whose outputs are no
            numbers or not the same when it is run again, or as `compress_`.
    """
    budget = _budget(loss_budget, time_budget, size_budget)
    if candidates is not None and not isinstance(candidates, Mapping):
        kind = type(candidates).__name__
        raise TypeError(f"engine.search: candidates: expected a mapping of names to recipes, got {kind}")
    candidates = dict(CANDIDATES if candidates is None else candidates)
    if not candidates or DENSE in candidates or not all(isinstance(r, Recipe) for r in candidates.values()):
        raise ValueError(f"engine.search: candidates: expected recipes by name, none of them named {DENSE!r}")
    check_batches("search", batches)
    check_calibration("search", calibration)
    batches = list(batches)
    if not batches:
        raise ValueError("engine.search: batches: expected at least one, got none")
    found, _ = find_targets(model, targets, ignore, "search")
    if any(map(needs_inputs, candidates.values())) and calibration is None:
        moments = any(r.prune is not None and r.prune.importance == "obs" for r in candidates.values())
        how: dict[str, Any] = {"targets": targets, "ignore": ignore, "second_moment": moments}
        calibration = calibrate(model, batches, progress=progress, **how)
    identity = "" if checkpoint is None else _identity(model, found, candidates, batches, example_inputs)
    with Journal(checkpoint, identity, "engine.search") as notes:
        return _search(model, batches, example_inputs, loss, found, candidates, calibration, budget, notes, progress)


def _search(
    model: nn.Module,
    batches: list[Any],
    example_inputs: Any,
    loss: Loss,
    found: list[Target],
    candidates: dict[str, Recipe],
    calibration: Calibration | None,
    budget: dict[str, float],
    notes: Journal,
    progress: bool,
) -> Search:
    made = {name: make_candidates(found, recipe, calibration, {}) for name, recipe in candidates.items()}
    found = [target for target in found if any(target.name in modules for modules in made.values())]
    bench = Bench(model, batches, example_inputs, loss, found, made, notes, progress)
    bench.check_repeats()
    table = bench.measure_layers()
    chosen, measured, frontier = _choose(bench, table, budget)
    recipes = {n: candidates[chosen.options[t.name]] for t in found if chosen.options[t.name] != DENSE for n in t.names}
    every = max(1, len(frontier) // 500)
    dense = bench.dense_seconds
    expected = [(float(frontier.losses[i]), dense + float(frontier.costs[i])) for i in range(0, len(frontier), every)]
    plain = {name: recipe.to_dict() for name, recipe in candidates.items()}
    return Search(recipes, chosen, measured, table, expected, budget, plain, machine())


def _budget(loss: float | None, seconds: float | None, size: float | None) -> dict[str, float]:
    given = {n: float(v) for n, v in zip(BUDGETS, (loss, seconds, size), strict=True) if v is not None}
    if len(given) != 1 or not all(value >= 0 for value in given.values()):
        raise ValueError("engine.search: give exactly one of loss_budget, time_budget and size_budget, at least 0")
    return given


def _identity(
    model: nn.Module, targets: list[Target], candidates: Mapping[str, Recipe], batches: list[Any], inputs: Any
) -> str:
    """What must be the same for measurements to be of use again."""
    digest = hashlib.sha256(fingerprint(model).encode())
    for target in targets:
        digest.update(f"{target.names}".encode())
    for batch in (*batches, inputs):
        parts = (
            batch.items()
            if isinstance(batch, Mapping)
            else enumerate(batch if isinstance(batch, tuple | list) else [batch])
        )
        for key, value in parts:
            digest.update(f"{key} {_outline(value) if isinstance(value, Tensor) else value}".encode())
    for name, recipe in candidates.items():
        digest.update(f"{name} {json.dumps(recipe.to_dict(), sort_keys=True)}".encode())
    digest.update(json.dumps([FORMAT, type(model).__name__, machine()], sort_keys=True).encode())
    return digest.hexdigest()


def _outline(tensor: Tensor) -> str:
    """Enough of a tensor to tell it from another."""
    values = tensor.double()
    return f"{tuple(tensor.shape)} {values.sum().item()} {values.square().sum().item()}"


def _choose(bench: Bench, table: list[dict[str, Any]], budget: dict[str, float]) -> tuple[Point, list[Point], Frontier]:
    """The best of the uniform recipes and of the allocations that the knapsack gives, all measured."""
    ((what, most),) = budget.items()
    dense = bench.dense_seconds
    total = model_bytes(bench.model)
    ways = [[DENSE, *row["options"]] for row in table]
    losses = [[0.0, *(option["loss"] for option in row["options"].values())] for row in table]
    seconds = [_changes(row, "seconds") for row in table]
    sizes = [_changes(row, "bytes") for row in table]
    names = [row["name"] for row in table]

    def make(name: str, options: tuple[int, ...]) -> Point:
        chosen = {n: way[option] for n, way, option in zip(names, ways, options, strict=True)}
        same = next((p for p in points if p.options == chosen), None)
        return same or bench.point(name, chosen, table, uniform=False)

    points = [bench.point(DENSE, dict.fromkeys(names, DENSE), table, uniform=True)]
    for candidate in progressing(bench.made, "measuring uniform recipes", bench.progress):
        uniform = {row["name"]: candidate if candidate in row["options"] else DENSE for row in table}
        points.append(bench.point(candidate, uniform, table, uniform=True))
    frontier = Frontier(seconds, losses)
    steps = sorted({round(i * (len(frontier) - 1) / (FRONTIER_POINTS - 1)) for i in range(FRONTIER_POINTS)})
    for at in progressing(steps, "measuring the frontier", bench.progress):
        _add(points, make(f"frontier {at + 1} of {len(frontier)}", frontier[at].options))
    # What the parts add up to is not quite what the whole does: aim lower until the whole keeps to the budget, and
    # higher again where there is room left.
    by_size = Frontier(sizes, losses) if what == "bytes" else None
    offset = dense if what == "seconds" else total if what == "bytes" else 0.0
    aim, low, high = most, None, None
    for _ in range(TIGHTENINGS):
        allocation = frontier.cheapest(aim) if what == "loss" else (by_size or frontier).best(aim - offset)
        if allocation is None:
            low, aim = aim, (aim + high) / 2 if high is not None else aim * 2 + 1e-12
            continue
        point = make(f"{what} {most:.4g}", allocation.options)
        _add(points, point)
        if getattr(point, what) <= most:
            low = aim
            if what == "bytes":
                break  # bytes do add up
            aim = (aim + high) / 2 if high is not None else aim * 1.5
        else:
            high = aim
            aim = (aim + low) / 2 if low is not None else aim * max(0.25, 0.95 * most / getattr(point, what))
    return _settle(bench, points, budget), points, frontier


def _settle(bench: Bench, points: list[Point], budget: dict[str, float]) -> Point:
    """The best point. Where speed decides, it and the uniform recipes within the budget are timed in one loop, as
    they were measured minutes apart.
    """
    best = best_within(points, budget)
    if "loss" not in budget:
        return best
    uniform = [point for point in points[1:] if point.uniform and point.loss <= budget["loss"]]  # first is dense
    together = uniform if best in (points[0], *uniform) else [best, *uniform]
    if len(together) > 1:
        for point, seconds in zip(together, bench.time_together(together), strict=True):
            point.seconds = seconds
    return min(points[0], *together, key=lambda point: point.seconds) if together else points[0]


def _add(points: list[Point], point: Point) -> None:
    if all(point is not other for other in points):
        points.append(point)


def _changes(row: Mapping[str, Any], what: str) -> list[float]:
    """What each option adds to the model, the dense one first."""
    return [0.0, *(option[what][1] - option[what][0] for option in row["options"].values())]

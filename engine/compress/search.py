"""search: a recipe for each layer, by what each loses and what each gains on this machine."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engine._files import write_bytes, write_text
from engine._journal import Journal
from engine.compress import measure
from engine.compress.allocate import Frontier
from engine.compress.calibrate import Calibration, calibrate, progressing
from engine.compress.candidates import Compressed, make_candidates, needs_inputs
from engine.compress.fingerprint import fingerprint
from engine.compress.losses import output_tensor, real_rows
from engine.compress.recipe import DEFAULT_TARGETS, Prune, Quantize, Recipe
from engine.compress.report import _machine
from engine.compress.targets import Target, find_targets
from engine.compress.trial import describe, model_bytes

DENSE = "dense"  # the option to leave a layer as it is
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

Loss = Callable[[Any, Any, Any], Tensor | float]


@dataclasses.dataclass
class Point:
    """One way to compress the model, measured as a whole.

    Attributes:
        name: the candidate that all layers have, or what the allocation was made for.
        options: the candidate of each layer, "dense" where it is left alone.
        loss: of the model, against the dense one.
        seconds: a forward pass on the example inputs.
        bytes: parameters and buffers.
        uniform: whether every layer has the same recipe, where it can.
        expected_loss, expected_seconds: what the layers' own measurements add up to.
    """

    name: str
    options: dict[str, str]
    loss: float
    seconds: float
    bytes: int
    uniform: bool
    expected_loss: float
    expected_seconds: float


@dataclasses.dataclass
class Search:
    """What :func:`search` found. `print` it, or `save` it.

    Attributes:
        recipes: a recipe for each layer that is to be compressed, as :func:`engine.compress_` takes them.
        chosen: the allocation that they are, measured.
        measured: all that was measured as a whole, the dense model first, then the uniform recipes.
        layers: for each layer its names, kind, shape, and for each candidate the loss that it alone causes, the
            seconds it takes (dense and compressed), and its bytes (alike).
        expected: the frontier that the layers' measurements add up to, pairs of loss and seconds.
        budget: which and how much.
        candidates: the recipes that were tried, as dicts.
        machine: what it was measured on.
    """

    recipes: dict[str, Recipe]
    chosen: Point
    measured: list[Point]
    layers: list[dict[str, Any]]
    expected: list[tuple[float, float]]
    budget: dict[str, float]
    candidates: dict[str, dict[str, Any]]
    machine: dict[str, Any]

    @property
    def best_uniform(self) -> Point:
        """Of the uniform recipes within the budget (no compression at all among them) the best."""
        return _best([point for point in self.measured if point.uniform], self.budget)

    def __str__(self) -> str:
        """What was chosen, beside the best uniform recipe, and how many layers have which candidate."""
        dense, best, mine = self.measured[0], self.best_uniform, self.chosen
        counts: dict[str, int] = {}
        for option in mine.options.values():
            counts[option] = counts.get(option, 0) + 1
        rows = [("dense", dense), (f"best uniform: {best.name}", best), (f"chosen: {mine.name}", mine)]
        wide = max(len(name) for name, _ in rows)
        lines = [
            f"{name:{wide}}  loss {p.loss:.3g}  {p.seconds * 1e3:.2f} ms  {p.bytes / 1e6:.2f} MB" for name, p in rows
        ]
        lines.append("layers: " + ", ".join(f"{count} {option}" for option, count in counts.items()))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        recipes = {name: recipe.to_dict() for name, recipe in self.recipes.items()}
        points = [dataclasses.asdict(point) for point in self.measured]
        more = {"measured": points, "expected": [list(pair) for pair in self.expected]}
        return {**plain, "recipes": recipes, "chosen": dataclasses.asdict(self.chosen), **more}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Search":
        """The inverse of `to_dict`."""
        values = dict(values)
        values["recipes"] = {name: Recipe.from_dict(recipe) for name, recipe in values["recipes"].items()}
        values["chosen"] = Point(**values["chosen"])
        values["measured"] = [Point(**point) for point in values["measured"]]
        values["expected"] = [tuple(pair) for pair in values["expected"]]
        return cls(**values)

    def save(self, path: str | os.PathLike) -> None:
        """Writes `.json` (with the recipes), the frontier as `.png`, or a page with all of it as `.html`."""
        path = Path(path)
        if path.suffix == ".json":
            write_text(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")
            return
        from engine.compress import page  # which draws, and takes a second to import

        if path.suffix == ".png":
            write_bytes(path, page.frontier(self))
        elif path.suffix == ".html":
            write_text(path, page.page(search=self))
        else:
            raise ValueError(f"engine.Search.save: expected a name ending in .json, .png or .html, got {path.name!r}")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Search":
        """Reads a `.json` that `save` wrote. ValueError if the file holds anything else."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"engine.Search.load: {path}: is no search.json: {error}") from error


def relative_squared_error(output: Any, dense: Any, batch: Any) -> Tensor:
    """How far the output is from the dense model's, relative to its size; padding left out."""
    got, want = (real_rows(output_tensor(o), batch).float() for o in (output, dense))
    return (got - want).square().sum() / want.square().sum().clamp_min(1e-30)


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
        ValueError: not one budget, one that nothing meets, a checkpoint of another search, or as `compress_`.
    """
    budget = _budget(loss_budget, time_budget, size_budget)
    candidates = dict(CANDIDATES if candidates is None else candidates)
    if not candidates or DENSE in candidates or not all(isinstance(r, Recipe) for r in candidates.values()):
        raise ValueError(f"engine.search: candidates: expected recipes by name, none of them named {DENSE!r}")
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
    bench = _Bench(model, batches, example_inputs, loss, found, made, notes, progress)
    table = bench.measure_layers()
    chosen, measured, frontier = bench.choose(table, budget)
    recipes = {n: candidates[chosen.options[t.name]] for t in found if chosen.options[t.name] != DENSE for n in t.names}
    every = max(1, len(frontier) // 500)
    dense = bench.dense_seconds
    expected = [(float(frontier.losses[i]), dense + float(frontier.costs[i])) for i in range(0, len(frontier), every)]
    plain = {name: recipe.to_dict() for name, recipe in candidates.items()}
    return Search(recipes, chosen, measured, table, expected, budget, plain, _machine())


def _budget(loss: float | None, seconds: float | None, size: float | None) -> dict[str, float]:
    given = {n: float(v) for n, v in zip(BUDGETS, (loss, seconds, size), strict=True) if v is not None}
    if len(given) != 1 or not all(value >= 0 for value in given.values()):
        raise ValueError("engine.search: give exactly one of loss_budget, time_budget and size_budget, at least 0")
    return given


def _best(points: list[Point], budget: Mapping[str, float]) -> Point:
    """The fastest within the loss, or the one of least loss within the seconds or bytes."""
    ((what, most),) = budget.items()
    fit = [point for point in points if getattr(point, what) <= most]
    if not fit:
        least = min(points, key=lambda point: getattr(point, what))
        raise ValueError(f"engine.search: nothing keeps to {most:.4g} {what}: the least is {getattr(least, what):.4g}")
    return min(fit, key=lambda point: point.seconds if what == "loss" else point.loss)


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
    digest.update(json.dumps([FORMAT, type(model).__name__, _machine()], sort_keys=True).encode())
    return digest.hexdigest()


def _outline(tensor: Tensor) -> str:
    """Enough of a tensor to tell it from another."""
    values = tensor.double()
    return f"{tuple(tensor.shape)} {values.sum().item()} {values.square().sum().item()}"


@dataclasses.dataclass
class _Bench:
    """The model, its compressed layers by candidate, and what is measured of them."""

    model: nn.Module
    batches: list[Any]
    inputs: Any
    loss: Loss
    targets: list[Target]
    made: dict[str, dict[str, Compressed]]
    notes: Journal
    progress: bool
    outputs: list[Any] = dataclasses.field(default_factory=list)

    @property
    def dense_seconds(self) -> float:
        """A forward pass of the model as it is."""
        return self.notes.get("seconds of the dense model", lambda: measure.time_model(self.model, self.inputs, {})[0])

    def measure_layers(self) -> list[dict[str, Any]]:
        """A row for each target (see Search.layers)."""
        # Losses first: they take longest, and ask for no quiet machine.
        pairs = [(t, name) for t in self.targets for name in self.made if t.name in self.made[name]]
        losses: dict[tuple[str, str], float] = {}
        for target, name in progressing(pairs, "measuring losses", self.progress):
            modules = {n: self.made[name][n] for n in target.names}
            key = f"loss of {name} in {target.name}"
            losses[target.name, name] = self.notes.get(key, functools.partial(self.loss_with, modules))
        times: dict[str, dict[str, list[float]]] = {}
        for name in progressing(self.made, "timing", self.progress):
            times[name] = self.notes.get(f"times of {name}", functools.partial(self._time, name))
        # A layer's dense time is measured anew beside each candidate: one median of them all, so that all are compared
        # with the same.
        seen: dict[str, list[float]] = {}
        for layers in times.values():
            for layer_name, pair in layers.items():
                seen.setdefault(layer_name, []).append(pair[0])
        before = {layer_name: statistics.median(seconds) for layer_name, seconds in seen.items()}
        rows: list[dict[str, Any]] = []
        for target in self.targets:
            options = {}
            for name in (name for t, name in pairs if t is target):
                timed = [(before[n], times[name][n][1]) for n in target.names if n in times[name]]
                layer = describe(target, self.made[name][target.name])
                options[name] = {
                    "loss": losses[target.name, name],
                    "seconds": [sum(side) for side in zip(*timed, strict=True)] or [0.0, 0.0],
                    "bytes": [layer.bytes_before, layer.bytes_after],
                    "sparsity": layer.sparsity,
                }
            described = {"kind": "/".join(sorted(kind.__name__ for kind in target.kinds)), "options": options}
            shape = list(target.weight.shape)
            rows.append({"name": target.name, "names": list(target.names), "shape": shape, **described})
        return rows

    def _time(self, candidate: str) -> dict[str, list[float]]:
        """Seconds of each layer, dense and compressed, in proportion to the dense model's in the same loop: loops that
        were run minutes apart differ by what the machine did meanwhile.
        """
        layers, (whole, _) = measure.time_layers(self.model, self.inputs, self.made[candidate])
        factor = self.dense_seconds / whole
        return {name: [factor * seconds for seconds in pair] for name, pair in layers.items()}

    def loss_with(self, modules: Mapping[str, nn.Module]) -> float:
        """The mean loss over the batches with these modules in place."""
        with measure.evaluating(self.model):
            if not self.outputs:
                self.outputs = [measure.run(self.model, batch) for batch in self.batches]
            with measure.replaced(self.model, modules):
                pairs = zip(self.batches, self.outputs, strict=True)
                losses = [float(self.loss(measure.run(self.model, batch), dense, batch)) for batch, dense in pairs]
        mean = sum(losses) / len(losses)
        return mean if mean < math.inf else math.inf  # NaN: as bad as can be, and comparable

    def modules_of(self, options: Mapping[str, str]) -> dict[str, Compressed]:
        """What stands in the model when each target has its option."""
        kept = [(t, options[t.name]) for t in self.targets if options[t.name] != DENSE]
        return {n: self.made[option][n] for t, option in kept for n in t.names}

    def point(self, name: str, options: dict[str, str], table: list[dict], dense: float, uniform: bool) -> Point:
        """An allocation, measured as a whole (or noted before)."""
        modules = self.modules_of(options)
        key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]
        loss = self.notes.get(f"loss of model {key}", lambda: self.loss_with(modules)) if modules else 0.0
        ratio = 1.0
        if modules:
            # Against the dense model in the same loop: what the machine does meanwhile falls on both.
            before, after = self.notes.get(
                f"times of model {key}", lambda: list(measure.time_model(self.model, self.inputs, modules))
            )
            ratio = after / before
        size = model_bytes(self.model)
        expected_loss, expected_seconds = 0.0, dense
        for row in table:
            if options[row["name"]] != DENSE:
                option = row["options"][options[row["name"]]]
                expected_loss += option["loss"]
                expected_seconds += option["seconds"][1] - option["seconds"][0]
                size += option["bytes"][1] - option["bytes"][0]
        return Point(name, options, loss, dense * ratio, size, uniform, expected_loss, expected_seconds)

    def choose(self, table: list[dict], budget: dict[str, float]) -> tuple[Point, list[Point], Frontier]:
        """The best of the uniform recipes and of the allocations that the knapsack gives, all measured."""
        ((what, most),) = budget.items()
        dense = self.dense_seconds
        total = model_bytes(self.model)
        ways = [[DENSE, *row["options"]] for row in table]
        losses = [[0.0, *(option["loss"] for option in row["options"].values())] for row in table]
        seconds = [_changes(row, "seconds") for row in table]
        sizes = [_changes(row, "bytes") for row in table]
        names = [row["name"] for row in table]

        def make(name: str, options: tuple[int, ...]) -> Point:
            chosen = {n: way[option] for n, way, option in zip(names, ways, options, strict=True)}
            same = next((p for p in points if p.options == chosen), None)
            return same or self.point(name, chosen, table, dense, uniform=False)

        points = [self.point(DENSE, dict.fromkeys(names, DENSE), table, dense, uniform=True)]
        for candidate in progressing(self.made, "measuring uniform recipes", self.progress):
            uniform = {row["name"]: candidate if candidate in row["options"] else DENSE for row in table}
            points.append(self.point(candidate, uniform, table, dense, uniform=True))
        frontier = Frontier(seconds, losses)
        steps = sorted({round(i * (len(frontier) - 1) / (FRONTIER_POINTS - 1)) for i in range(FRONTIER_POINTS)})
        for at in progressing(steps, "measuring the frontier", self.progress):
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
        return self._settle(points, budget, dense), points, frontier

    def _settle(self, points: list[Point], budget: dict[str, float], dense: float) -> Point:
        """The best point. Where speed decides, it and the uniform recipes within the budget are timed in one loop, as
        they were measured minutes apart.
        """
        best = _best(points, budget)
        if "loss" not in budget:
            return best
        uniform = [point for point in points[1:] if point.uniform and point.loss <= budget["loss"]]  # first is dense
        together = uniform if best in (points[0], *uniform) else [best, *uniform]
        if len(together) > 1:
            key = hashlib.sha256(json.dumps([p.options for p in together], sort_keys=True).encode()).hexdigest()[:16]
            variants = [{}, *(self.modules_of(point.options) for point in together)]
            make = functools.partial(measure.time_variants, self.model, self.inputs, variants)
            before, *after = self.notes.get(f"times together {key}", make)
            for point, seconds in zip(together, after, strict=True):
                point.seconds = dense * seconds / before
        return min(points[0], *together, key=lambda point: point.seconds) if together else points[0]


def _add(points: list[Point], point: Point) -> None:
    if all(point is not other for other in points):
        points.append(point)


def _changes(row: Mapping[str, Any], what: str) -> list[float]:
    """What each option adds to the model, the dense one first."""
    return [0.0, *(option[what][1] - option[what][0] for option in row["options"].values())]

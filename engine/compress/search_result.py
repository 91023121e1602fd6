"""What a search found: the recipes, what was measured, and how to save it."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine._files import write_bytes, write_text
from engine.compress.recipe import Recipe


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
        return best_within([point for point in self.measured if point.uniform], self.budget)

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


def best_within(points: list[Point], budget: Mapping[str, float]) -> Point:
    """The fastest within the loss, or the one of least loss within the seconds or bytes."""
    ((what, most),) = budget.items()
    fit = [point for point in points if getattr(point, what) <= most]
    if not fit:
        least = min(points, key=lambda point: getattr(point, what))
        raise ValueError(f"engine.search: nothing keeps to {most:.4g} {what}: the least is {getattr(least, what):.4g}")
    return min(fit, key=lambda point: point.seconds if what == "loss" else point.loss)

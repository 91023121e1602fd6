"""What a search measures: each candidate in each layer, and whole models."""

import dataclasses
import functools
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from engine._journal import Journal
from engine.compress import measure
from engine.compress.calibrate import progressing
from engine.compress.candidates import Compressed
from engine.compress.losses import output_tensor, real_rows
from engine.compress.search_result import Point
from engine.compress.targets import Target
from engine.compress.trial import describe, model_bytes

DENSE = "dense"  # the option to leave a layer as it is
SAME_OUTPUT = 1e-6  # relative squared error: more than the order of sums makes

Loss = Callable[[Any, Any, Any], Tensor | float]


def relative_squared_error(output: Any, dense: Any, batch: Any) -> Tensor:
    """How far the output is from the dense model's, relative to its size; padding left out."""
    got, want = (real_rows(output_tensor(o), batch).float() for o in (output, dense))
    return (got - want).square().sum() / want.square().sum().clamp_min(1e-30)


@dataclasses.dataclass
class Bench:
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

    def check_repeats(self) -> None:
        """Raises ValueError where the dense model, run twice, differs from itself: then no loss says anything."""
        loss = self.notes.get("loss of the dense model against itself", functools.partial(self.loss_with, {}))
        if not loss < math.inf:
            raise ValueError("engine.search: the dense model's loss against itself is no number: look at its outputs")
        if self.loss is relative_squared_error and loss > SAME_OUTPUT:
            raise ValueError(
                f"engine.search: run twice, the model gives outputs that differ (relative squared error {loss:.2g}): "
                "it draws random numbers, or changes its inputs or itself"
            )

    def modules_of(self, options: Mapping[str, str]) -> dict[str, Compressed]:
        """What stands in the model when each target has its option."""
        kept = [(t, options[t.name]) for t in self.targets if options[t.name] != DENSE]
        return {n: self.made[option][n] for t, option in kept for n in t.names}

    def point(self, name: str, options: dict[str, str], table: list[dict[str, Any]], uniform: bool) -> Point:
        """An allocation, measured as a whole (or noted before)."""
        modules = self.modules_of(options)
        key, dense = _key(options), self.dense_seconds
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

    def time_together(self, points: list[Point]) -> list[float]:
        """Seconds of each, timed in one loop (or noted before)."""
        variants = [{}, *(self.modules_of(point.options) for point in points)]
        make = functools.partial(measure.time_variants, self.model, self.inputs, variants)
        before, *after = self.notes.get(f"times together {_key([point.options for point in points])}", make)
        return [self.dense_seconds * seconds / before for seconds in after]


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

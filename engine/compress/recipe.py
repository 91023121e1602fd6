"""What to do to a model: frozen, checked when made, written to and read from plain dicts."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

SCOPES = ("row", "layer", "model")
PATTERNS = ("unstructured", "2:4", "block")
IMPORTANCES = ("magnitude", "wanda", "obs")
ACTIVATIONS = ("dynamic", "static", "none")
STATIC_SCALES = ("amax", "percentile", "least_squares")
GUARDS = ("speed", "size", "none")
DEFAULT_TARGETS = ("Linear", "Embedding", "Conv2d", "Conv1D")


def _one_of(owner: str, field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"engine.{owner}: {field}: expected one of {', '.join(allowed)}, got {value!r}")


def _from_dict(cls: type, values: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(values, dict) or not values.keys() <= known:
        raise ValueError(f"engine.{cls.__name__}: expected a dict with keys among {sorted(known)}, got {values!r}")
    return cls(**values)


@dataclasses.dataclass(frozen=True)
class Prune:
    """Which weights to drop: exactly one of `sparsity` and `threshold`.

    Attributes:
        sparsity: fraction to drop, in [0, 1): the smallest magnitudes of each `scope`.
        threshold: drop where `|w| <= threshold`.
        scope: "row" (each output), "layer", or "model" (all layers against each other).
        pattern: "unstructured": any weight may go; "2:4": two of every four along a row go (sparsity is 0.5); "block":
            blocks of 32x32 go as a whole, by their root mean square, to which `threshold` and `scope` then apply (a
            "row" is one of blocks).
        importance: "magnitude": `|w|`; "wanda": `|w|` times the norm of its input; "obs": by the second moment of the
            inputs, with what is kept corrected for what is dropped (SparseGPT). The last two look at the inputs:
            `compress_` needs a calibration or example inputs, and a sparsity rather than a threshold.
    """

    sparsity: float | None = None
    threshold: float | None = None
    scope: str = "layer"
    pattern: str = "unstructured"
    importance: str = "magnitude"

    def __post_init__(self) -> None:
        for field in ("sparsity", "threshold"):
            value = getattr(self, field)
            if value is not None:
                if not isinstance(value, numbers.Real):
                    raise TypeError(f"engine.Prune: {field}: expected a number, got {type(value).__name__}")
                object.__setattr__(self, field, float(value))
        if (self.sparsity is None) == (self.threshold is None):
            raise ValueError("engine.Prune: give exactly one of sparsity and threshold")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"engine.Prune: sparsity: expected a number in [0, 1), got {self.sparsity!r}")
        if self.threshold is not None and not (self.threshold >= 0 and math.isfinite(self.threshold)):
            raise ValueError(f"engine.Prune: threshold: expected a finite number of at least 0, got {self.threshold!r}")
        _one_of("Prune", "scope", self.scope, SCOPES)
        _one_of("Prune", "pattern", self.pattern, PATTERNS)
        _one_of("Prune", "importance", self.importance, IMPORTANCES)
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError(f"engine.Prune: pattern '2:4' has sparsity 0.5, got {self.sparsity!r}")
        if self.pattern == "block" and self.importance == "obs":
            raise ValueError("engine.Prune: pattern 'block' has importance 'magnitude' or 'wanda', not 'obs'")
        if self.importance != "magnitude":
            if self.sparsity is None:
                raise ValueError(f"engine.Prune: importance {self.importance!r} needs a sparsity, not a threshold")
            if self.scope == "model":
                raise ValueError(
                    f"engine.Prune: importance {self.importance!r} has scope 'row' or 'layer', not 'model'"
                )

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain values; `from_dict` takes it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Prune":
        """The inverse of `to_dict`. ValueError on an unknown key or a bad value."""
        return _from_dict(cls, values)


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Weights to int8, and activations as `activation` says.

    Attributes:
        activation: "dynamic": each row of activations to int8 by its own maximum; "static": by one scale a layer,
            calibrated on the example inputs; "none": activations stay float (not together with pruning).
        input_scale: how a static scale is chosen: "amax" (nothing is clipped), "percentile" (99.99) or "least_squares".
        weight_clip: None: a row's scale is its amax / 127; "least_squares": large weights of a layer are clipped where
            the finer steps for all others gain more.
        smooth: with "static" and "amax", a scale for each channel of the input instead of one for all, so that a few
            channels with outliers no longer cost all others their precision; the weight takes over what a channel is
            divided by (SmoothQuant, Xiao et al., 2022; free at run time). A number from 0 to 1 says how much of the
            channels' differences moves there: amax(x)^smooth / amax(w)^(1 - smooth); or "least_squares": for each layer
            the one by which rounding of both together is expected to lose least. None: one scale.
    """

    activation: str = "dynamic"
    input_scale: str = "amax"
    weight_clip: str | None = None
    smooth: float | str | None = None

    def __post_init__(self) -> None:
        _one_of("Quantize", "activation", self.activation, ACTIVATIONS)
        _one_of("Quantize", "input_scale", self.input_scale, STATIC_SCALES)
        if self.weight_clip is not None:
            _one_of("Quantize", "weight_clip", self.weight_clip, ("least_squares",))
        if self.smooth is None:
            return
        if isinstance(self.smooth, numbers.Real) and not isinstance(self.smooth, bool) and 0 <= self.smooth <= 1:
            object.__setattr__(self, "smooth", float(self.smooth))
        elif self.smooth != "least_squares":
            raise ValueError(f"engine.Quantize: smooth: expected 0 to 1 or 'least_squares', got {self.smooth!r}")
        if self.activation != "static" or self.input_scale != "amax":
            raise ValueError("engine.Quantize: smooth goes with activation='static' and input_scale='amax'")

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain values; `from_dict` takes it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Quantize":
        """The inverse of `to_dict`. ValueError on an unknown key or a bad value."""
        return _from_dict(cls, values)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to compress a model.

    Attributes:
        prune: weights to drop in Linear, Conv2d and Conv1D layers, or None. Embeddings are never pruned.
        quantize: int8 for what is kept, or None.
        targets: modules to compress, each by class name ("Linear"; "Conv1D" is Hugging Face's), qualified name
            ("encoder.layer.0") or "re:" and a pattern that matches from the beginning of the qualified name.
        ignore: modules to leave out, said in the same ways.
        guard: "speed": a layer is compressed only where it measures faster on the example inputs; "size": only where it
            gets smaller; "none": always.
    """

    prune: Prune | None = None
    quantize: Quantize | None = None
    targets: tuple[str, ...] = DEFAULT_TARGETS
    ignore: tuple[str, ...] = ()
    guard: str = "speed"

    def __post_init__(self) -> None:
        if self.prune is None and self.quantize is None:
            raise ValueError("engine.Recipe: nothing to do: give prune, quantize or both")
        for field, cls in (("prune", Prune), ("quantize", Quantize)):
            value = getattr(self, field)
            if value is not None and not isinstance(value, cls):
                raise TypeError(f"engine.Recipe: {field}: expected engine.{cls.__name__}, got {type(value).__name__}")
        for field in ("targets", "ignore"):
            value = getattr(self, field)
            if not isinstance(value, tuple | list) or not all(isinstance(name, str) for name in value):
                raise TypeError(f"engine.Recipe: {field}: expected a tuple of strings, got {value!r}")
            object.__setattr__(self, field, tuple(value))
        if not self.targets:
            raise ValueError("engine.Recipe: targets: expected at least one")
        _one_of("Recipe", "guard", self.guard, GUARDS)
        if self.prune is not None and self.quantize is not None and self.quantize.activation == "none":
            raise ValueError(
                "engine.Recipe: pruned int8 weights need int8 activations: "
                "use Quantize(activation='dynamic' or 'static'), or prune without quantize to keep both in float"
            )

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain values, fit for JSON; `from_dict` takes it back."""
        return {**dataclasses.asdict(self), "targets": list(self.targets), "ignore": list(self.ignore)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The inverse of `to_dict`. ValueError on an unknown key or a bad value."""
        if isinstance(values, dict):
            nested: dict[str, Any] = {"prune": Prune, "quantize": Quantize}
            values = {k: nested[k].from_dict(v) if k in nested and v is not None else v for k, v in values.items()}
        return _from_dict(cls, values)


def check_recipes(recipe: Recipe | Mapping[str, Recipe], owner: str) -> list[Recipe]:
    """The recipes that an argument stands for: one for all layers, or one for each by its qualified name.

    Raises:
        TypeError: it is neither.
    """
    recipes = list(recipe.values()) if isinstance(recipe, Mapping) else [recipe]
    for each in recipes:
        if not isinstance(each, Recipe):
            raise TypeError(f"engine.{owner}: recipe: expected engine.Recipe, got {type(each).__name__}")
    return recipes


def describe_recipes(recipe: Recipe | Mapping[str, Recipe]) -> dict[str, Any]:
    """As plain values: one recipe's, or each layer's by its name."""
    if isinstance(recipe, Mapping):
        return {name: each.to_dict() for name, each in recipe.items()}
    return recipe.to_dict()

"""Which modules a recipe speaks of, and which of them can be compressed."""

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from engine.compress.recipe import DEFAULT_TARGETS, Recipe
from engine.nn._replace import check_not_wrapped, hooks_of, is_as_made, is_conv1d
from engine.nn.compressed import _Compressed
from engine.nn.conv2d import as_matrix, as_weight, why_not
from engine.ops._check import FLOAT_DTYPES

LOG = logging.getLogger("engine")
COMPRESSIBLE = (nn.Linear, nn.Embedding, nn.Conv2d)  # exactly these: a subclass may read its weight in ways of its own


def compressible(module: nn.Module) -> bool:
    """Whether a module is of a class that has a compressed twin."""
    return type(module) in COMPRESSIBLE or is_conv1d(module)


def matches(pattern: str, name: str, class_name: str = "") -> bool:
    """Whether `pattern` (a class name, a qualified name, or "re:" and a regular expression) means this module."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern in (name, class_name)


def check_patterns(owner: str, patterns: Iterable[str]) -> None:
    """Raises ValueError naming the "re:" pattern that is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            if pattern.startswith("re:"):
                raise ValueError(f"engine.{owner}: {pattern!r} is no regular expression: {error}") from error


@dataclasses.dataclass(frozen=True)
class Target:
    """One weight to compress, with every module that holds it (several where it is tied)."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    @property
    def name(self) -> str:
        """The first module's qualified name."""
        return self.names[0]

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight."""
        return self.modules[0].weight  # type: ignore[return-value]

    @property
    def matrix(self) -> torch.Tensor:
        """The dense weight as the matrix `[N, K]` that is compressed."""
        return as_matrix(self.weight.detach(), self.transposed)

    @property
    def columns(self) -> int:
        """K."""
        return self.weight.numel() // self.weight.shape[1 if self.transposed else 0]

    @property
    def transposed(self) -> bool:
        """Whether the dense weight is `[K, N]`."""
        return is_conv1d(self.modules[0])

    def as_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix `[N, K]` in the shape of the dense weight."""
        return as_weight(matrix, tuple(self.weight.shape[2:]) or None, self.transposed)

    @property
    def kinds(self) -> set[type[nn.Module]]:
        """Types of the modules."""
        return {type(module) for module in self.modules}

    @property
    def multiplied(self) -> bool:
        """Whether inputs are multiplied by the weight anywhere; else it is only looked up."""
        return self.kinds != {nn.Embedding}

    @property
    def prunable(self) -> bool:
        """Whether the weight may be pruned: no embedding has it."""
        return nn.Embedding not in self.kinds


def find_targets(
    model: nn.Module, targets: tuple[str, ...], ignore: tuple[str, ...], owner: str
) -> tuple[list[Target], dict[str, str]]:
    """The weights that `targets` without `ignore` mean, and the modules left out with the reason for each.

    Raises:
        ValueError: the model is compressed already, a pattern matches nothing or nothing that can be compressed, or a
            weight holds a NaN or an infinity.
    """
    check_patterns(owner, (*targets, *ignore))
    if not isinstance(model, nn.Module):
        raise TypeError(f"engine.{owner}: model: expected a torch.nn.Module, got {type(model).__name__}")
    # torch.compile's wrapper, and `model.compile()`: every measurement would be one of compiling anew.
    compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    if compiled or isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"engine.{owner}: the model is {'compiled' if compiled else 'scripted'}: do that after it is compressed"
        )
    wrappers = (item for item in model.named_parameters() if is_traceable_wrapper_subclass(item[1]))
    if sharded := next((name for name, each in wrappers if type(each).__name__ == "DTensor"), None):
        raise ValueError(
            f"engine.{owner}: the model is sharded, {sharded} is a DTensor: do that after it is compressed"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    compressed = [name for name, module in modules.items() if isinstance(module, _Compressed)]
    if compressed:
        raise ValueError(
            f"engine.{owner}: the model is compressed already: {compressed[0]} is one of {len(compressed)}"
        )
    if compressible(model):
        kind = type(model).__name__
        twin = "Linear" if is_conv1d(model) else kind
        raise ValueError(
            f"engine.{owner}: the model is itself a {kind}, which can't be replaced in place: "
            f"use engine.nn.Compressed{twin}.from_dense"
        )
    chosen: dict[str, nn.Module] = {}
    others: dict[str, str] = {}
    matched_by = dict.fromkeys(targets, 0)
    expressions = [pattern for pattern in matched_by if pattern.startswith("re:")]
    for name, module in modules.items():
        lazy = isinstance(module, LazyModuleMixin)
        own = (module.cls_to_become or type(module)) if isinstance(module, LazyModuleMixin) else type(module)
        parametrized = parametrize.is_parametrized(module)
        if parametrized:  # of a class made for it
            own = own.__bases__[0]
        plain = (word for word in dict.fromkeys((name, own.__name__)) if word in matched_by)
        for pattern in (*plain, *(pattern for pattern in expressions if matches(pattern, name))):
            inside = pattern if pattern.startswith("re:") else None
            matched_by[pattern] += inside is None or compressible(module)
            if lazy:
                others[name] = "it is lazy: run the model once before"
            elif parametrized:
                others[name] = "it is parametrized: torch.nn.utils.parametrize.remove_parametrizations makes it plain"
            elif compressible(module):
                chosen[name] = module
            elif pattern in DEFAULT_TARGETS and type(module).__name__ == pattern:
                if any(compressible(child) for child in module.modules()):
                    continue  # a wrapper, of which the inside is found by itself
                standard = "Hugging Face's Conv1D" if pattern == "Conv1D" else pattern
                what = "a subclass of" if isinstance(module, COMPRESSIBLE) else "not"
                others[name] = f"its class is {what} {standard}, which may compute something else"
            elif inside is None:
                chosen |= _compressible_below(name, module, pattern, owner)
    missed = [pattern for pattern, count in matched_by.items() if count == 0]
    if missed and (not {*missed} <= {*DEFAULT_TARGETS} or len(missed) == len(targets)):
        raise ValueError(f"engine.{owner}: target {missed[0]!r} matches no module that can be compressed")
    for pattern in ignore:
        if not any(_ignores(pattern, name, type(module).__name__) for name, module in modules.items()):
            LOG.warning("engine.%s: ignore=%r matches nothing in the model", owner, pattern)
    found, left = _group(model, modules, chosen, ignore, owner)
    return found, others | left


def _compressible_below(name: str, module: nn.Module, pattern: str, owner: str) -> dict[str, nn.Module]:
    """The layers inside a block that a target names; ValueError where there is none."""
    prefix = f"{name}." if name else ""
    inner = module.named_modules(remove_duplicate=False)
    found = {prefix + inside: child for inside, child in inner if inside and compressible(child)}
    if not found:
        kinds = ", ".join(kind.__name__ for kind in COMPRESSIBLE)
        raise ValueError(
            f"engine.{owner}: target {pattern!r} means {name or 'the model'}, a {type(module).__name__}, "
            f"which can't be compressed: only {kinds} and Hugging Face's Conv1D can"
        )
    return found


def _group(
    model: nn.Module, modules: dict[str, nn.Module], chosen: dict[str, nn.Module], ignore: tuple[str, ...], owner: str
) -> tuple[list[Target], dict[str, str]]:
    """Puts the modules that share a weight together, and leaves out what can't be compressed as a whole."""
    holders: dict[int, list[str]] = {}  # every name under which a parameter stands in the model
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    groups: dict[int, list[str]] = {}
    left: dict[str, str] = {}
    for name, module in chosen.items():
        ignored = next((p for p in ignore if _ignores(p, name, type(module).__name__)), None)
        if ignored is not None:
            left[name] = f"ignored by {ignored!r}"
        else:
            groups.setdefault(id(module.weight), []).append(name)
    found = []
    for names in groups.values():
        target = Target(tuple(names), tuple(modules[name] for name in names))
        others = set(holders.get(id(target.weight), ())) - {f"{name}.weight" for name in names}
        reason = _why_not(target, others)
        if reason:
            left |= dict.fromkeys(names, reason)
            continue
        if target.weight.is_meta:
            raise ValueError(f"engine.{owner}: {target.name}: is on the meta device: there is nothing to compress yet")
        if not torch.isfinite(target.weight.detach()).all():
            raise ValueError(f"engine.{owner}: {target.name}: its weight holds a NaN or an infinity")
        found.append(target)
    return found, left


def _ignores(pattern: str, name: str, class_name: str) -> bool:
    """As `matches`; a block's name also stands for the layers inside it."""
    return matches(pattern, name, class_name) or (not pattern.startswith("re:") and name.startswith(f"{pattern}."))


def _why_not(target: Target, others: set[str]) -> str | None:
    weight = target.weight
    if others:
        return f"its weight is shared with {min(others)}, which stays as it is"
    if is_traceable_wrapper_subclass(weight):
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if weight.numel() == 0:
        return "its weight is empty"
    if any(isinstance(module, nn.Embedding) and module.max_norm is not None for module in target.modules):
        return "max_norm changes its weight as it runs"
    if reason := next((why for conv in target.modules if isinstance(conv, nn.Conv2d) and (why := why_not(conv))), None):
        return reason
    if len({is_conv1d(module) for module in target.modules}) > 1:
        return "its weight is shared between a Conv1D and others, which multiply by its transpose"
    if not all(is_as_made(module) for module in target.modules):
        return "it has a forward or parts of its own, or methods bound to it, which a replacement would lose"
    if hooks := next(filter(None, map(hooks_of, target.modules)), None):
        return f"it has hooks ({hooks}), which a replacement would lose"
    return None


def patterns_of(recipe: Recipe | Mapping[str, Recipe]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`targets` and `ignore` for :func:`find_targets`."""
    return (recipe.targets, recipe.ignore) if isinstance(recipe, Recipe) else (tuple(recipe), ())


def targets_by_recipe(
    model: nn.Module, recipe: Recipe | Mapping[str, Recipe], owner: str
) -> tuple[list[tuple[Recipe, list[Target]]], dict[str, str]]:
    """The targets of each recipe, each recipe's in the order of the model, and what `find_targets` left out.

    Raises:
        ValueError: as `find_targets`; the model is wrapped for training by several processes; tied layers are to
            differ; or a name is no layer's and no block's.
    """
    targets, left = find_targets(model, *patterns_of(recipe), owner)
    check_not_wrapped(model, owner)
    if not recipe:  # as a search gives it where nothing pays
        named = model.named_modules(remove_duplicate=False)
        left = {name: "the recipes name no layer" for name, module in named if compressible(module)}
    if isinstance(recipe, Recipe):
        return [(recipe, targets)], left
    groups: dict[Recipe, list[Target]] = {}
    used = set()
    for target in targets:
        around = [part for name in target.names for part in recipe if name == part or name.startswith(f"{part}.")]
        if not around:  # a class's name matched, not a layer's
            continue
        mine = {recipe[name] for name in target.names if name in recipe} or {recipe[max(around, key=len)]}
        if len(mine) > 1:
            raise ValueError(f"engine.{owner}: {', '.join(target.names)}: share a weight, but have other recipes")
        used |= set(around)
        groups.setdefault(mine.pop(), []).append(target)
    unused = [name for name in recipe if name not in used]
    if unused:
        raise ValueError(f"engine.{owner}: recipe: {unused[0]!r} names no layer that can be compressed")
    return list(groups.items()), left

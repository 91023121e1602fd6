"""Which tensor of a checkpoint belongs where in a model: by name, by a prefix, or as transformers renames them."""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from engine._checkpoint_file import CheckpointFile
from engine._safetensors import CheckpointError
from engine.nn.compressed import _Compressed

MOST_PREFIX_PARTS = 16
NAMES_SHOWN = 5


class Slots:
    """What a model has to be loaded: modules with a weight, and tensors, by the names that the file has for them.

    Attributes:
        tensors: parameters and buffers in the state dict, but for those of compressed modules.
        modules: by the name of its weight, each module that is compressed or may be replaced.
        identity: for each name, what is equal for two names exactly when they mean the same memory.
        skipped: buffers that are not in the state dict: a file from another version of the model may have them.
        ignored: patterns of names that a file may have besides, as transformers' models declare them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors: dict[str, Any] = dict(model.state_dict(keep_vars=True))
        self.modules: dict[str, nn.Module] = {}
        self.identity: dict[str, Any] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            if isinstance(module, _Compressed):
                for field in module.format.TENSORS:
                    self.tensors.pop(prefix + field, None)
                self.identity[f"{prefix}weight"] = id(module._parameters["values"])
            elif f"{prefix}weight" not in self.tensors:
                continue
            self.modules[f"{prefix}weight"] = module
        self.identity |= {name: id(tensor) for name, tensor in self.tensors.items()}
        self.ignored: Iterable[str] = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self.skipped = {name for name, _ in model.named_buffers(remove_duplicate=False)} - self.identity.keys()


def match_names(file: CheckpointFile, slots: Slots) -> dict[str, str]:
    """For every name in the model the name of the weight or tensor in the file that belongs there."""
    stored = {**{name: name for name in (*file.weights, *file.plain)}, **file.aliases}
    problem = None
    for rename in _renamings(stored, slots):
        names: dict[str, str] = {}
        if any(names.setdefault(rename(name), source) != source for name, source in stored.items()):
            continue  # two tensors would get one name, and who knows which is meant
        sources = {slots.identity[name]: source for name, source in names.items() if name in slots.identity}
        for name, identity in slots.identity.items():  # what the model ties may be stored under one of its names
            if name not in names and identity in sources:
                names[name] = sources[identity]
        placed = {source for name, source in names.items() if name in slots.identity}
        second = {rename(alias) for alias, source in file.aliases.items() if source in placed}  # names of what has one
        missing = sorted(slots.identity.keys() - names.keys())
        unexpected = sorted(names.keys() - slots.identity.keys() - slots.skipped - second)
        unexpected = [name for name in unexpected if not any(re.search(pattern, name) for pattern in slots.ignored)]
        if not missing and not unexpected:
            return {name: source for name, source in names.items() if name in slots.identity}
        problem = problem or (missing, unexpected)
    assert problem is not None
    described = [
        f"{what} {', '.join(found[:NAMES_SHOWN])}"
        + (f" and {len(found) - NAMES_SHOWN} more" * (len(found) > NAMES_SHOWN))
        for what, found in zip(("missing:", "unexpected:"), problem, strict=True)
        if found
    ]
    raise CheckpointError(f"{file.path}: not for this {type(slots.model).__name__}: {'; '.join(described)}")


def _renamings(stored: Mapping[str, str], slots: Slots) -> Iterator[Callable[[str], str]]:
    """What the names in a file may have to be called in the model, the likeliest first."""
    yield from _by_prefix(stored, slots)
    if library := _by_library(slots.model):
        for prefixed in _by_prefix({library(name): source for name, source in stored.items()}, slots):
            yield lambda name, prefixed=prefixed: prefixed(library(name))  # type: ignore[misc]


def _by_library(model: nn.Module) -> Callable[[str], str] | None:
    """How transformers renames what is in its files when it loads them into `model`, where that is one of its models.

    Only whole names: where it puts tensors together (the experts of a mixture), a compressed one is not what it means.
    """
    modeling, mapping = (sys.modules.get(f"transformers.{part}") for part in ("modeling_utils", "conversion_mapping"))
    if modeling is None or mapping is None or not isinstance(model, modeling.PreTrainedModel):
        return None
    steps = [step for step in mapping.get_model_conversion_mapping(model) if not hasattr(step, "operations")]
    return lambda name: functools.reduce(lambda name, step: step.rename_source_key(name)[0], steps, name)


def _by_prefix(stored: Mapping[str, Any], slots: Slots) -> Iterator[Callable[[str], str]]:
    """Names as they are; without a prefix that all of the file's share, or some (a model, from the file of one with a
    head); with a prefix that all of the model's share, or some (a model with a head, from the file of one without).
    """
    yield lambda name: name
    for prefix in _common_prefixes(stored):
        yield lambda name, prefix=prefix: name[len(prefix) :]  # type: ignore[misc]
    for prefix in _common_prefixes(slots.identity):
        yield lambda name, prefix=prefix: prefix + name  # type: ignore[misc]
    for prefix in _first_parts(stored):
        yield lambda name, prefix=prefix: name.removeprefix(prefix)  # type: ignore[misc]
    for prefix in _first_parts(slots.identity):
        yield lambda name, prefix=prefix: prefix + name  # type: ignore[misc]


def _first_parts(names: Mapping[str, Any]) -> list[str]:
    found = dict.fromkeys(name.partition(".")[0] + "." for name in names if "." in name)
    return list(found)[:MOST_PREFIX_PARTS]


def _common_prefixes(names: Mapping[str, Any]) -> list[str]:
    # By characters, and then back to the last whole part.
    shared = os.path.commonprefix(list(names)).split(".")[:-1][:MOST_PREFIX_PARTS]  # noqa: RUF071
    return [".".join(shared[: i + 1]) + "." for i in range(len(shared))]

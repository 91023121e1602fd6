"""compress_, prune_ and quantize_: whole models in place, or not at all."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine import ops
from engine.compress import measure
from engine.compress.calibrate import Calibration, InputStatistics, calibrate, check_calibration
from engine.compress.candidates import Compressed, cuts_of, is_plain, needs_inputs, statistics_of, weight_to_pack
from engine.compress.recipe import DEFAULT_TARGETS, Prune, Quantize, Recipe, check_recipes, describe_recipes
from engine.compress.report import Report
from engine.compress.targets import LOG, find_targets, patterns_of, targets_by_recipe
from engine.compress.trial import guard_whole, model_bytes, try_recipe, try_unpruned
from engine.nn.attention import why_not_unfused


@torch.inference_mode(False)  # the layers that it makes stay, and are to be fit for training
def compress_(
    model: nn.Module,
    recipe: Recipe | Mapping[str, Recipe],
    example_inputs: Any = None,
    calibration: Calibration | None = None,
) -> Report:
    """Compresses `model` in place as `recipe` says and returns a report. Prints nothing.

    Everything is prepared and measured beside the model; its modules are replaced at the very end, so that an error or
    an interrupt leaves the model as it was. Weights that are tied stay tied, or are left alone together.

    Args:
        model: any module; its Linear, Embedding and Conv2d layers, and Hugging Face's Conv1D, can be compressed.
        recipe: what to do, to which layers, and the guard. Or a recipe for each layer by its qualified name (of
            :func:`engine.search`, say), whose own targets and ignore are not read; all others are left alone.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for `model`. Needed for the speed
            guard and for static activations; with them the report tells times and output errors. Their shapes are the
            ones that the model is made fast for. What is no tensor, a cache say, is copied for each run, and stays as
            it was.
        calibration: of :func:`engine.calibrate`, for static activations and importances that look at inputs. Without
            it, the example inputs are the one batch that is calibrated on.

    Raises:
        TypeError: `recipe` is no Recipe and no mapping of names to such, or `calibration` no Calibration.
        ValueError: the model is compressed already or wrapped by DistributedDataParallel or FSDP, a target matches
            nothing that can be compressed, a weight holds a NaN or an infinity, example inputs are missing, or the
            calibration is of another model.
    """
    recipes = check_recipes(recipe, "compress_")
    check_calibration("compress_", calibration)
    if example_inputs is None and any(each.guard == "speed" for each in recipes):
        raise ValueError(
            "engine.compress_: guard='speed' measures layers on example inputs: give example_inputs=, "
            "or choose Recipe(guard='size') or Recipe(guard='none')"
        )
    needs = next(filter(None, map(needs_inputs, recipes)), None)
    if needs and calibration is None and example_inputs is None:
        raise ValueError(
            f"engine.compress_: {needs} calibrated on example inputs: give calibration= or example_inputs="
        )
    groups, left = targets_by_recipe(model, recipe, "compress_")
    targets = [target for _, group in groups for target in group]
    if needs and calibration is None and any(target.multiplied for target in targets):
        moments = any(each.prune is not None and each.prune.importance == "obs" for each in recipes)
        names, ignore = patterns_of(recipe)
        how: dict[str, Any] = {"targets": names, "ignore": ignore, "second_moment": moments}
        calibration = calibrate(model, [example_inputs], progress=False, **how)
    report = Report(recipe=describe_recipes(recipe), layers=[], left_alone=left, bytes_before=model_bytes(model))
    attentions = (module for module in model.modules() if isinstance(module, nn.MultiheadAttention))
    report.fused_attention = sum(not why_not_unfused(module) for module in attentions)
    report.others = _others(model, {*left, *(name for target in targets for name in target.names)})
    chosen: dict[str, Compressed] = {}
    attempt = functools.partial(try_recipe, model, example_inputs, calibration, chosen, report)
    for each, group in groups:
        attempt(each, group)
        if each.guard == "speed" and each.prune is not None and each.quantize is not None:
            try_unpruned(attempt, each, group, report)
    if isinstance(recipe, Mapping):
        order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
        report.layers.sort(key=lambda row: order[row.name])
    if chosen and example_inputs is not None:
        guard = "speed" if all(each.guard == "speed" for each in recipes) else "none"
        guard_whole(model, guard, example_inputs, chosen, report)
    restore = measure.replace_(model, chosen)
    try:
        report.bytes_after = model_bytes(model)
    except BaseException:
        restore()
        raise
    return report


def _others(model: nn.Module, meant: set[str]) -> dict[str, int]:
    """Bytes of the parameters of two dimensions or more that are in none of these modules, tied ones once."""
    seen = {id(parameter) for name in meant for parameter in model.get_submodule(name).parameters()}
    lazy = nn.parameter.UninitializedParameter
    return {
        name: parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if id(parameter) not in seen and not isinstance(parameter, lazy) and parameter.dim() > 1
    }


def quantize_(
    model: nn.Module,
    quantize: Quantize | None = None,
    *,
    targets: tuple[str, ...] = DEFAULT_TARGETS,
    ignore: tuple[str, ...] = (),
    guard: str = "none",
    example_inputs: Any = None,
) -> Report:
    """Quantises `model`'s layers to int8 in place: :func:`compress_` without pruning, same errors."""
    recipe = Recipe(quantize=quantize or Quantize(), targets=targets, ignore=ignore, guard=guard)
    return compress_(model, recipe, example_inputs)


def prune_(
    model: nn.Module,
    prune: Prune | None = None,
    *,
    threshold: float | None = None,
    sparsity: float | None = None,
    scope: str = "layer",
    targets: tuple[str, ...] = ("Linear", "Conv2d", "Conv1D"),
    ignore: tuple[str, ...] = (),
    calibration: Calibration | None = None,
) -> dict[str, float]:
    """Sets small weights of `model` to zero in place: still dense, for further training. Compress it afterwards.

    Args:
        model: any module.
        prune: which weights to drop; or say it by `threshold` or `sparsity` and `scope`.
        threshold: drop where `|w| <= threshold`.
        sparsity: fraction to drop, in [0, 1).
        scope: "row", "layer" or "model".
        targets: as in Recipe. Embeddings are never pruned.
        ignore: as in Recipe.
        calibration: of :func:`engine.calibrate`, for an importance that looks at the inputs.

    Returns:
        Fraction of zeros by qualified name of each pruned layer. One whose inputs were all zero is not among them where
        the importance looks at these.

    Raises:
        ValueError: as :func:`compress_`; the model is as it was.
    """
    if prune is None:
        prune = Prune(sparsity=sparsity, threshold=threshold, scope=scope)
    elif not isinstance(prune, Prune):
        raise TypeError(f"engine.prune_: prune: expected engine.Prune, got {type(prune).__name__}")
    elif threshold is not None or sparsity is not None:
        raise ValueError("engine.prune_: give either a Prune or threshold and sparsity")
    check_calibration("prune_", calibration)
    found, _ = find_targets(model, targets, ignore, "prune_")
    found = [target for target in found if target.prunable]
    if not found:
        raise ValueError(f"engine.prune_: targets {targets!r} match no Linear, Conv2d or Conv1D layer")
    seen: dict[str, InputStatistics] = {}
    if prune.importance != "magnitude":
        for target in found:
            statistics = statistics_of(target, calibration, "prune_")
            if statistics is None:
                raise ValueError(
                    f"engine.prune_: {target.name}: importance {prune.importance!r} looks at inputs: give calibration="
                )
            seen[target.name] = statistics
        for name in [name for name, statistics in seen.items() if statistics.amax == 0]:
            LOG.warning("engine.prune_: %s: left alone: its inputs were all zero", name)
        found = [target for target in found if target.name not in seen or seen[target.name].amax > 0]
    cuts = cuts_of(found, prune) if is_plain(prune) else {}
    pruned: dict[str, float] = {}
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for target in found:
                packed, limit, _ = weight_to_pack(target, prune, None, seen.get(target.name), cuts.get(target.name))
                zeroed = ops.threshold_prune(packed, limit)
                before.append((target.weight, target.weight.detach().clone()))
                target.weight.copy_(target.as_weight(zeroed))
                share = 1 - zeroed.count_nonzero().item() / zeroed.numel()
                pruned |= dict.fromkeys(target.names, share)
    except BaseException:
        with torch.no_grad():
            for weight, values in before:
                weight.copy_(values)
        raise
    return pruned

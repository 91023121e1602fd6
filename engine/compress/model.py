"""compress_, prune_ and quantize_: whole models in place, or not at all."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine import ops
from engine.compress import importance, measure
from engine.compress.calibrate import Calibration, InputStatistics, calibrate
from engine.compress.recipe import DEFAULT_TARGETS, Prune, Quantize, Recipe
from engine.compress.report import Layer, Report
from engine.compress.targets import Target, find_targets
from engine.formats import Bitmap, Block, DenseInt8, Format, SemiStructured
from engine.nn import CompressedConv2d, CompressedEmbedding, CompressedLinear
from engine.nn.conv2d import as_weight
from engine.ops._block import block_norms

Compressed = CompressedLinear | CompressedEmbedding | CompressedConv2d

# A layer that costs this share of a forward pass more than before, or less, can't be told from one that costs the same:
# then its bytes decide. Without it an embedding, whose look-up takes microseconds, would never be compressed.
SAME_TIME = 0.001
NOT_FASTER = "not faster"  # how the reason begins for a layer that loses time


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
        model: any module; its Linear, Embedding and Conv2d layers are what can be compressed.
        recipe: what to do, to which layers, and the guard. Or a recipe for each layer by its qualified name (of
            :func:`engine.search`, say), whose own targets and ignore are not read; all others are left alone.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for `model`. Needed for the speed
            guard and for static activations; with them the report tells times and output errors. Their shapes are the
            ones that the model is made fast for.
        calibration: of :func:`engine.calibrate`, for static activations and importances that look at inputs. Without
            it, the example inputs are the one batch that is calibrated on.

    Raises:
        TypeError: `recipe` is no Recipe and no mapping of names to such.
        ValueError: the model is compressed already, a target matches nothing that can be compressed, a weight holds a
            NaN or an infinity, or example inputs are missing.
    """
    by_layer = recipe if isinstance(recipe, Mapping) else None
    recipes: list[Recipe] = list(recipe.values()) if isinstance(recipe, Mapping) else [recipe]
    for each in recipes:
        if not isinstance(each, Recipe):
            raise TypeError(f"engine.compress_: recipe: expected engine.Recipe, got {type(each).__name__}")
    if not recipes:
        raise ValueError("engine.compress_: recipe: expected at least one layer, got an empty mapping")
    if example_inputs is None and any(each.guard == "speed" for each in recipes):
        raise ValueError(
            "engine.compress_: guard='speed' measures layers on example inputs: give example_inputs=, "
            "or choose Recipe(guard='size') or Recipe(guard='none')"
        )
    needs = next(filter(None, map(_needs_inputs, recipes)), None)
    if needs and calibration is None and example_inputs is None:
        raise ValueError(
            f"engine.compress_: {needs} calibrated on example inputs: give calibration= or example_inputs="
        )
    names, ignore = (recipes[0].targets, recipes[0].ignore) if by_layer is None else (tuple(by_layer), ())
    targets, left = find_targets(model, names, ignore, "compress_")
    groups = [(recipes[0], targets)] if by_layer is None else _by_recipe(targets, by_layer)
    if needs and calibration is None and any(target.multiplied for target in targets):
        moments = any(each.prune is not None and each.prune.importance == "obs" for each in recipes)
        how: dict[str, Any] = {"targets": names, "ignore": ignore, "second_moment": moments}
        calibration = calibrate(model, [example_inputs], progress=False, **how)
    described = recipes[0].to_dict() if by_layer is None else {n: each.to_dict() for n, each in by_layer.items()}
    report = Report(recipe=described, layers=[], left_alone=left, bytes_before=_model_bytes(model))
    chosen: dict[str, Compressed] = {}
    attempt = functools.partial(_try_recipe, model, example_inputs, calibration, chosen, report)
    for each, group in groups:
        attempt(each, group)
        if each.guard == "speed" and each.prune is not None and each.quantize is not None:
            _try_unpruned(attempt, each, group, report)
    if by_layer is not None:
        order = {target.name: i for i, target in enumerate(targets)}
        report.layers.sort(key=lambda row: order[row.name])
    if chosen and example_inputs is not None:
        guard = "speed" if all(each.guard == "speed" for each in recipes) else "none"
        _guard_whole(model, guard, example_inputs, chosen, report)
    measure.replace_(model, chosen)
    report.bytes_after = _model_bytes(model)
    return report


def _by_recipe(targets: list[Target], recipes: Mapping[str, Recipe]) -> list[tuple[Recipe, list[Target]]]:
    """The targets of each recipe, in the order of the model.

    Raises:
        ValueError: tied layers are to differ, or a name is no layer's and no block's.
    """
    groups: dict[Recipe, list[Target]] = {}
    used = set()
    for target in targets:
        around = [part for name in target.names for part in recipes if name == part or name.startswith(f"{part}.")]
        if not around:  # a class's name matched, not a layer's
            continue
        mine = {recipes[name] for name in target.names if name in recipes} or {recipes[max(around, key=len)]}
        if len(mine) > 1:
            raise ValueError(f"engine.compress_: {', '.join(target.names)}: share a weight, but have other recipes")
        used |= set(around)
        groups.setdefault(mine.pop(), []).append(target)
    unused = [name for name in recipes if name not in used]
    if unused:
        raise ValueError(f"engine.compress_: recipe: {unused[0]!r} names no layer that can be compressed")
    return list(groups.items())


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
    targets: tuple[str, ...] = ("Linear", "Conv2d"),
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
        Fraction of zeros by qualified name of each pruned layer.

    Raises:
        ValueError: as :func:`compress_`; the model is as it was.
    """
    if prune is None:
        prune = Prune(sparsity=sparsity, threshold=threshold, scope=scope)
    elif threshold is not None or sparsity is not None:
        raise ValueError("engine.prune_: give either a Prune or threshold and sparsity")
    found, _ = find_targets(model, targets, ignore, "prune_")
    found = [target for target in found if target.prunable]
    if not found:
        raise ValueError(f"engine.prune_: targets {targets!r} match no Linear and no Conv2d layer")
    seen = {n: s for t in found for n in t.names if calibration and (s := calibration.layers.get(n))}
    unseen = [target.name for target in found if prune.importance != "magnitude" and target.name not in seen]
    if unseen:
        raise ValueError(
            f"engine.prune_: {unseen[0]}: importance {prune.importance!r} looks at inputs: give calibration="
        )
    thresholds = _thresholds(found, prune) if _is_plain(prune) else {}
    pruned: dict[str, float] = {}
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for target in found:
                packed, limit, _ = _pruned(target, prune, None, seen.get(target.name), thresholds.get(target.name))
                zeroed = ops.threshold_prune(packed, limit)
                before.append((target.weight, target.weight.detach().clone()))
                target.weight.copy_(as_weight(zeroed, _kernel_size(target)))
                share = 1 - zeroed.count_nonzero().item() / zeroed.numel()
                pruned |= dict.fromkeys(target.names, share)
    except BaseException:
        with torch.no_grad():
            for weight, values in before:
                weight.copy_(values)
        raise
    return pruned


def _kernel_size(target: Target) -> tuple[int, ...] | None:
    return tuple(target.weight.shape[2:]) or None


def _thresholds(targets: list[Target], prune: Prune) -> dict[str, Tensor | float]:
    """The threshold for each target, by name."""
    if prune.threshold is not None:
        return dict.fromkeys((target.name for target in targets), prune.threshold)
    assert prune.sparsity is not None
    weights = [target.matrix for target in targets]
    if prune.pattern == "block":
        weights = [block_norms(weight) for weight in weights]
    if prune.scope == "model":
        shared = ops.magnitude_threshold(weights, prune.sparsity)
        return dict.fromkeys((target.name for target in targets), shared)
    scope = "row" if prune.scope == "row" else "tensor"
    return {
        target.name: ops.magnitude_threshold(weight, prune.sparsity, scope)
        for target, weight in zip(targets, weights, strict=True)
    }


def _is_plain(prune: Prune) -> bool:
    """Whether thresholds on magnitudes alone say what goes."""
    return prune.importance == "magnitude" and prune.pattern != "2:4"


def _needs_inputs(recipe: Recipe) -> str | None:
    """What of the recipe can be decided only by looking at inputs."""
    if recipe.quantize is not None and recipe.quantize.activation == "static":
        return "static activations are"
    if recipe.prune is not None and recipe.prune.importance != "magnitude":
        return f"importance {recipe.prune.importance!r} is"
    return None


def _candidates(
    targets: list[Target], recipe: Recipe, calibration: Calibration | None, left: dict[str, str]
) -> dict[str, Compressed]:
    """The compressed module for every name; a target without one goes to `left` with the reason."""
    quantize, prune, needs = recipe.quantize, recipe.prune, _needs_inputs(recipe)
    prunable = [t for t in targets if t.prunable] if prune else []
    thresholds = _thresholds(prunable, prune) if prune and _is_plain(prune) and prunable else {}
    prunes = {target.name for target in prunable}
    made: dict[str, Compressed] = {}
    for target in targets:
        if quantize is None and target.name not in prunes:
            left |= dict.fromkeys(target.names, "embeddings, and what is tied to one, are quantised but never pruned")
            continue
        seen = (
            next((calibration.layers[n] for n in target.names if n in calibration.layers), None)
            if calibration
            else None
        )
        static = quantize is not None and quantize.activation == "static" and target.multiplied
        if needs and seen is None and (static or target.name in prunes):
            left |= dict.fromkeys(target.names, "the example inputs never reach it, so it can't be calibrated")
            continue
        with torch.no_grad():
            input_scale = _input_scale(target, quantize, seen) if static else None
            how: dict[str, Any] = {} if input_scale is None else {"input_scale": input_scale}
            if target.name in prunes:
                assert prune is not None
                limit = thresholds.get(target.name)
                weight, threshold, scale = _pruned(target, prune, quantize, seen, limit, input_scale)
                values = torch.int8 if quantize is not None else None
                format: Format
                if prune.pattern == "2:4":
                    format = SemiStructured.from_dense(weight, values, scale=scale, **how)
                elif prune.pattern == "block":
                    format = Block.from_dense(weight, threshold, values, scale=scale, **how)
                else:
                    format = Bitmap.from_dense(weight, threshold, values, scale=scale, **how)
            else:
                assert quantize is not None
                how["activation"] = quantize.activation if target.multiplied else "dynamic"
                if quantize.weight_clip and target.multiplied:
                    mean_square = seen.channel_mean_square if seen else None
                    how["scale"] = importance.clip_scales(*_smoothed(target.matrix, mean_square, input_scale))
                format = DenseInt8.from_dense(target.matrix, **how)
        twins: dict[int, Compressed] = {}
        for name, module in zip(target.names, target.modules, strict=True):
            if id(module) not in twins:
                twins[id(module)] = _module_over(format, module)
                format = twins[id(module)].format  # the next one shares these parameters
            made[name] = twins[id(module)]
    return made


def _input_scale(target: Target, quantize: Quantize | None, seen: InputStatistics | None) -> Tensor | float:
    """The static scale of the target's input, or one for each channel."""
    assert quantize is not None and seen is not None
    if quantize.smooth is not None and target.matrix.shape[1] > 1:
        return seen.channel_scales(target.matrix, quantize.smooth)
    return seen.input_scale(quantize.input_scale)


def _smoothed(
    weight: Tensor, mean_square: Tensor | None, input_scale: Tensor | float | None
) -> tuple[Tensor, Tensor | None]:
    """A weight `[N, K]` and its input's mean squares `[K]` as they are once the weight has taken over the channels'
    scales, where there are such.
    """
    if not isinstance(input_scale, Tensor):
        return weight, mean_square
    return weight.float() * input_scale, None if mean_square is None else mean_square / input_scale.square()


def _pruned(
    target: Target,
    prune: Prune,
    quantize: Quantize | None,
    seen: InputStatistics | None,
    threshold: Tensor | float | None,
    input_scale: Tensor | float | None = None,
) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """A weight, the threshold to pack it at, and the scales of its rows where they are not those of its amax."""
    weight = target.matrix
    mean_square = seen.channel_mean_square if seen is not None else None
    if prune.importance == "obs":
        assert seen is not None
        scale = None
        # The sum, as the mean would be a copy of K×K, and only proportions count.
        moment = seen.moment_sum if seen.moment_sum is not None else seen.second_moment
        weight, mean_square = _smoothed(weight, mean_square, input_scale)
        if isinstance(input_scale, Tensor):
            moment = moment / input_scale / input_scale.unsqueeze(1)
        if quantize is not None:
            scale = importance.clip_scales(weight, mean_square if quantize.weight_clip else None)
        how: dict[str, Any] = {"pattern": prune.pattern, "scope": prune.scope, "scale": scale, "name": target.name}
        corrected = importance.obs_prune(weight, moment, prune.sparsity, **how)
        if isinstance(input_scale, Tensor):
            corrected /= input_scale
        return (corrected if scale is not None else corrected.to(weight.dtype)), 0.0, scale
    if prune.pattern == "2:4":
        score = weight.float().abs()
        if prune.importance == "wanda":
            assert mean_square is not None
            score = score * mean_square.sqrt()
        weight, threshold = importance.semi_structured(weight, score), 0.0
    elif prune.pattern == "block":
        score = weight
        if prune.importance == "wanda":
            assert mean_square is not None
            score = weight.float() * mean_square.sqrt()
        weight, threshold = importance.block(weight, score, prune, threshold), 0.0
    elif prune.importance == "wanda":
        assert seen is not None
        threshold = importance.wanda_threshold(weight, seen, prune)
    assert threshold is not None
    if quantize is None or not quantize.weight_clip:
        return weight, threshold, None
    weight = ops.threshold_prune(weight, threshold)
    return weight, 0.0, importance.clip_scales(*_smoothed(weight, mean_square, input_scale))


def _module_over(format: Any, dense: nn.Module) -> Compressed:
    """The compressed twin of `dense` over `format`."""
    module: Compressed
    if isinstance(dense, nn.Embedding):
        module = CompressedEmbedding(format, dense.padding_idx, dense.weight.dtype)
    else:
        assert isinstance(dense, (nn.Linear, nn.Conv2d))
        if isinstance(dense, nn.Conv2d):
            module = CompressedConv2d.over(format, dense, dense.weight.dtype)
        else:
            module = CompressedLinear(format, dense.bias, dense.weight.dtype)
        if module.values.is_floating_point():
            module.values.requires_grad_(dense.weight.requires_grad)
    return module.train(dense.training)


def _describe(target: Target, module: Compressed) -> Layer:
    format = module.format
    return Layer(
        name=target.name,
        names=target.names,
        shape=tuple(target.weight.shape),
        format=format.label,
        sparsity=format.sparsity,
        bytes_before=target.weight.numel() * target.weight.element_size(),
        bytes_after=format.nbytes,
    )


def _weight_error(target: Target, module: Compressed) -> float:
    """Relative error of the weight, Frobenius."""
    exact = target.matrix.float()
    return _relative(module.format.to_dense().float() - exact, exact)


def _relative(difference: Tensor, exact: Tensor) -> float:
    size = exact.norm().item()
    return difference.norm().item() / size if size else difference.norm().item()


def _measure_errors(model: nn.Module, inputs: Any, candidates: Mapping[str, Compressed], rows: list[Layer]) -> None:
    """Relative output error of each layer on the inputs it meets in the dense model; None where none reach it."""
    errors: dict[str, list[float]] = {}

    def see(name: str, args: tuple, kwargs: dict, output: Any) -> None:
        got = candidates[name](*args, **kwargs)
        errors.setdefault(name, []).append(_relative(got.float() - output.float(), output.float()))

    measure.observe(model, inputs, {name: model.get_submodule(name) for name in candidates}, see)
    for row in rows:
        seen = [error for name in row.names for error in errors.get(name, ())]
        row.error = sum(seen) / len(seen) if seen else None


def _try_recipe(
    model: nn.Module,
    inputs: Any,
    calibration: Calibration | None,
    chosen: dict[str, Compressed],
    report: Report,
    recipe: Recipe,
    targets: list[Target],
) -> None:
    """Compresses each target on trial: what passes the guard goes to `chosen` and `report.layers`, the rest, with the
    reason, to `report.left_alone`.
    """
    candidates = _candidates(targets, recipe, calibration, report.left_alone)
    rows = [_describe(target, candidates[target.name]) for target in targets if target.name in candidates]
    if inputs is None:
        by_name = {target.name: target for target in targets}
        for row in rows:
            row.error = _weight_error(by_name[row.name], candidates[row.name])
    else:
        _measure_errors(model, inputs, candidates, rows)
    passed = _guard(model, recipe, inputs, candidates, rows, chosen, report)
    chosen |= {name: candidates[name] for row in passed for name in row.names}
    report.layers += passed


def _try_unpruned(
    attempt: Callable[[Recipe, list[Target]], None], recipe: Recipe, targets: list[Target], report: Report
) -> None:
    """Quantises without pruning what was left alone because, pruned, it wasn't faster: there sparsity buys nothing."""
    mine = {name for target in targets for name in target.names}
    lost = {name: why for name, why in report.left_alone.items() if name in mine and why.startswith(NOT_FASTER)}
    again = [target for target in targets if target.name in lost and target.prunable]
    if not again:
        return
    for target in again:
        for name in target.names:
            del report.left_alone[name]
    attempt(dataclasses.replace(recipe, prune=None), again)
    for row in report.layers:
        if row.name in lost:
            row.note = f"not pruned: {lost[row.name]}"
    for name in lost.keys() & report.left_alone.keys():
        report.left_alone[name] = f"{lost[name]}; {report.left_alone[name]}"
    order = {target.name: i for i, target in enumerate(targets)}
    report.layers.sort(key=lambda row: order.get(row.name, -1))  # what another recipe compressed stays before


def _guard(
    model: nn.Module,
    recipe: Recipe,
    inputs: Any,
    candidates: Mapping[str, Compressed],
    rows: list[Layer],
    chosen: Mapping[str, Compressed],
    report: Report,
) -> list[Layer]:
    """The rows that win by themselves, timed where there are inputs; the reasons of the others go to the report.

    What is chosen already is in place while the rest is timed.
    """
    passed = list(rows)

    def leave(row: Layer, reason: str) -> None:
        passed.remove(row)
        report.left_alone |= dict.fromkeys(row.names, reason)

    if recipe.guard != "none":
        for row in rows:
            if row.bytes_after >= row.bytes_before:
                leave(row, f"not smaller: {row.bytes_before:,} → {row.bytes_after:,} bytes as {row.format}")
    if inputs is None or not passed:
        return passed
    with measure.replaced(model, chosen):
        timed = {name: candidates[name] for row in passed for name in row.names}
        layers, (whole, _) = measure.time_layers(model, inputs, timed)
    for row in list(passed):
        times = [layers[name] for name in row.names if name in layers]
        row.seconds_before, row.seconds_after = (sum(side) for side in zip(*times, strict=True))
        if recipe.guard != "speed":
            continue
        if row.seconds_before == 0:
            leave(row, "the example inputs never reach it, so it can't be measured")
        elif row.seconds_after > row.seconds_before + SAME_TIME * whole:
            before, after = row.seconds_before * 1e6, row.seconds_after * 1e6
            leave(row, f"{NOT_FASTER}: {before:.0f} → {after:.0f} µs as {row.format}")
    return passed


def _guard_whole(model: nn.Module, guard: str, inputs: Any, chosen: dict[str, Compressed], report: Report) -> None:
    """Times the model with all that is chosen; under the speed guard, gives everything up where that isn't faster."""
    report.seconds_before, report.seconds_after = measure.time_model(model, inputs, chosen)
    if guard == "speed" and report.seconds_after > report.seconds_before:
        before, after = report.seconds_before * 1e3, report.seconds_after * 1e3
        reason = f"faster alone, but the whole model is not: {before:.2f} → {after:.2f} ms"
        report.left_alone |= dict.fromkeys(chosen, reason)
        report.seconds_before = report.seconds_after = None
        report.layers.clear()
        chosen.clear()


def _model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, tied ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    lazy = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
    return sum(t.numel() * t.element_size() for t in tensors.values() if not isinstance(t, lazy))

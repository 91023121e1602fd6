"""The compressed twin of each target: what a recipe makes of its weight, before anything is measured or replaced."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from engine import ops
from engine.compress import importance
from engine.compress.calibrate import Calibration, InputStatistics
from engine.compress.recipe import Prune, Quantize, Recipe
from engine.compress.targets import Target
from engine.formats import Bitmap, Block, DenseInt8, Format, SemiStructured
from engine.nn import CompressedConv2d, CompressedEmbedding, CompressedLinear
from engine.nn._replace import give_attributes, given_attributes, is_conv1d
from engine.ops._block import block_norms

Compressed = CompressedLinear | CompressedEmbedding | CompressedConv2d


def needs_inputs(recipe: Recipe) -> str | None:
    """What of the recipe can be decided only by looking at inputs."""
    if recipe.quantize is not None and recipe.quantize.activation == "static":
        return "static activations are"
    if recipe.prune is not None and recipe.prune.importance != "magnitude":
        return f"importance {recipe.prune.importance!r} is"
    return None


def make_candidates(
    targets: list[Target], recipe: Recipe, calibration: Calibration | None, left: dict[str, str]
) -> dict[str, Compressed]:
    """The compressed module for every name; a target without one goes to `left` with the reason."""
    quantize, prune = recipe.quantize, recipe.prune
    prunable = [t for t in targets if t.prunable] if prune else []
    cuts = cuts_of(prunable, prune) if prune and is_plain(prune) and prunable else {}
    prunes = {target.name for target in prunable}
    made: dict[str, Compressed] = {}
    for target in targets:
        if quantize is None and target.name not in prunes:
            left |= dict.fromkeys(target.names, "embeddings, and what is tied to one, are quantised but never pruned")
            continue
        seen = statistics_of(target, calibration, "compress_")
        static = quantize is not None and quantize.activation == "static" and target.multiplied
        looks = static or (prune is not None and prune.importance != "magnitude" and target.name in prunes)
        if looks and seen is None:
            left |= dict.fromkeys(target.names, "the inputs that were calibrated on never reach it")
            continue
        if looks and seen is not None and seen.amax == 0:
            what = "static scale" if static else "importance"
            left |= dict.fromkeys(target.names, f"its inputs were all zero, so that no {what} can be told")
            continue
        # The user's autocast is for the model: products here are to be in float32.
        with torch.no_grad(), torch.autocast(target.weight.device.type, enabled=False):
            input_scale = _input_scale(target, quantize, seen) if static else None
            how: dict[str, Any] = {} if input_scale is None else {"input_scale": input_scale}
            if target.name in prunes:
                assert prune is not None
                cut = cuts.get(target.name)
                try:
                    weight, threshold, scale = weight_to_pack(target, prune, quantize, seen, cut, input_scale)
                except importance.NotInvertible as error:
                    left |= dict.fromkeys(target.names, str(error).rpartition(": ")[2])
                    continue
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
        taken: list[str] = []
        for name, module in zip(target.names, target.modules, strict=True):
            if id(module) not in twins:
                twins[id(module)] = _module_over(format, module)
                taken += give_attributes(twins[id(module)], given_attributes(module))
                format = twins[id(module)].format  # the next one shares these parameters
            made[name] = twins[id(module)]
        if taken:
            left |= dict.fromkeys(
                target.names, f"it has an attribute {taken[0]!r}, of which a replacement has another use"
            )
            for name in target.names:
                del made[name]
    return made


def statistics_of(target: Target, calibration: Calibration | None, owner: str) -> InputStatistics | None:
    """What was seen of the target's inputs; ValueError where it is of another layer's."""
    layers = calibration.layers if calibration is not None else {}
    seen = next((layers[name] for name in target.names if name in layers), None)
    if seen is not None and seen.channel_amax.shape[0] != target.columns:
        raise ValueError(
            f"engine.{owner}: {target.name}: the calibration is of another model: "
            f"it saw inputs of {seen.channel_amax.shape[0]} channels there, the layer takes {target.columns}"
        )
    return seen


def cuts_of(targets: list[Target], prune: Prune) -> dict[str, importance.Cut]:
    """Where each target is cut, by name: of a tied weight the threshold itself would be as large as the weight."""
    if prune.threshold is not None:
        limit = torch.tensor(prune.threshold, dtype=torch.float64, device="cpu").float()  # beyond its range: infinity
        return dict.fromkeys((target.name for target in targets), (limit, None))
    assert prune.sparsity is not None
    weights = [target.matrix for target in targets]
    by_row = prune.scope == "row"

    def cut_of(weights: list[Tensor]) -> importance.Cut:
        assert prune.sparsity is not None
        if prune.pattern != "block":
            return importance.limit_and_ties(weights, prune.sparsity, by_row)
        shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
        return importance.blocks_cut([block_norms(weight) for weight in weights], shapes, prune.sparsity, by_row)

    if prune.scope == "model":
        return dict.fromkeys((target.name for target in targets), cut_of(weights))
    cuts = [cut_of([weight]) for weight in weights]
    return {target.name: cut for target, cut in zip(targets, cuts, strict=True)}


def is_plain(prune: Prune) -> bool:
    """Whether thresholds on magnitudes alone say what goes."""
    return prune.importance == "magnitude" and prune.pattern != "2:4"


def weight_to_pack(
    target: Target,
    prune: Prune,
    quantize: Quantize | None,
    seen: InputStatistics | None,
    cut: importance.Cut | None,
    input_scale: Tensor | float | None = None,
) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """A weight, the threshold to pack it at, and the scales of its rows where they are not those of its amax."""
    weight = target.matrix
    threshold: Tensor | float
    mean_square = seen.channel_mean_square if seen is not None else None
    if prune.importance == "obs":
        assert seen is not None
        scale = None
        # The sum, as the mean would be a copy of K×K, and only proportions count.
        moment = seen.moment_sum if seen.moment_sum is not None else seen.second_moment
        weight, mean_square = _smoothed(weight, mean_square, input_scale)
        if isinstance(input_scale, Tensor):
            relative = input_scale / 2.0 ** math.floor(math.log2(input_scale.amax().item()))
            moment = moment / relative / relative.unsqueeze(1)
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
            assert seen is not None
            score = score * importance.input_norms(seen, weight.device)
        weight, threshold = importance.semi_structured(weight, score), 0.0
    elif prune.pattern == "block":
        score = weight
        if prune.importance == "wanda":
            assert seen is not None
            score = weight.float() * importance.input_norms(seen, weight.device)
        weight, threshold = importance.block(weight, score, prune, cut), 0.0
    elif prune.importance == "wanda":
        assert seen is not None
        threshold = importance.wanda_threshold(weight, seen, prune)
    else:
        assert cut is not None
        threshold = importance.among_ties(weight, *cut)
    if quantize is None or not quantize.weight_clip:
        return weight, threshold, None
    weight = ops.threshold_prune(weight, threshold)
    return weight, 0.0, importance.clip_scales(*_smoothed(weight, mean_square, input_scale))


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


def _module_over(format: Any, dense: Any) -> Compressed:
    """The compressed twin of `dense` over `format`."""
    module: Compressed
    if isinstance(dense, nn.Embedding):
        module = CompressedEmbedding(format, dense.padding_idx, dense.weight.dtype)
    else:
        if isinstance(dense, nn.Conv2d):
            module = CompressedConv2d.over(format, dense, dense.weight.dtype)
        else:
            module = CompressedLinear(format, dense.bias, dense.weight.dtype, is_conv1d(dense))
        if module.values.is_floating_point():
            module.values.requires_grad_(dense.weight.requires_grad)
    return module.train(dense.training)
